"""From the items of /v1/responses to the messages of a dialogue, and from its words to those of
chat completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantflow.serve.dialect import chat_request
from quantflow.serve.errors import Refused
from quantflow.serve.requests import ChatRequest
from quantflow.serve.responses.protocol import (
    LOGPROBS,
    AllowedTools,
    CallItem,
    Item,
    NamedTool,
    OutputItem,
    ReasoningItem,
    RefusalPart,
    ResponsesRequest,
    TextPart,
)
from quantflow.serve.wire import Object

RENAMED = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""What this API calls the parameters of chat completions and the engine's arguments."""

SAME = (
    "model", "temperature", "top_p", "parallel_tool_calls", "stream", "seed", "top_k", "min_p",
    "repetition_penalty", "ignore_eos", "chat_template_kwargs",
)  # fmt: skip
SYSTEM = ("system", "developer")
# what the assistant says in one go, in this order
TURN = ("reasoning_content", "content", "tool_calls")


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same request in the words of chat completions. Raises Refused."""
    parameters: Object = {name: getattr(body, name) for name in SAME}
    parameters["messages"] = messages(body.instructions, body.input)
    parameters["max_tokens"] = body.max_output_tokens
    if wants_logprobs(body):
        parameters |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if body.text and body.text.format:
        parameters["response_format"] = _format(
            body.text.format.model_dump(by_alias=True, exclude_none=True)
        )
    if body.reasoning and body.reasoning.effort:
        parameters["reasoning_effort"] = body.reasoning.effort
    if body.tools:
        keep = {"name", "description", "parameters", "strict"}
        parameters["tools"] = [
            {"type": "function", "function": tool.model_dump(include=keep, exclude_none=True)}
            for tool in body.tools
        ]
    parameters["tool_choice"] = _choice(body.tool_choice)
    return chat_request(parameters)


def wants_logprobs(body: ResponsesRequest) -> bool:
    return bool(body.top_logprobs) or LOGPROBS in (body.include or ())


def messages(instructions: str | None, items: Sequence[Item]) -> list[Object]:
    """What the assistant said in one go, in several items, is one message; so are the instructions
    and the system messages at the beginning, since many templates want a single one there."""
    result: list[Object] = [{"role": "system", "content": instructions}] if instructions else []
    for item in items:
        if isinstance(item, OutputItem):
            result.append(
                {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
            )
        elif isinstance(item, CallItem):
            function = {"name": item.name, "arguments": item.arguments}
            _turn(result, "tool_calls").setdefault("tool_calls", []).append(
                {"id": item.call_id, "type": "function", "function": function}
            )
        elif isinstance(item, ReasoningItem):
            _turn(result, "reasoning_content")["reasoning_content"] = "\n".join(
                part.text for part in item.content or item.summary or ()
            )
        elif item.role == "assistant":
            _turn(result, "content")["content"] = _text(item.content)
        elif item.role in SYSTEM and len(result) == 1 and result[0]["role"] in SYSTEM:
            result[0]["content"] += f"\n\n{_text(item.content)}"
        else:
            result.append({"role": item.role, "content": _text(item.content)})
    return result


def _turn(dialogue: list[Object], part: str) -> Object:
    """The message of the assistant's that this part belongs to: the last one, where nothing in it
    comes after such a part."""
    later = TURN[TURN.index(part) :] if part != "tool_calls" else ()
    if (
        not dialogue
        or dialogue[-1]["role"] != "assistant"
        or any(name in dialogue[-1] for name in later)
    ):
        dialogue.append({"role": "assistant"})
    return dialogue[-1]


def _text(content: str | Sequence[TextPart | RefusalPart]) -> str:
    return (
        content
        if isinstance(content, str)
        else "".join(p.refusal if isinstance(p, RefusalPart) else p.text for p in content)
    )


def _format(form: Object) -> Object:
    """Raises Refused."""
    kind, schema = form.pop("type"), form.get("schema")
    if kind != "json_schema":
        if form:
            message = f"text.format: {next(iter(form))} with type {kind}; expected type json_schema"
            raise Refused(400, message, param="text.format", code="invalid_value")
        return {"type": kind}
    if schema is None or "name" not in form:
        missing = "schema" if schema is None else "name"
        raise Refused(
            400,
            f"text.format: no {missing}; expected one beside its type",
            param="text.format",
            code="invalid_value",
        )
    return {"type": kind, "json_schema": form}


def _choice(choice: Any) -> Any:
    if isinstance(choice, NamedTool):
        return {"type": "function", "function": {"name": choice.name}}
    if isinstance(choice, AllowedTools):
        tools = [{"type": "function", "function": {"name": tool.name}} for tool in choice.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}
    return choice
