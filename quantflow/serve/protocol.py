"""The messages of the HTTP interface: OpenAI's, and LMDeploy's where it differs.

Every parameter is honoured, or accepted with the values that change nothing and refused by name
with any other (`serve/fields.py` has those), so that the document at /openapi.json says so. What is
null is as if it were not there, known or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from quantflow.serve import fields
from quantflow.serve.fields import known_types

MOST_TOOLS = 128
MOST_MESSAGES = 4096
MOST_PROMPTS = 128
MOST_STOPS = 16
MOST_NAME = 256  # letters


def _null_or_nothing(schema: dict[str, Any]) -> None:
    """Also where there is a default, which null stands for."""
    schema["additionalProperties"] = {"type": "null"}
    properties = schema.get("properties", {})
    for name, value in properties.items():
        if value.get("default") is not None:
            about = {key: value[key] for key in ("default", "title", "description") if key in value}
            properties[name] = {
                "anyOf": [{k: v for k, v in value.items() if k not in about}, {"type": "null"}],
                **about,
            }


class Incoming(BaseModel):
    """What clients send: of the types that are declared, and nothing else but nulls."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_null_or_nothing)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict) or None not in data.values():
            return data
        required = {
            field.alias or name for name, field in cls.model_fields.items() if field.is_required()
        }
        return {
            name: value for name, value in data.items() if value is not None or name in required
        }


INTERACTIVE: dict[str, fields.Foreign] = {
    "messages": fields.only(hint="Use prompt"),
    **dict.fromkeys(
        ("max_tokens", "max_completion_tokens"), fields.only(hint="Use request_output_len")
    ),
}

if TYPE_CHECKING:  # the fields of others are made of a table
    RequestFields = Incoming
    MessageFields = Incoming
    PartFields = Incoming
    CallFields = Incoming
    StructuredFields = Incoming
    InteractiveFields = Incoming
else:
    RequestFields = fields.extended(Incoming, fields.REQUEST)
    MessageFields = fields.extended(Incoming, fields.MESSAGE)
    PartFields = fields.extended(Incoming, fields.PART)
    CallFields = fields.extended(Incoming, fields.CALL)
    StructuredFields = fields.extended(Incoming, fields.STRUCTURED)
    InteractiveFields = fields.extended(Incoming, {**fields.REQUEST, **fields.CHAT, **INTERACTIVE})


class Outgoing(BaseModel):
    model_config = ConfigDict(extra="forbid")


# --- requests

Name = Annotated[str, Field(max_length=MOST_NAME)]
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=512)]],
    Field(max_length=MOST_STOPS, fail_fast=True),
]
Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024),
]
# fail_fast: a million wrong items are one error, not a million.
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(max_length=2**20, fail_fast=True)
]


def _many(stop: Any) -> Any:
    """`false` is LMDeploy's way of saying that there is none."""
    return None if stop is False else [stop] if isinstance(stop, str) else stop


Stop = Annotated[
    StopStrings | None,
    BeforeValidator(
        _many,
        json_schema_input_type=Annotated[str, Field(min_length=1, max_length=512)]
        | StopStrings
        | Literal[False]
        | None,
    ),
]


def _switch(value: Any) -> Any:
    """As LMDeploy's own tests send it."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


Switch = Annotated[
    bool, BeforeValidator(_switch, json_schema_input_type=bool | Literal["true", "false"])
]


def _unsupported(words: str) -> PydanticCustomError:
    return PydanticCustomError(fields.REFUSED, "{words}", {"words": words})


class TextPart(PartFields):
    type: Literal["text"]
    text: str


Part = Annotated[TextPart, known_types("parts", "text", media=True)]
Content = str | Annotated[list[Part], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]


class CalledFunction(CallFields):
    name: Name
    arguments: str


class MessageToolCall(CallFields):
    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(MessageFields):
    """content may be missing or null where there are tool_calls, or a refusal, which then stands
    for it. reasoning_content, reasoning, thinking: one of them, for templates that show it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: (
        Annotated[list[MessageToolCall], Field(max_length=MOST_TOOLS, fail_fast=True)] | None
    ) = None
    tool_call_id: Name | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None


def _dialogue(messages: Any) -> Any:
    """A plain string, as LMDeploy takes it, is the user's."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


Messages = Annotated[
    list[Message],
    Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True),
    BeforeValidator(
        _dialogue,
        json_schema_input_type=Annotated[
            list[Message], Field(min_length=1, max_length=MOST_MESSAGES)
        ]
        | str,
    ),
]


# OpenAI's have 64 letters, Anthropic's twice as many
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]


class Function(Incoming):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Incoming):
    type: Literal["function"]
    function: Function


class FunctionName(Incoming):
    name: Name


class ToolChoice(Incoming):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Incoming):
    """tools: by name, of those that the request brings."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolChoice], Field(min_length=1, max_length=MOST_TOOLS, fail_fast=True)]


class AllowedToolsChoice(Incoming):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_kind(choice: Any) -> str:
    if isinstance(choice, (dict, BaseModel)):
        kind = choice.get("type") if isinstance(choice, dict) else getattr(choice, "type", None)
        return "allowed" if kind == "allowed_tools" else "named"
    return "str"


Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("str")]
    | Annotated[ToolChoice, Tag("named")]
    | Annotated[AllowedToolsChoice, Tag("allowed")],
    Discriminator(_choice_kind),
]


class JsonSchema(Incoming):
    name: Name
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Incoming):
    """json_object: any JSON object, or one that follows `schema`. json_schema: one that follows
    `json_schema.schema`, or `schema`.
    regex_schema: a text that its namesake matches as a whole, in LMDeploy's words; regex: the same
    in those of others. grammar: one of a grammar in Lark or GBNF."""

    type: Literal["text", "json_object", "json_schema", "regex_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    regex_schema: str | None = None
    regex: str | None = None
    pattern: str | None = None
    grammar: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_other_type(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if kind in ("structural_tag", "python"):
            raise _unsupported(
                f"type {kind} is not supported here; expected one of json_schema, json_object,"
                " regex, grammar, text"
            )
        return data


Choices = Annotated[list[str], Field(min_length=1, max_length=16384, fail_fast=True)]


class StructuredOutputs(StructuredFields):
    """vLLM's: what the text must be, in one way."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Constrained(Incoming):
    """What an answer must be, in the words of several servers; at most one of them. The guided_
    ones are vLLM's, ebnf and regex SGLang's, grammar llama.cpp's, json_schema both's."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None


class StreamOptions(Incoming):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class Sampling(RequestFields):
    """What /v1/chat/completions and /v1/completions share. min_tokens (LMDeploy calls it
    min_new_tokens), stop_token_ids, top_k, min_p, repetition_penalty, ignore_eos,
    skip_special_tokens and include_stop_str_in_output are not OpenAI's. Of max_tokens and
    max_completion_tokens the smaller holds.

    do_sample: false is temperature 0. include_stop_str_in_output: what ended the text is its end.
    return_token_ids, prompt_logprobs: told as vLLM tells them. priority: of two that wait the lower
    goes first; a request may step back behind others, and not before them."""

    model: Name | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop = None
    stream: Switch | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=1024)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    do_sample: bool | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    priority: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None


Document = Annotated[dict[str, str], Field(max_length=64)]
Variables = Annotated[
    dict[Annotated[str, Field(pattern=r"^[a-zA-Z][a-zA-Z0-9_]{0,63}$")], Any], Field(max_length=64)
]


class Templated(RequestFields):
    """What the model's chat template is told beside the dialogue; where it does not ask, it changes
    nothing. chat_template_kwargs: variables of the template. reasoning_effort: one, too; `none`
    says enable_thinking: false and thinking: false, any other true.
    continue_final_message: the answer goes on where the last message ends. add_generation_prompt:
    false leaves out where the answer would begin."""

    chat_template_kwargs: Variables | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    enable_thinking: bool | None = None
    documents: Annotated[list[Document], Field(max_length=MOST_PROMPTS, fail_fast=True)] | None = (
        None
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatRequest(Constrained, Templated, Sampling):
    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: (
        Annotated[
            list[Annotated[Tool, known_types("tools", "function")]],
            Field(max_length=MOST_TOOLS, fail_fast=True),
        ]
        | None
    ) = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None


def _kind(prompt: Any) -> str:
    """Which of the four it is meant to be, by its first item."""
    if not isinstance(prompt, list):
        return "text"
    first = prompt[0] if prompt else None
    return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "tokens"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[
        list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True), Tag("texts")
    ]
    | Annotated[TokenIds, Field(min_length=1), Tag("tokens")]
    | Annotated[
        list[Annotated[TokenIds, Field(min_length=1)]],
        Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True),
        Tag("lists"),
    ],
    Discriminator(_kind),
]


class CompletionRequest(Constrained, Sampling):
    prompt: Prompt
    best_of: Annotated[int, Field(ge=1, le=64)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class InteractiveRequest(InteractiveFields):
    """A turn of a session, in LMDeploy's words. interactive_mode: the session stays for another
    turn; else it ends with this one.
    cancel: ends the session, and the turn that runs. request_output_len: the most tokens to
    generate; 0 with interactive_mode false ends the session without a turn, as LMDeploy's client
    asks for it."""

    model: Name | None = None
    prompt: Messages
    session_id: Annotated[int, Field(ge=-1, le=2**53)] = -1
    interactive_mode: bool = False
    stream: bool = False
    stop: Stop = None
    cancel: bool = False
    request_output_len: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    top_p: Probability = 0.95
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] = 40
    min_p: Probability = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None


class TokenizeRequest(Templated):
    """Text, or a dialogue in the model's own format."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(Incoming):
    model: Name | None = None
    tokens: TokenIds


class GenerateRequest(Incoming):
    """A prompt and what to make of it, in LMDeploy's words. session_id: a label. logprob_start_len:
    from the token after this one on the prompt's log-probabilities are told, and nothing is
    generated."""

    prompt: Annotated[str, Field(min_length=1)] | None = None
    input_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    session_id: int | None = None
    return_logprob: bool | None = None
    top_logprobs_num: Annotated[int, Field(ge=0, le=20)] | None = None
    logprob_start_len: Annotated[int, Field(ge=-1, le=2**31 - 1)] = -1
    max_tokens: Annotated[int, Field(ge=0)] = 128
    stop: Stop = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=1024)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None  # nothing is put between them
    include_stop_str_in_output: bool | None = None
    # No meaning here.
    image_data: None = None
    return_routed_experts: Literal[False] | None = None
    repetition_ngram_size: Literal[0] = 0
    repetition_ngram_threshold: Annotated[int, Field(ge=0)] = 0  # of those
    media_io_kwargs: None = None
    mm_processor_kwargs: None = None


class EncodeRequest(Incoming):
    """LMDeploy's. do_preprocess: the tokens of a dialogue in which the text is the user's. add_bos:
    with those that open every text."""

    input: str | Annotated[list[str], Field(max_length=MOST_PROMPTS, fail_fast=True)]
    do_preprocess: bool | None = None
    add_bos: bool | None = None


# --- responses


class ErrorBody(Outgoing):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Outgoing):
    error: ErrorBody


class PromptTokens(Outgoing):
    cached_tokens: int = 0


class Usage(Outgoing):
    """prompt_tokens_details.cached_tokens: those that the prefix cache held."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class TopLogprob(Outgoing):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Outgoing):
    content: list[TokenLogprob] | None
    refusal: None = None


class PromptLogprob(Outgoing):
    """rank: 1 is the likeliest token."""

    logprob: float
    rank: int
    decoded_token: str


# Of each token of a prompt, by the ids of it and of the likeliest; null of the first, which follows
# nothing.
PromptLogprobs = list[dict[str, PromptLogprob] | None]


class FunctionCall(Outgoing):
    name: str
    arguments: str


class ToolCall(Outgoing):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(Outgoing):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


# vLLM's: the stop string, or the token of stop_token_ids, that ended the text
StopReason = str | int | None


class ChatChoice(Outgoing):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: StopReason = None
    token_ids: list[int] | None = None


class ChatCompletion(Outgoing):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class ToolCallChunk(Outgoing):
    index: int
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Delta(Outgoing):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallChunk] | None = None


class ChatChunkChoice(Outgoing):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: StopReason = None
    token_ids: list[int] | None = None


class ChatChunk(Outgoing):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class TextLogprobs(Outgoing):
    """The first token of a prompt follows nothing: its log-probability is given as 0."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class TextChoice(Outgoing):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: StopReason = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Outgoing):
    """One answer, or a part of it: OpenAI's completions have one shape for both."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class InteractiveResponse(Outgoing):
    """tokens: generated so far; input_tokens: of the prompt; history_tokens: that the session held
    before."""

    text: str
    tokens: int
    input_tokens: int
    history_tokens: int
    finish_reason: Literal["stop", "length"] | None = None


class ModelCard(Outgoing):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "quantflow"
    max_model_len: int


class ModelList(Outgoing):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(Outgoing):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeResponse(Outgoing):
    prompt: str


Scored = tuple[float, int]  # a log-probability and its token


class GenerateMeta(Outgoing):
    prompt_tokens: int
    completion_tokens: int
    finish_reason: dict[Literal["type"], Literal["stop", "length"]] | None
    output_token_logprobs: list[Scored] | None
    input_token_logprobs: list[Scored] | None
    output_top_logprobs: list[list[Scored]] | None
    input_top_logprobs: list[list[Scored]] | None


class GenerateResponse(Outgoing):
    """completion_tokens, output_ids: without the token that ended the text, unless
    include_stop_str_in_output asks for it."""

    text: str
    output_ids: list[int]
    meta_info: GenerateMeta


class EncodeResponse(Outgoing):
    """Of one text, or of each of several."""

    input_ids: list[int] | list[list[int]]
    length: int | list[int]


class Health(Outgoing):
    status: Literal["ok", "stalled", "stopped", "draining"]


class Version(Outgoing):
    version: str


class Load(Outgoing):
    """server_load: texts that run or wait."""

    server_load: int


class Done(Outgoing):
    """What an administrator's call did."""

    done: str
