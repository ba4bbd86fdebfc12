"""How answers are written: JSON, and server-sent events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from pydantic_core import PydanticSerializationError, to_json
from starlette.responses import Response

Object = dict[str, Any]  # as JSON has it

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
PIECE = 64  # values of a list that are written at once


def encode(content: Any) -> bytes:
    """JSON of any Unicode text; what is no text, half a surrogate pair that a client sent, becomes
    a question mark."""
    try:
        return to_json(content)
    except PydanticSerializationError:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "replace"
        )


def encode_large(content: Any) -> bytes:
    """The same, for another thread than the loop's: nothing that it calls keeps the interpreter for
    long."""
    return b"".join(_pieces(content))


def _pieces(content: Any) -> Iterator[bytes]:
    if isinstance(content, dict):
        for number, (name, value) in enumerate(content.items()):
            yield (b"," if number else b"{") + encode(name) + b":"
            yield from _pieces(value)
        yield b"}" if content else b"{}"
    elif isinstance(content, (list, tuple)) and len(content) > PIECE:
        for at in range(0, len(content), PIECE):
            yield (b"," if at else b"[") + encode(content[at : at + PIECE])[1:-1]
        yield b"]"
    elif isinstance(content, (list, tuple)):
        for number, value in enumerate(content):
            yield b"," if number else b"["
            yield from _pieces(value)
        yield b"]" if content else b"[]"
    else:
        yield encode(content)


def event(content: Any, name: str = "", write: Callable[[Any], bytes] = encode) -> bytes:
    """One server-sent event. name: in a line of its own, where the API has names for its events."""
    head = f"event: {name}\n" if name else ""
    return head.encode() + b"data: " + write(content) + b"\n\n"


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)
