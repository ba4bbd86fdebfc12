"""What the server answers: OpenAI's answers, and LMDeploy's where they differ."""

from __future__ import annotations

from typing import Literal

from quantflow.serve.protocol import Outgoing


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
