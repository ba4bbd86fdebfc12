"""What /v1/messages answers: one message, or the events that it grows by."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from quantflow.engine.request import Finish, Output, Token
from quantflow.serve.answer import Shape, Usage
from quantflow.serve.errors import Refused, anthropic_body
from quantflow.serve.messages.dialogue import tool_input
from quantflow.serve.tools import Call, Reading
from quantflow.serve.wire import Object, encode


class MessageShape(Shape):
    """prompt: its tokens. cut: the context has no room for as many tokens as were asked for."""

    typed = True

    def __init__(
        self, model: str, reading: Reading, prompt: int, *, cut: bool, request_id: str
    ) -> None:
        self._reading, self._prompt, self._cut, self._request_id = reading, prompt, cut, request_id
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._begun = False
        self._blocks = 0  # that have begun
        self._open = False  # the last of them, a text
        self._ended: Object = {}

    def start(self) -> Iterable[Object]:
        """Nothing: what the prefix cache held, which the first event tells, is known with the first
        token."""
        return ()

    def more(self, text: int, tokens: list[Token]) -> Iterable[Object]:
        if not self._begun:
            self._begun = True
            usage = _usage(Usage(self._prompt, 0, max(token.cached for token in tokens)))
            yield {
                "type": "message_start",
                "message": {**self._head, "content": [], **_stopped(None), "usage": usage},
            }
            yield {"type": "ping"}
        last = tokens[-1]
        for part in self._reading.add(
            "".join(token.text for token in tokens), last=last.finish is not None
        ):
            yield from self._text(part) if isinstance(part, str) else self._call(part)
        if last.finish is not None:
            self._ended = self._stop(last.finish, last.stop)

    def end(self, usage: Usage) -> Iterable[Object]:
        if not self._blocks:
            yield self._block({"type": "text", "text": ""})
            self._open = True
        yield from self._close()
        yield {"type": "message_delta", "delta": self._ended, "usage": _usage(usage)}
        yield {"type": "message_stop"}

    def failed(self, error: Refused) -> Iterable[Object]:
        yield anthropic_body(error, self._request_id)

    def whole(self, outputs: list[Output], usage: Usage) -> Object:
        made = outputs[0].completions[0]
        parts = self._reading.add(made.text, last=True) or [""]
        content = [
            _used(p) if isinstance(p, Call) else {"type": "text", "text": p, "citations": None}
            for p in parts
        ]
        return {
            **self._head,
            "content": content,
            **self._stop(made.finish, made.stop),
            "usage": _usage(usage),
        }

    def _text(self, text: str) -> Iterator[Object]:
        if not self._open:
            yield self._block({"type": "text", "text": ""})
        self._open = True
        yield self._delta({"type": "text_delta", "text": text})

    def _call(self, call: Call) -> Iterator[Object]:
        yield from self._close()
        used = _used(call)
        yield self._block({**used, "input": {}})
        yield self._delta(
            {"type": "input_json_delta", "partial_json": encode(used["input"]).decode()}
        )
        yield {"type": "content_block_stop", "index": self._blocks - 1}

    def _block(self, block: Object) -> Object:
        self._blocks += 1
        return {"type": "content_block_start", "index": self._blocks - 1, "content_block": block}

    def _delta(self, delta: Object) -> Object:
        return {"type": "content_block_delta", "index": self._blocks - 1, "delta": delta}

    def _close(self) -> Iterator[Object]:
        if self._open:
            self._open = False
            yield {"type": "content_block_stop", "index": self._blocks - 1}

    def _stop(self, finish: Finish, stop: str | int | None) -> Object:
        if finish == Finish.length:
            return _stopped("model_context_window_exceeded" if self._cut else "max_tokens")
        if isinstance(stop, str):
            return _stopped("stop_sequence", stop)
        return _stopped("tool_use" if self._reading.calls else "end_turn")


def _stopped(reason: str | None, sequence: str | None = None) -> Object:
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt - usage.cached,
        "output_tokens": usage.completion,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
    }


def _used(call: Call) -> Object:
    return {
        "type": "tool_use",
        "id": f"toolu_{secrets.token_hex(12)}",
        "name": call.name,
        "input": tool_input(call.arguments),
    }
