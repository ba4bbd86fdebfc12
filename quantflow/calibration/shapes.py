"""What a row of a data set says: a text, or a dialogue. The shapes are those that public data sets have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantflow.errors import DataError, Problem

Message = dict[str, Any]  # role and content, as chat templates want them

TEXTS = ("text", "content", "sentence", "document")
DIALOGUES = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "question", "query", "instruction", "input")  # in this order: the first that is there
GIVEN = ("input", "context")  # what an instruction is about
ANSWERS = ("response", "answer", "completion", "output", "chosen")
SYSTEMS = ("system", "system_prompt")
EXPECTED = (
    f"a string, or {' or '.join(TEXTS)}; {' or '.join(DIALOGUES[:2])}; prompt and response; instruction and output; chosen"
)  # fmt: skip

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "function_call": "assistant", "tool": "tool", "function": "tool",
    "observation": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "reasoning")  # of a message, beside role and content


@dataclass(frozen=True)
class Dialogue:
    """tools: as JSON schemas, where the row has some."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None


def read_row(row: Any, where: str, field: str | None = None) -> str | Dialogue:
    """The text or the dialogue of a row. field: where it stands, in place of what is usual. Raises DataError, which names the fields that
    are there."""
    if isinstance(row, str) and field is None:
        return row
    if not isinstance(row, dict):
        raise _refused(row, where, field)
    given = {key: value for key, value in row.items() if value is not None}
    if field is not None:
        value = given.get(field)
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            return Dialogue(_messages(value, f"{where} {field}"), _tools(given))
        raise _refused(row, where, field)
    texts = [str(given[name]) for name in TEXTS if isinstance(given.get(name), str)]
    if text := next((text for text in texts if text.strip()), None):
        return text
    for name in DIALOGUES:
        if isinstance(given.get(name), list):
            return Dialogue(_messages(given[name], f"{where} {name}"), _tools(given))
    found = _pair(given, where)
    if found is None and not texts:
        raise _refused(row, where, field)
    return found or ""


def _pair(row: dict[str, Any], where: str) -> str | Dialogue | None:
    """A question and its answer; the answer alone where it is a whole dialogue; or a prompt, where no other text is there."""
    question = next((name for name in QUESTIONS if isinstance(row.get(name), (str, list))), None)
    answer = next((name for name in ANSWERS if isinstance(row.get(name), (str, list))), None)
    if answer is None:
        texts = [name for name, value in row.items() if isinstance(value, str)]
        return str(row["prompt"]) if texts == ["prompt"] else None
    said = _said(row[answer], "assistant", f"{where} {answer}")
    asked = _said(row[question], "user", f"{where} {question}") if question else []
    if question == "instruction" and isinstance(row[question], str):
        parts = [row[question], *(row[name] for name in GIVEN if isinstance(row.get(name), str))]
        asked = [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}]
    if isinstance(row[answer], list) and said and said[0]["role"] != "assistant":
        asked = []  # which the answer has in it
    elif question is None:
        return str(row[answer]) if answer == "chosen" and isinstance(row[answer], str) else None
    system = next((row[name] for name in SYSTEMS if isinstance(row.get(name), str) and row[name].strip()), None)
    if system is not None and not any(message["role"] == "system" for message in (asked + said)[:1]):
        asked = [{"role": "system", "content": system}, *asked]
    return Dialogue(asked + said, _tools(row))


def _said(value: str | list[Any], role: str, where: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, where)


def _messages(turns: list[Any], where: str) -> list[Message]:
    return [_message(turn, f"{where}[{i}]") for i, turn in enumerate(turns)]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(Problem(where, repr(turn)[:80], "an object with role and content, or from and value"))
    who, what = ("role", "content") if turn.get("role") is not None else ("from", "value")
    if not isinstance(turn.get(who), str) or (what not in turn and "tool_calls" not in turn):
        raise DataError(Problem(where, f"an object with {_fields(turn)}", "role and content, or from and value"))
    role = ROLES.get(turn[who].lower())
    if role is None:
        raise DataError(Problem(f"{where} {who}", repr(turn[who])[:80], f"one of {', '.join(ROLES)}"))
    message = {"role": role, "content": _content(turn.get(what), f"{where} {what}")}
    kept = {key: turn[key] for key in _KEPT if turn.get(key) is not None}
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = [_call(call) for call in calls] if isinstance(calls, list) else calls
    return {**message, **kept}


def _content(value: Any, where: str) -> str:
    """A message's text, in one piece."""
    if value is None:
        return ""
    texts: list[str] = []
    for part in value if isinstance(value, list) else [value]:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            found = f"a part of type {part['type']}" if isinstance(part, dict) and "type" in part else repr(part)[:80]
            raise DataError(Problem(where, found, "text, or a list of parts of type text"))
        texts.append(text)
    return "".join(texts)


def _call(call: Any) -> Any:
    """A tool call with its arguments as an object, which templates write themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"] or "{}")}}
    except (ValueError, RecursionError):
        return call


def _tools(row: dict[str, Any]) -> Sequence[Mapping[str, Any]] | None:
    value = row.get("tools")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) and value and all(isinstance(tool, dict) for tool in value) else None


def _refused(row: Any, where: str, field: str | None) -> DataError:
    found = f"an object with {_fields(row)}" if isinstance(row, dict) else f"{_kind(row)} ({str(row)[:60]!r})"
    if field is not None:
        return DataError(Problem(where, found, f"text, or a dialogue, in the field {field}"))
    hint = "The setting `field: NAME` takes the text from another field" if isinstance(row, dict) and row else ""
    return DataError(Problem(where, found, EXPECTED, hint))


def _fields(row: Mapping[Any, Any]) -> str:
    shown = [f"{str(name)[:60]} ({_kind(value)})" for name, value in row.items()]
    return "the fields " + ", ".join(shown) if shown else "no fields"


def _kind(value: Any) -> str:
    kinds = {str: "text", bool: "yes or no", int: "number", float: "number", list: "list", dict: "object", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)
