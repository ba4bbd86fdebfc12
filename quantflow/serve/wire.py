"""How answers are written: JSON, and server-sent events."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import PydanticSerializationError, to_json
from starlette.responses import Response

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def encode(content: Any) -> bytes:
    """JSON of any Unicode text; what is no text, half a surrogate pair that a client sent, becomes a question mark."""
    try:
        return to_json(content)
    except PydanticSerializationError:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def event(content: Any, name: str = "") -> bytes:
    """One server-sent event. name: in a line of its own, where the API has names for its events."""
    head = f"event: {name}\n" if name else ""
    return head.encode() + b"data: " + encode(content) + b"\n\n"


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)
