"""The messages of /v1/responses. What comes in is turned into a dialogue by
`serve/responses/dialogue.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from quantflow.serve import fields
from quantflow.serve.fields import ANY, LABEL, NUMBER, Foreign, known_types, only
from quantflow.serve.protocol import (
    MOST_MESSAGES,
    MOST_TOOLS,
    Incoming,
    Name,
    Outgoing,
    Probability,
    Variables,
)
from quantflow.serve.replies import TokenLogprob
from quantflow.serve.requests import Function

_STORED = "Nothing is stored here: send the whole dialogue as input"

# Parameters that are not read, OpenAI's and those of others who serve this API, and the values of
# each that change nothing.
REQUEST: dict[str, Foreign] = {
    **fields.DIALOGUE,
    "background": only(False, hint="Nothing is stored here: wait for the answer, or stream it"),
    "background_options": only({}),
    "previous_response_id": only(hint=_STORED),
    "conversation": only(hint=_STORED),
    "prompt": only(hint="Nothing is stored here: send the prompt's text as instructions or input"),
    "context_management": only([]),
    "truncation": only("disabled", hint="Leave out what the model's context has no room for"),
    "access_programs": ANY,
    "image": ANY,  # of images, which are refused themselves
    "max_tool_calls": NUMBER,  # of built-in tools, of which there are none
    # Chat completions'
    "messages": only(hint="Use input"),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), only(hint="Use max_output_tokens")),
    "response_format": only({"type": "text"}, hint="Use text.format"),
    **dict.fromkeys(("reasoning_effort", "enable_thinking"), only(hint="Use reasoning.effort")),
    "logprobs": only(False, hint="Use top_logprobs"),
}
ITEM: dict[str, Foreign] = {
    **dict.fromkeys(("id", "status", "phase"), LABEL),
    **dict.fromkeys(("caller", "parsed_arguments"), ANY),
    "namespace": only(""),
    "encrypted_content": only(hint="Another server made it: leave the item out"),
}
PART: dict[str, Foreign] = dict.fromkeys(
    ("annotations", "logprobs", "parsed", "prompt_cache_breakpoint"), ANY
)

if TYPE_CHECKING:  # they are made of the tables
    RequestFields = Incoming
    ItemFields = Incoming
    PartFields = Incoming
else:
    RequestFields, ItemFields, PartFields = (
        fields.extended(Incoming, table) for table in (REQUEST, ITEM, PART)
    )


# --- requests


class TextPart(PartFields):
    type: Literal["input_text", "output_text", "text"] = "input_text"
    text: str


class RefusalPart(PartFields):
    type: Literal["refusal"]
    refusal: str


class ReasoningPart(Incoming):
    type: Literal["reasoning_text", "summary_text"]
    text: str


def _part(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "Refusal" if kind == "refusal" else "Text"


Part = Annotated[
    Annotated[TextPart, Tag("Text")] | Annotated[RefusalPart, Tag("Refusal")],
    Discriminator(_part),
    known_types("parts", "input_text", "output_text", "text", "refusal", media=True),
]
Parts = Annotated[list[Part], Field(max_length=MOST_MESSAGES, fail_fast=True)]


class MessageItem(ItemFields):
    """A message of any role."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts


class CallItem(ItemFields):
    """A function that the model called. arguments: JSON."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: str


class OutputItem(ItemFields):
    """What a function that was called gave back."""

    type: Literal["function_call_output"]
    call_id: Name
    output: str | Parts
    name: Name | None = None


class ReasoningItem(ItemFields):
    """What the model thought before it answered."""

    type: Literal["reasoning"]
    summary: (
        Annotated[list[ReasoningPart], Field(max_length=MOST_MESSAGES, fail_fast=True)] | None
    ) = None
    content: (
        Annotated[list[ReasoningPart], Field(max_length=MOST_MESSAGES, fail_fast=True)] | None
    ) = None


ITEMS = {
    "message": "Message",
    "function_call": "Call",
    "function_call_output": "Output",
    "reasoning": "Reasoning",
}


def _item(value: Any) -> str:
    return ITEMS.get(
        str(value.get("type") if isinstance(value, dict) else getattr(value, "type", None)),
        "Message",
    )


Item = Annotated[
    Annotated[MessageItem, Tag("Message")]
    | Annotated[CallItem, Tag("Call")]
    | Annotated[OutputItem, Tag("Output")]
    | Annotated[ReasoningItem, Tag("Reasoning")],
    Discriminator(_item),
    known_types("items", *ITEMS),
]


def _items(value: Any) -> Any:
    """A plain string is the user's."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


_Items = Annotated[list[Item], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
Input = Annotated[_Items, BeforeValidator(_items, json_schema_input_type=_Items | str)]


class Tool(Function):
    type: Literal["function"]
    # No meaning here: whether the model sees a tool at once, and who else may call it.
    defer_loading: Literal[False] | None = None
    allowed_callers: (
        Annotated[list[Literal["direct"]], Field(max_length=16, fail_fast=True)] | None
    ) = None
    output_schema: dict[str, Any] | None = None


class NamedTool(Incoming):
    type: Literal["function"] = "function"
    name: Name


class AllowedTools(Incoming):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[Annotated[NamedTool, known_types("tools", "function")]],
        Field(min_length=1, max_length=MOST_TOOLS, fail_fast=True),
    ]


def _choice(value: Any) -> str:
    if isinstance(value, (str, type(None))):
        return "Word"
    return (
        "Allowed"
        if (value.get("type") if isinstance(value, dict) else getattr(value, "type", ""))
        == "allowed_tools"
        else "Named"
    )


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"] | None, Tag("Word")]
    | Annotated[NamedTool, Tag("Named")]
    | Annotated[AllowedTools, Tag("Allowed")],
    Discriminator(_choice),
    known_types("choices", "function", "allowed_tools"),
]


class TextFormat(Incoming):
    """json_object: any JSON object. json_schema: one that follows `schema`."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Incoming):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Incoming):
    """effort: as chat completions take it. What a model thinks stands in its text, so that there is
    nothing to be summarised."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None


class StreamOptions(Incoming):
    include_usage: Literal[True] | None = None  # it is told anyway
    include_obfuscation: Literal[False] | None = None


LOGPROBS = "message.output_text.logprobs"
Include = Literal[
    "message.output_text.logprobs",
    # Of what is never there: built-in tools, images, and reasoning apart from the text.
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponsesRequest(RequestFields):
    """seed, top_k, min_p, repetition_penalty, ignore_eos and chat_template_kwargs are not
    OpenAI's."""

    model: Name | None = None
    input: Input
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[Include], Field(max_length=32, fail_fast=True)] | None = None
    text: TextOptions | None = None
    tools: (
        Annotated[
            list[Annotated[Tool, known_types("tools", "function")]],
            Field(max_length=MOST_TOOLS, fail_fast=True),
        ]
        | None
    ) = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: (
        Annotated[dict[str, Annotated[str, Field(max_length=4096)]], Field(max_length=16)] | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: Variables | None = None


# --- answers


class OutputText(Outgoing):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[None]
    logprobs: list[TokenLogprob]


Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputMessage(Outgoing):
    id: str
    type: Literal["message"] = "message"
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class FunctionCall(Outgoing):
    id: str
    type: Literal["function_call"] = "function_call"
    status: Status
    call_id: str
    name: str
    arguments: str


class InputDetails(Outgoing):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Outgoing):
    reasoning_tokens: int


class ResponsesUsage(Outgoing):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Failure(Outgoing):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class Incomplete(Outgoing):
    reason: Literal["max_output_tokens"]


class Response(Outgoing):
    """What was asked for, with the values that held, and what was answered. store: nothing is."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None
    status: Status
    error: Failure | None
    incomplete_details: Incomplete | None
    model: str
    output: list[OutputMessage | FunctionCall]
    usage: ResponsesUsage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None = None
    background: Literal[False] = False
    reasoning: dict[str, str | None]
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"


class InputTokens(Outgoing):
    """How long the dialogue is, without being answered."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int
