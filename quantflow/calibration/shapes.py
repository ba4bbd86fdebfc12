"""What a row of a data set says: a text, or a conversation. The shapes are those that public data
sets have."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from quantflow.errors import DataError, Problem

Message = dict[str, Any]  # role and content, as chat templates want them

TEXTS = ("text", "content", "sentence", "document")
CONVERSATIONS = ("messages", "conversations", "conversation")
# in this order: the first that is there
QUESTIONS = ("prompt", "instruction", "question", "query", "input")
# what a question is about
GIVEN = ("question", "query", "input", "context", "passage", "content", "document", "sentence")
ANSWERS = ("response", "answer", "completion", "output", "chosen")
SYSTEMS = ("system", "system_prompt", "system_message")
EXPECTED = (
    f"a string, or {' or '.join(TEXTS)}; {' or '.join(CONVERSATIONS[:2])}; prompt and response;"
    " instruction and output; chosen"
)

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "function_call": "assistant", "tool": "tool", "function": "tool",
    "observation": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
_CELLS = {*CONVERSATIONS, "prompt", "completion", "chosen"}  # which may hold messages as JSON
_NAMES = {*TEXTS, *CONVERSATIONS, *QUESTIONS, *GIVEN, *ANSWERS, *SYSTEMS, "history", "tools"}
# of a message, beside role and content
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "reasoning")


class OddTurn(DataError):
    """A conversation with a turn that cannot be used: a part that is no text, a role that nobody
    knows."""


@dataclass(frozen=True)
class Conversation:
    """tools: as JSON schemas, where the row has some."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None


def read_row(row: Any, where: str, field: str | None = None) -> str | Conversation:
    """The text or the conversation of a row, "" where the fields that would hold it are null or
    blank. field: where it stands, in place of what is usual. A field's name may be in any case.
    Raises OddTurn, and DataError for a row of another shape, which names the fields that are
    there."""
    if isinstance(row, str) and field is None:
        return row
    if not isinstance(row, dict):
        raise _refused(row, where, field)
    original, row = row, _plainly_named(row, {field} if field is not None else _NAMES)
    filled = {
        key: value
        for key, value in row.items()
        if value is not None and not (isinstance(value, str) and not value.strip())
    }
    blank = row.keys() - filled.keys()
    result = _usual(filled, where, blank) if field is None else _of(filled, field, where)
    if result is None and not blank & ({field} if field is not None else _holders(filled)):
        raise _refused(original, where, field)
    return result or ""


def _plainly_named(row: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    """A row whose fields have those of the names that they have but for case and blanks around
    them, wherever one field alone has it."""
    if len(row) == len(names & row.keys()):
        return dict(row)
    plain = {name.strip().lower(): name for name in names}
    meant = {
        key: (
            plain.get(key.strip().lower(), key)
            if isinstance(key, str) and key not in names
            else key
        )
        for key in row
    }
    twice = {name for name, count in Counter(meant.values()).items() if count > 1}
    return {key if meant[key] in twice else meant[key]: value for key, value in row.items()}


def _usual(row: dict[str, Any], where: str, blank: Set[str]) -> str | Conversation | None:
    """What stands in the fields of public data sets. blank: the names of those without a value."""
    if isinstance(row.get("text"), str):
        return str(row["text"])
    row = {
        key: _turns(value) if key in _CELLS or isinstance(value, dict) else value
        for key, value in row.items()
    }
    for name in CONVERSATIONS:
        if isinstance(row.get(name), list):
            return _answered(_messages(row[name], f"{where} {name}"), row, where)
    if (pair := _pair(row, where)) is not None:
        return pair
    # a text: before the weaker names, one of which may be an id beside it
    for name in CONVERSATIONS:
        if isinstance(row.get(name), str):
            if row[name].strip() == "[]":
                return ""
            hint = (
                "Python's own spelling of a list is no JSON: write the column with json.dumps"
                if row[name].startswith("[{'")
                else ""
            )
            problem, expected = (
                f"a text ({row[name][:60]!r})",
                "a list of messages, as such or as JSON",
            )
            raise DataError(
                Problem(
                    f"{where} {name}",
                    problem,
                    expected,
                    hint or "The setting `field: NAME` takes it as a text",
                )
            )
    for name in TEXTS:  # after the pair: what it is about may have one of the weaker names
        if isinstance(row.get(name), str):
            return str(row[name])
    alone = [name for name, value in row.items() if isinstance(value, str)] == ["prompt"] and not (
        blank | row.keys()
    ) & set(ANSWERS)
    return str(row["prompt"]) if alone else None


def _of(row: dict[str, Any], name: str, where: str) -> str | Conversation | None:
    value = _turns(row.get(name))
    if isinstance(value, list):
        return _conversation(_messages(value, f"{where} {name}"), row)
    return value if isinstance(value, str) else None


def _turns(value: Any) -> Any:
    """A message by itself, or a text that is JSON of messages, as a table's cell holds them, as a
    list; anything else as it is."""
    decoded = value
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            decoded = json.loads(value)
        except (ValueError, RecursionError):
            return value
    turns = decoded if isinstance(decoded, list) else [decoded]
    return turns if turns and all(_is_turn(turn) for turn in turns) else value


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and (
        {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()
    )


def _answer(row: Mapping[str, Any]) -> str | None:
    """The name of the field with the answer."""
    return next((name for name in ANSWERS if isinstance(row.get(name), (str, list))), None)


def _answered(messages: list[Message], row: Mapping[str, Any], where: str) -> Conversation:
    """A dialogue, and behind it, where it ends with a question, the answer that the row holds apart
    from it."""
    name = _answer(row)
    if name is not None and messages and messages[-1]["role"] != "assistant":
        answer = _as_messages(row[name], "assistant", f"{where} {name}")
        messages = answer if answer and answer[0]["role"] != "assistant" else [*messages, *answer]
    return _conversation(messages, row)


def _holders(row: Mapping[str, Any]) -> set[str]:
    """The names of fields that hold a row's text, and without a value say that there is none: a
    question's only beside an answer, since an instruction's input is often blank."""
    answered = any(name in row for name in ANSWERS)
    return {*TEXTS, *CONVERSATIONS, *ANSWERS, "prompt", *(QUESTIONS if answered else ())}


def no_text(row: Any, where: str, field: str | None) -> DataError:
    """What is wrong with a data set all of whose rows are blank, of which this is one."""
    problems = _refused(row, where, field).problems
    return DataError(
        [replace(problem, found=f"{problem.found}, and no row with a text") for problem in problems]
    )


def _pair(row: dict[str, Any], where: str) -> str | Conversation | None:
    """A question and its answer; the answer alone where it is a whole conversation."""
    question = next((name for name in QUESTIONS if isinstance(row.get(name), (str, list))), None)
    answer = _answer(row)
    if answer is None:
        return None
    reply = _as_messages(row[answer], "assistant", f"{where} {answer}")
    if isinstance(row[answer], list) and reply and reply[0]["role"] != "assistant":
        return _conversation(reply, row)
    if question is None:
        return str(row[answer]) if answer == "chosen" and isinstance(row[answer], str) else None
    asked = _as_messages(row[question], "user", f"{where} {question}")
    about = [row[name] for name in GIVEN if name != question and isinstance(row.get(name), str)]
    if about and (not asked or asked[-1]["role"] != "user"):
        asked.append({"role": "user", "content": ""})
    for text in about:
        said_before = asked[-1]["content"]
        if text not in said_before:  # a prompt may have been made of it
            asked[-1] = {
                **asked[-1],
                "content": f"{said_before}\n\n{text}" if said_before.strip() else text,
            }
    opening = [message for message in asked[:1] if message["role"] == "system"]
    before = _history(row.get("history"), f"{where} history")
    return _conversation([*opening, *before, *asked[len(opening) :], *reply], row)


def _history(value: Any, where: str) -> list[Message]:
    """The turns before the question: pairs, as Alpaca's descendants have them, or messages."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise OddTurn(Problem(where, repr(value)[:80], "a list of [question, answer]"))
    turns: list[Message] = []
    for i, turn in enumerate(value):
        if (
            isinstance(turn, list)
            and len(turn) == 2
            and all(isinstance(text, str) for text in turn)
        ):
            turns += [
                {"role": "user", "content": turn[0]},
                {"role": "assistant", "content": turn[1]},
            ]
        else:
            turns.append(_message(turn, f"{where}[{i}]"))
    return turns


def _conversation(messages: list[Message], row: Mapping[str, Any]) -> Conversation:
    """With the row's system text first, unless a system message is there; and with its tools."""
    system = next((row[name] for name in SYSTEMS if isinstance(row.get(name), str)), None)
    if system is not None and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Conversation(messages, _tools(row))


def _as_messages(value: str | list[Any], role: str, where: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, where)


def _messages(turns: list[Any], where: str) -> list[Message]:
    return [_message(turn, f"{where}[{i}]") for i, turn in enumerate(turns)]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise OddTurn(
            Problem(where, repr(turn)[:80], "an object with role and content, or from and value")
        )
    role_key, content_key = (
        ("role", "content") if turn.get("role") is not None else ("from", "value")
    )
    if not isinstance(turn.get(role_key), str) or (
        content_key not in turn and "tool_calls" not in turn
    ):
        raise OddTurn(
            Problem(where, f"an object with {_fields(turn)}", "role and content, or from and value")
        )
    role = ROLES.get(turn[role_key].lower())
    if role is None:
        raise OddTurn(
            Problem(f"{where} {role_key}", repr(turn[role_key])[:80], f"one of {', '.join(ROLES)}")
        )
    message = {"role": role, "content": _content(turn.get(content_key), f"{where} {content_key}")}
    kept = {key: turn[key] for key in _KEPT if turn.get(key) is not None}
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = [_call(call) for call in calls] if isinstance(calls, list) else calls
    return {**message, **kept}


def _content(value: Any, where: str) -> str:
    """A message's text, in one piece."""
    if value is None:
        return ""
    parts: list[str] = []
    for part in value if isinstance(value, list) else [value]:
        text = (
            part.get("text")
            if isinstance(part, dict) and part.get("type", "text") == "text"
            else part
        )
        if not isinstance(text, str):
            problem = (
                f"a part of type {part['type']}"
                if isinstance(part, dict) and "type" in part
                else repr(part)[:80]
            )
            raise OddTurn(Problem(where, problem, "text, or a list of parts of type text"))
        parts.append(text)
    return "".join(parts)


def _call(call: Any) -> Any:
    """A tool call with its arguments as an object, which templates write themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {
            **call,
            "function": {**function, "arguments": json.loads(function["arguments"] or "{}")},
        }
    except (ValueError, RecursionError):
        return call


def _tools(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]] | None:
    value = row.get("tools")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return (
        value
        if isinstance(value, list) and value and all(isinstance(tool, dict) for tool in value)
        else None
    )


def _refused(row: Any, where: str, field: str | None) -> DataError:
    problem = (
        f"an object with {_fields(row)}"
        if isinstance(row, dict)
        else f"{_kind(row)} ({str(row)[:60]!r})"
    )
    if field is not None:
        return DataError(Problem(where, problem, f"text, or a dialogue, in the field {field}"))
    hint = (
        "The setting `field: NAME` takes the text from another field"
        if isinstance(row, dict) and row
        else ""
    )
    return DataError(Problem(where, problem, EXPECTED, hint))


def _fields(row: Mapping[Any, Any]) -> str:
    shown = [f"{str(name)[:60]} ({_kind(value)})" for name, value in row.items()]
    return "the fields " + ", ".join(shown) if shown else "no fields"


def _kind(value: Any) -> str:
    kinds = {
        str: "text",
        bool: "yes or no",
        int: "number",
        float: "number",
        list: "list",
        dict: "object",
        type(None): "null",
    }
    return kinds.get(type(value), type(value).__name__)
