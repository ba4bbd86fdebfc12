"""What an answer of /v1/responses looks like: items that are begun, grow and are done, each told in
an event, and all of them together."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence

from quantflow.engine.request import Finish, Logprob, Output, Token
from quantflow.serve.answer import Shape, Usage
from quantflow.serve.errors import Refused
from quantflow.serve.sampling import chat_logprobs
from quantflow.serve.service import Service
from quantflow.serve.tools import Call, Reading
from quantflow.serve.wire import Object


class ResponsesShape(Shape):
    """head: what the response object tells of the request. logprobs: whether each text tells its
    tokens' log-probabilities."""

    typed = True

    def __init__(self, service: Service, head: Object, reading: Reading, *, logprobs: bool) -> None:
        self._service, self._reading, self._logprobs = service, reading, logprobs
        self._head = {
            "id": f"resp_{secrets.token_hex(24)}",
            "object": "response",
            "created_at": int(time.time()),
            **head,
        }
        self._output: list[Object] = []
        self._grows = False  # the last item, which is a message
        self._status = "in_progress"
        self._events = 0

    def start(self) -> Iterator[Object]:
        yield self._event("response.created", response=self._response())
        yield self._event("response.in_progress", response=self._response())

    def more(self, text: int, tokens: list[Token]) -> Iterable[Object]:
        return self._text(
            "".join(t.text for t in tokens),
            [t.logprob for t in tokens if t.logprob],
            tokens[-1].finish,
        )

    def end(self, usage: Usage) -> Iterator[Object]:
        yield self._event(f"response.{self._status}", response=self._response(usage))

    def failed(self, error: Refused) -> Iterator[Object]:
        yield self._event("error", code=error.code, message=error.message, param=error.param)
        self._status = "failed"
        code = {400: "invalid_prompt", 429: "rate_limit_exceeded"}.get(error.status, "server_error")
        yield self._event(
            "response.failed",
            response=self._response() | {"error": {"code": code, "message": error.message}},
        )

    def whole(self, outputs: list[Output], usage: Usage) -> Object:
        (completion,) = outputs[0].completions
        for _ in self._text(completion.text, completion.logprobs, completion.finish):
            pass
        return self._response(usage)

    def _text(
        self, text: str, scored: Sequence[Logprob], finish: Finish | None
    ) -> Iterator[Object]:
        """Events of what was generated since the last time. finish: why nothing follows."""
        parts = self._reading.add(text, last=finish is not None)
        if not parts and ((scored and self._logprobs) or (finish is not None and not self._output)):
            parts = [""]
        for part in parts:
            yield from self._call(part) if isinstance(part, Call) else self._grow(part, scored)
        if finish is not None:
            self._status = "incomplete" if finish == Finish.length else "completed"
            if self._grows:
                yield from self._end_message(self._status)

    def _begin_message(self) -> Iterator[Object]:
        self._grows = True
        item: Object = {
            "id": f"msg_{secrets.token_hex(24)}",
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        part: Object = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._output.append({**item, "content": [part]})
        yield self._event("response.output_item.added", output_index=self._last, item=item)
        yield self._event(
            "response.content_part.added", **self._place, part={**part, "logprobs": []}
        )

    def _grow(self, text: str, scored: Sequence[Logprob]) -> Iterator[Object]:
        """scored: with tools there are none, so that they are all of this text."""
        if not self._grows:
            yield from self._begin_message()
        part = self._output[-1]["content"][0]
        logprobs = chat_logprobs(self._service.text, scored)["content"] if self._logprobs else []
        part["text"] += text
        part["logprobs"] += logprobs
        if text or logprobs:
            yield self._event(
                "response.output_text.delta", **self._place, delta=text, logprobs=logprobs
            )

    def _end_message(self, status: str) -> Iterator[Object]:
        self._grows = False
        item = self._output[-1]
        item["status"], part = status, item["content"][0]
        yield self._event(
            "response.output_text.done", **self._place, text=part["text"], logprobs=part["logprobs"]
        )
        yield self._event("response.content_part.done", **self._place, part=part)
        yield self._event("response.output_item.done", output_index=self._last, item=item)

    def _call(self, call: Call) -> Iterator[Object]:
        """It is read whole, so that its arguments come in one piece."""
        if self._grows:
            yield from self._end_message("completed")
        item: Object = {
            "id": f"fc_{secrets.token_hex(24)}",
            "type": "function_call",
            "status": "completed",
        }
        item |= {
            "call_id": f"call_{secrets.token_hex(12)}",
            "name": call.name,
            "arguments": call.arguments,
        }
        self._output.append(item)
        place = {"item_id": item["id"], "output_index": self._last}
        yield self._event(
            "response.output_item.added",
            output_index=self._last,
            item={**item, "status": "in_progress", "arguments": ""},
        )
        yield self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        yield self._event(
            "response.function_call_arguments.done",
            **place,
            name=call.name,
            arguments=call.arguments,
        )
        yield self._event("response.output_item.done", output_index=self._last, item=item)

    @property
    def _last(self) -> int:
        return len(self._output) - 1

    @property
    def _place(self) -> Object:
        """Of the text that grows."""
        return {"item_id": self._output[-1]["id"], "output_index": self._last, "content_index": 0}

    def _event(self, kind: str, **content: object) -> Object:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **content}

    def _response(self, usage: Usage | None = None) -> Object:
        """usage: where it is over."""
        return {
            **self._head,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"}
            if self._status == "incomplete"
            else None,
            "output": self._output,
            "usage": _usage(usage) if usage else None,
        }


def _usage(usage: Usage) -> Object:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }
