"""What clients send: OpenAI's requests, and LMDeploy's where they differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from quantflow.serve import fields
from quantflow.serve.fields import known_types
from quantflow.serve.protocol import (
    MOST_MESSAGES,
    MOST_PROMPTS,
    MOST_TOOLS,
    Biases,
    Incoming,
    Name,
    Penalty,
    Probability,
    Stop,
    Switch,
    TokenIds,
    ToolName,
    Variables,
)

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
    InteractiveFields = fields.extended(Incoming, {**fields.DIALOGUE, **INTERACTIVE})


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
