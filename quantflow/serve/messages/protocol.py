"""The messages of /v1/messages, Anthropic's. What comes in is turned into a dialogue by
`serve/messages/dialogue.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from quantflow.serve import fields
from quantflow.serve.fields import ANY, LABEL, SWITCH, Foreign, known_types, only
from quantflow.serve.protocol import (
    MOST_MESSAGES,
    MOST_TOOLS,
    Incoming,
    Name,
    Outgoing,
    Probability,
    StopStrings,
    ToolName,
)

_THOUGHTS = only(hint="Use thinking, or output_config.effort")

# Parameters that are not read, Anthropic's and those of others who serve this API, and the values
# of each that change nothing.
REQUEST: dict[str, Foreign] = {
    **fields.DIALOGUE,
    "max_completion_tokens": only(hint="Use max_tokens"),
    "stop": only([], hint="Use stop_sequences"),
    "parallel_tool_calls": only(True, hint="Use tool_choice"),
    **dict.fromkeys(
        ("grammar", "regex", "ebnf", "json_schema"), only("", hint="Use output_config.format")
    ),
    "response_format": only({"type": "text"}, hint="Use output_config.format"),
    **dict.fromkeys(("reasoning_effort", "enable_thinking"), _THOUGHTS),
    "chat_template_kwargs": only({}, hint=_THOUGHTS.hint),
    "continue_final_message": only(
        hint="An answer goes on where the last message is the assistant's"
    ),
    # Anthropic's own
    "cache_control": ANY,  # beginnings that were seen before are found without
    "metadata": Foreign(
        Annotated[dict[str, Annotated[str, Field(max_length=4096)] | None], Field(max_length=16)],
        "at most 16 labels",
    ),
    **dict.fromkeys(("service_tier", "speed", "diagnostics"), ANY),
    **dict.fromkeys(("inference_geo", "user_profile_id"), LABEL),
    "container": only(hint="No code is run here"),
    "mcp_servers": only([], hint="The server calls nobody"),
    **dict.fromkeys(("billing_policy", "fallback_credit_token"), ANY),
    "fallbacks": only([]),
    "compaction": only(hint="Leave out what the model's context has no room for"),
    "context_management": only(
        {}, {"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    ),
}
TOOL: dict[str, Foreign] = {
    "cache_control": ANY,
    "eager_input_streaming": SWITCH,
    "defer_loading": only(False),
    "allowed_callers": only(["direct"]),
    "input_examples": only([], hint="Put them into the description"),
}
BLOCK: dict[str, Foreign] = {
    "cache_control": ANY,
    "citations": only([]),
    "toolset_name": only(),
    "caller": only({"type": "direct"}),
}

if TYPE_CHECKING:  # they are made of the tables
    RequestFields = Incoming
    ToolFields = Incoming
    BlockFields = Incoming
else:
    RequestFields, ToolFields, BlockFields = (
        fields.extended(Incoming, table) for table in (REQUEST, TOOL, BLOCK)
    )


# --- requests


class TextBlock(BlockFields):
    type: Literal["text"]
    text: str


class ToolUseBlock(BlockFields):
    """A tool that the model called."""

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, Any]


Texts = Annotated[
    list[Annotated[TextBlock, known_types("blocks", "text", media=True)]],
    Field(max_length=MOST_MESSAGES, fail_fast=True),
]


class ToolResultBlock(BlockFields):
    """What a tool that was called gave back."""

    type: Literal["tool_result"]
    tool_use_id: Name
    content: str | Texts | None = None
    is_error: bool | None = None


class ThinkingBlock(BlockFields):
    """What the model thought before it answered. signature: of another server's making, which is
    not to be checked here."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(BlockFields):
    """Thoughts that only Anthropic's server can read."""

    type: Literal["redacted_thinking"]
    data: str


BLOCKS = {
    "text": "Text",
    "tool_use": "ToolUse",
    "tool_result": "ToolResult",
    "thinking": "Thinking",
    "redacted_thinking": "Redacted",
}


def _block(value: Any) -> str:
    return BLOCKS.get(
        str(value.get("type") if isinstance(value, dict) else getattr(value, "type", None)), "Text"
    )


Block = Annotated[
    Annotated[TextBlock, Tag("Text")]
    | Annotated[ToolUseBlock, Tag("ToolUse")]
    | Annotated[ToolResultBlock, Tag("ToolResult")]
    | Annotated[ThinkingBlock, Tag("Thinking")]
    | Annotated[RedactedThinkingBlock, Tag("Redacted")],
    Discriminator(_block),
    known_types("blocks", *BLOCKS, media=True),
]


class Turn(Incoming):
    """A message of the dialogue so far."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(max_length=MOST_MESSAGES, fail_fast=True)]


class Tool(ToolFields):
    """A tool of the client's."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(Incoming):
    """any: some tool must be called; tool: the one that is named."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class JsonFormat(Incoming):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Incoming):
    """effort: a hint. format: what the text must be."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class Thinking(Incoming):
    """disabled: a template that knows the word is told so. adaptive: the model thinks as it was
    trained to, and its thoughts stand in the text. display: of those in a block of their own."""

    type: Literal["disabled", "adaptive"]
    display: Literal["summarized", "omitted"] | None = None


class CountRequest(RequestFields):
    """What a request would begin with. thread: refused in words by which the client knows to go on
    without."""

    model: Name | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    system: str | Texts | None = None
    tools: (
        Annotated[
            list[Annotated[Tool, known_types("tools", "custom")]],
            Field(max_length=MOST_TOOLS, fail_fast=True),
        ]
        | None
    ) = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    thinking: Annotated[Thinking, known_types("thoughts", "disabled", "adaptive")] | None = None
    thread: Any = None


class MessagesRequest(CountRequest):
    """max_tokens: where the model's context has no room for so many, the answer ends with it."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop_sequences: StopStrings | None = None


# --- responses


class ErrorDetails(Outgoing):
    error_code: str


class ErrorBody(Outgoing):
    type: str
    message: str
    details: ErrorDetails | None = None


class ErrorResponse(Outgoing):
    type: Literal["error"] = "error"
    error: ErrorBody
    request_id: str


class Usage(Outgoing):
    """input_tokens: without those that the prefix cache held, cache_read_input_tokens."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class TextAnswer(Outgoing):
    type: Literal["text"] = "text"
    text: str
    citations: None = None


class ToolUse(Outgoing):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


class MessageResponse(Outgoing):
    """content: never empty. stop_sequence: the one that was found. model_context_window_exceeded:
    fewer than max_tokens fitted."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextAnswer | ToolUse]
    stop_reason: Literal[
        "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
    ]
    stop_sequence: str | None
    usage: Usage


class Count(Outgoing):
    input_tokens: int
