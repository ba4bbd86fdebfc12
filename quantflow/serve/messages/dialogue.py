"""From the blocks of /v1/messages to the messages of a dialogue, and from its words to those of
chat completions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from quantflow.serve.dialect import chat_request
from quantflow.serve.errors import NO_THREAD, Refused
from quantflow.serve.messages.protocol import (
    CountRequest,
    MessagesRequest,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from quantflow.serve.requests import ChatRequest
from quantflow.serve.wire import Object

RENAMED = {
    "prompt": "messages", "stop": "stop_sequences", "response_format": "output_config.format",
    "parallel_tool_calls": "tool_choice", "continue_final_message": "messages",
}  # fmt: skip
"""What this API calls the parameters of chat completions and the engine's arguments."""

SAME = ("temperature", "top_p", "top_k", "stream", "max_tokens")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# Claude Code's, for Anthropic's books: another each time, so that no beginning would be known
BILLING = "x-anthropic-billing-header:"


def as_chat(body: CountRequest) -> ChatRequest:
    """The same request in the words of chat completions. Raises Refused."""
    if body.thread is not None:
        message = (
            "thread: nothing is stored here; expected none, and the whole dialogue as messages"
        )
        raise Refused(400, message, param="thread", code=NO_THREAD)
    parameters: Object = {"model": body.model, "messages": messages(body.system, body.messages)}
    if isinstance(body, MessagesRequest):
        parameters |= {name: getattr(body, name) for name in SAME} | {
            "stop": body.stop_sequences or None
        }
    if parameters["messages"][-1]["role"] == "assistant":
        parameters["continue_final_message"] = True
    if body.output_config and body.output_config.format:
        schema = {"name": "format", "schema": body.output_config.format.schema_}
        parameters["response_format"] = {"type": "json_schema", "json_schema": schema}
    variables: Object = {}  # to a template that knows the words
    if body.thinking and body.thinking.type == "disabled":
        variables |= {"enable_thinking": False, "thinking": False}
    if body.output_config and body.output_config.effort:
        variables["reasoning_effort"] = body.output_config.effort
    if variables:
        parameters["chat_template_kwargs"] = variables
    if body.tools:
        parameters["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": t.name,
                    "description": t.description,
                    "parameters": t.input_schema,
                    "strict": t.strict,
                },
            }
            for t in body.tools
        ]
    if body.tool_choice:
        parameters |= _choice(body.tool_choice)
    return chat_request(parameters)


def _choice(choice: ToolChoice) -> Object:
    if (choice.type == "tool") != (choice.name is not None):
        message = (
            f"tool_choice: type {choice.type} {'with' if choice.name else 'without'} a name; "
            "expected one with type tool"
        )
        raise Refused(400, message, param="tool_choice", code="invalid_value")
    named = {"type": "function", "function": {"name": choice.name}}
    parallel = (
        None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use
    )
    return {"tool_choice": CHOICES.get(choice.type, named), "parallel_tool_calls": parallel}


def messages(system: str | Sequence[TextBlock] | None, turns: Sequence[Turn]) -> list[Object]:
    """Turns of one speaker that follow each other are one. Raises Refused."""
    parts = [
        message
        for number, turn in enumerate(turns)
        for message in _parts(turn, f"messages[{number}]")
    ]
    if not parts:
        nothing = (
            "messages: nothing is said in them; expected a text, a call of a tool or its result"
        )
        raise Refused(400, nothing, param="messages", code="invalid_value")
    result: list[Object] = []
    system_text = _system(system)
    if system_text:
        result.append({"role": "system", "content": system_text})
    for message in parts:
        last = result[-1] if result else message
        if last is not message and message["role"] == last["role"] != "tool":
            _join(last, message)
        else:
            result.append(message)
    return result


def _system(system: str | Sequence[TextBlock] | None) -> str:
    blocks = (
        [system or ""]
        if isinstance(system, (str, type(None)))
        else [block.text for block in system]
    )
    return "".join(text for text in blocks if not text.startswith(BILLING))


def _join(last: Object, message: Object) -> None:
    for name in ("content", "reasoning_content"):
        if message.get(name):
            last[name] = f"{last[name]}\n\n{message[name]}" if last.get(name) else message[name]
    if message.get("tool_calls"):
        last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]


def _parts(turn: Turn, where: str) -> Iterator[Object]:
    """The messages of a turn: results of tools have one each."""
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
        return
    message: Object = {"role": turn.role, "content": ""}
    for number, block in enumerate(turn.content):
        if isinstance(block, TextBlock):
            message["content"] += block.text
        elif isinstance(block, ToolResultBlock):
            _check(turn, "user", block.type, f"{where}.content[{number}]")
            if message["content"]:
                yield message
                message = {"role": turn.role, "content": ""}
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)}
        else:
            _check(turn, "assistant", block.type, f"{where}.content[{number}]")
            _add(message, block)
    if len(message) > 2 or message["content"] or not turn.content:
        yield message


def _add(message: Object, block: ToolUseBlock | ThinkingBlock | RedactedThinkingBlock) -> None:
    """Thoughts that nobody but Anthropic can read are left out."""
    if isinstance(block, ToolUseBlock):
        function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
        message.setdefault("tool_calls", []).append(
            {"id": block.id, "type": "function", "function": function}
        )
    elif isinstance(block, ThinkingBlock):
        message["reasoning_content"] = message.get("reasoning_content", "") + block.thinking


def _result(block: ToolResultBlock) -> str:
    """Dialogues have no other place for the news that a tool failed."""
    content = block.content or ""
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    return f"Error: {text}" if block.is_error else text


def _check(turn: Turn, role: str, kind: str, where: str) -> None:
    if turn.role != role:
        message = (
            f"{where}: {kind} in a message of role {turn.role}; expected it in one of role {role}"
        )
        raise Refused(400, message, param=where, code="invalid_value")


def tool_input(arguments: str) -> dict[str, Any]:
    """The arguments of a call as this API has them, an object, whatever the model wrote."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = arguments
    return value if isinstance(value, dict) else {"arguments": value}
