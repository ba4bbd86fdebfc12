"""Tools: how a family's models write that they want one called, and how it is read out of their
text.

A model's chat template says which way is its own: its words for it stand in the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import urldefrag, urljoin

from quantflow.engine.grammar import INNER
from quantflow.tokenizers.dialogue import ChatTemplate

MOST_CALLS = 16  # that must be made at once


@dataclass(frozen=True)
class ToolFormat:
    """begin, end: what stands around a call; "": nothing. many: a list of calls stands there.
    arguments: what their name is.
    bare: a text may be a call with nothing around it, of one of `functions`, which a request
    brings. sign: what a template of this format has in it; others: what those of others have beside
    it."""

    name: str
    sign: str
    begin: str
    end: str
    arguments: str = "arguments"
    many: bool = False
    bare: bool = False
    others: tuple[str, ...] = ()
    functions: frozenset[str] = frozenset()


FORMATS = (
    # Hermes 2 Pro, Qwen 2.5 and 3; not those with XML inside
    ToolFormat(
        "hermes", "<tool_call>", "<tool_call>", "</tool_call>", others=("<function=", "<arg_key>")
    ),
    ToolFormat("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", "", many=True, others=("[ARGS]",)),
    ToolFormat("llama3", "<|python_tag|>", "<|python_tag|>", "", arguments="parameters", bare=True),
)


@dataclass(frozen=True)
class Call:
    """arguments: as JSON."""

    name: str
    arguments: str


Part = str | Call  # of an answer: text that is shown, or a call


def tool_format(template: ChatTemplate | None) -> ToolFormat | None:
    """The format that a chat template speaks of; None where it knows no tools."""
    text = template.tool_use if template else None
    if text is None or "tools" not in text:
        return None
    return next(
        (f for f in FORMATS if f.sign in text and not any(other in text for other in f.others)),
        None,
    )


# Of JSON: what may stand outside of its strings, and inside one.
OUTSIDE = re.compile(r"[\sA-Za-z0-9{}\[\],:+.-]*+")
INSIDE = re.compile(r'(?:[^"\\\x00-\x1f]|\\.)*+')


class _End:
    """Looks for the mark that ends a call in a text that grows: one in a string of its JSON is part
    of that string. Where the text is no JSON, it is the first, wherever that stands."""

    def __init__(self, mark: str) -> None:
        self._mark, self._at, self._string, self._json = mark, 0, False, True

    def give_up(self) -> None:
        """The text is no JSON: a string in it has no end, say."""
        self._json, self._at = False, 0

    def find(self, text: str) -> int:
        """Where the mark stands; -1: not yet known. Every letter is looked at twice at most,
        however the text comes."""
        while self._json:
            self._at = (INSIDE if self._string else OUTSIDE).match(text, self._at).end()  # type: ignore[union-attr]
            rest = text[self._at : self._at + len(self._mark)]
            if rest[:1] == '"':
                self._at, self._string = self._at + 1, not self._string
            elif rest in ("\\" if self._string else self._mark, ""):
                return self._at if rest == self._mark else -1
            elif self._string or not self._mark.startswith(rest):
                self.give_up()
            else:
                return -1
        position = text.find(self._mark, self._at)
        self._at = max(self._at, len(text) - len(self._mark) + 1)
        return position


class ToolReader:
    """Splits a text, as it comes, into what is shown and the calls in it. What may be the beginning
    of a call is held back; what looks like one and is none is shown as it is."""

    def __init__(self, format: ToolFormat) -> None:
        self.format = format
        self._held = ""
        self._inside = False
        self._end = _End(format.end)  # of the call that has begun
        self._any = False  # call so far
        self._any_text = False  # whether there was text beside calls

    def add(self, text: str) -> list[Part]:
        """What can be shown by now and the calls that are complete, in their order."""
        self._held += text
        parts = list[Part]()
        while not self._bare:
            if not self._inside:
                before, begin, after = self._held.partition(self.format.begin)
                keep = 0 if begin else _may_begin(before, self.format.begin)
                parts.append(self._between(before[: len(before) - keep]))
                self._held, self._inside = (
                    after if begin else before[len(before) - keep :],
                    bool(begin),
                )
                if not begin:
                    break
                self._end = _End(self.format.end)
            end = self._end.find(self._held) if self.format.end else -1
            if end < 0:
                break
            inner, after = self._held[:end], self._held[end + len(self.format.end) :]
            calls = self._calls(inner)
            if not calls and self.format.end in inner:
                self._end.give_up()
                continue
            parts += calls or [self.format.begin + inner + self.format.end]
            self._held, self._inside, self._any = after, False, self._any or bool(calls)
        self._any_text |= any(isinstance(part, str) and part.strip() for part in parts)
        return parts

    def finish(self) -> list[Part]:
        """What is left once the text is complete. A call is one without its end, too."""
        parts = list[Part]()
        while (
            self._inside
            and not self._calls(self._unended)
            and self.format.end
            and self.format.end in self._held
        ):
            self._end.give_up()
            parts += self.add("")
        calls = self._calls(self._unended) if self._inside or self._bare else []
        if not self._inside and not {call.name for call in calls} <= self.format.functions:
            calls = []  # an object that happens to have a name
        shown = self.format.begin + self._held if self._inside else self._between(self._held)
        self._held = ""
        return [*parts, *calls] if calls else [*parts, shown]

    @property
    def _unended(self) -> str:
        """What is held, without the beginning of the mark that would have ended it."""
        return self._held[: len(self._held) - _may_begin(self._held, self.format.end)]

    @property
    def _bare(self) -> bool:
        """Whether all there is so far may be a call without anything around it, as Llama 3 writes
        them."""
        return (
            self.format.bare
            and not (self._any or self._any_text or self._inside)
            and self._held.lstrip()[:1] in ("", "{")
        )

    def _between(self, text: str) -> str:
        """Line breaks between calls are no answer."""
        return text if text.strip("\n") or not self._any else ""

    def _calls(self, text: str) -> list[Call]:
        """[] where the text is no call."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        items = value if isinstance(value, list) and self.format.many else [value]
        calls = []
        for item in items:
            if not isinstance(item, dict) or not isinstance(item.get("name"), str):
                return []
            arguments = item.get(self.format.arguments, item.get("arguments", {}))
            calls.append(
                Call(
                    item["name"],
                    arguments
                    if isinstance(arguments, str)
                    else json.dumps(arguments, ensure_ascii=False),
                )
            )
        return calls


class Reading:
    """A text as it comes, whether tools were given or not. format: None: it has no calls. most:
    calls after those are dropped."""

    def __init__(self, format: ToolFormat | None, most: int | None = None) -> None:
        self.calls = 0
        self._reader, self._most = ToolReader(format) if format else None, most

    def add(self, text: str, *, last: bool) -> list[Part]:
        """What of it can be shown by now and the calls that are complete, in their order. last:
        nothing follows."""
        if self._reader is None:
            return [text] if text else []
        parts = list[Part]()
        for part in self._reader.add(text) + (self._reader.finish() if last else []):
            if isinstance(part, Call):
                if self._most is None or self.calls < self._most:
                    self.calls += 1
                    parts.append(part)
            elif part and parts and isinstance(parts[-1], str):
                parts[-1] += part
            elif part:
                parts.append(part)
        return parts


def apart(parts: Iterable[Part]) -> tuple[str, list[Call]]:
    """The text and the calls, for an API that has a place for each."""
    parts = list(parts)
    return "".join(part for part in parts if isinstance(part, str)), [
        part for part in parts if isinstance(part, Call)
    ]


def _may_begin(text: str, word: str) -> int:
    """Letters at the end of `text` that are the beginning of `word`."""
    return next(
        (n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0
    )


class Opening(StrEnum):
    """What a text may be. calls: nothing else. text: anything, with calls in it. answer: calls, or
    what stands for `@inner`."""

    calls = "calls"
    text = "text"
    answer = "answer"


@dataclass(frozen=True)
class Callee:
    """A function that may be called. parameters: the schema of its arguments; None: any object."""

    name: str
    parameters: dict[str, Any] | None


def lark(
    format: ToolFormat, callees: Sequence[Callee], token: int | None, opening: Opening, *, most: int
) -> str:
    """A grammar of texts with calls of these functions, `most` at most, with arguments that follow
    their schemas; where it is one, the text ends with it. token: the id of `begin`, where it is a
    special token. Raises RecursionError for schemas nested too deep."""
    words = re.escape(format.begin).replace("/", "\\/")
    begin, line = (
        f"<[{token}]>" if token is not None else json.dumps(format.begin),
        json.dumps("\n"),
    )
    rules = [f"json: %json {json.dumps(_schema(format, callees, most))}"]
    if format.end:
        rules.append(f"call: {begin} inside")
        rules.append(f"inside: {line} json {line} {json.dumps(format.end)}")
        calls = f"call ({line} call){{0,{most - 1}}}" if most > 1 else "call"
    else:
        rules.append(f"""inside: {'" "? ' if format.many else ""}json""")
        calls = f"{begin}? inside" if format.bare else f"{begin} inside"
        most = 1  # the rest of the text is that list
    if opening == Opening.text:
        # What is no call has no such words in it, whatever tokens they are made of. Begun, they
        # must go on as a call.
        space = r"[\s\x1c-\x1f]*"
        free = rf"{space}([^\s\x1c-\x1f{{](?s:.*))?" if format.bare else "(?s:.*)"
        rules.append(f"FREE: /{free}/ & ~/(?s:.*){words}(?s:.*)/")
        if token is not None:
            rules.append(f"said: FREE {begin}")
        else:
            rules.append(f"said[lazy]: /{free}{words}/")
        calls = f"(said inside){{0,{most}}} FREE" if most > 1 else "said inside | FREE"
        if format.bare:
            calls = f"inside | {calls}"
    return "\n".join(
        [f"start: {calls}" + (f" | @{INNER}" if opening == Opening.answer else ""), *rules, ""]
    )


def _schema(format: ToolFormat, callees: Sequence[Callee], most: int) -> dict[str, Any]:
    """Of what stands between `begin` and `end`."""
    schemas = [
        {
            "type": "object",
            "properties": {
                "name": {"const": f.name},
                format.arguments: {"$ref": f"#/$defs/{f.name}"},
            },
            "required": ["name", format.arguments],
            "additionalProperties": False,
        }
        for f in callees
    ]
    schema: dict[str, Any] = {"anyOf": schemas}
    if format.many:
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": most}
    schema["$defs"] = {
        f.name: _placed(f.parameters or {"type": "object"}, f"#/$defs/{f.name}") for f in callees
    }
    # As models were taught to write it, with or without spaces: patterns, both.
    schema["x-guidance"] = {
        "whitespace_flexible": False,
        "item_separator": ", ?",
        "key_separator": ": ?",
    }
    return schema


DATA = ("const", "enum", "default", "examples")  # not schemas
# Schemas by names, which are no words of a schema, whatever they look like.
BY_NAME = (
    "properties",
    "patternProperties",
    "$defs",
    "definitions",
    "dependentSchemas",
    "dependencies",
)


def _placed(schema: dict[str, Any], place: str) -> Any:
    """A schema as part of another, at `place`. Its own name (`$id`; in drafts before the sixth,
    `id`) is left out: the same may be that of another function's."""
    word = "id" if re.search(r"draft-0[34]", str(schema.get("$schema"))) else "$id"
    name = schema.get(word)
    if not isinstance(name, str):
        return _moved(schema, place, "")
    return _moved(
        {key: value for key, value in schema.items() if key != word}, place, urldefrag(name)[0]
    )


def _moved(schema: Any, place: str, base: str) -> Any:
    """A schema whose references, which begin at its own root, begin at another's, where it stands
    at `place`. base: what its root was called; "": nothing."""
    if isinstance(schema, list):
        return [_moved(item, place, base) for item in schema]
    if not isinstance(schema, dict):
        return schema
    name = schema.get("$id")
    # a root of its own, at which its references begin
    if isinstance(name, str) and not name.startswith("#"):
        return {**schema, "$id": _own(place, _resolved(base, name))}
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in BY_NAME and isinstance(value, dict):
            result[key] = {word: _moved(part, place, base) for word, part in value.items()}
        else:
            result[key] = value if key in DATA else _moved(value, place, base)
    reference = result.get("$ref")
    if isinstance(reference, str):
        whole = _resolved(base, reference)
        if base and (whole == base or whole.startswith(base + "#")):
            whole = "#" + whole[len(base) + 1 :]
        if whole == "#" or whole.startswith("#/"):
            whole = place + whole[1:]
        elif whole.startswith("#"):
            whole = "#" + _anchor(place, whole[1:])
        else:
            whole = _own(place, whole)
        result["$ref"] = whole
    anchor = result.get("$anchor")
    if isinstance(anchor, str):
        result["$anchor"] = _anchor(place, anchor)
    if isinstance(name, str):  # an anchor, before draft 2019-09
        result["$anchor"] = _anchor(place, name[1:])
        del result["$id"]
    return result


def _own(place: str, name: str) -> str:
    """What a part is called within one function's schema; relative references in it stay what they
    are."""
    return f"tool:/{place.rpartition('/')[2]}/{name}"


def _anchor(place: str, name: str) -> str:
    """One of two functions may have the name of another's."""
    return f"_{place.rpartition('/')[2]}.{name}"


def _resolved(base: str, reference: str) -> str:
    """An absolute reference, or one within the schema (`#...`)."""
    try:
        return reference if reference.startswith("#") else urljoin(base, reference)
    except ValueError:  # no address; whoever compiles it says so
        return reference
