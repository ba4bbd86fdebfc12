"""One HTTP request's way to the engine and back: as one JSON object, or as server-sent events while the text grows.

A `Job` says what to generate, a `Shape` what the answer looks like. `Answer` is the response, which gives back all it holds however it
ends: see `Watched`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from starlette.types import Receive, Scope, Send

from quantflow.engine.async_llm import Stream
from quantflow.engine.engine import Engine
from quantflow.engine.llm import Collector
from quantflow.engine.request import Finish, Output, Request, SamplingParams, Token
from quantflow.errors import RequestError
from quantflow.serve.errors import Refused, engine_stopped, refused
from quantflow.serve.service import Service
from quantflow.serve.watched import Begun, Watched
from quantflow.serve.wire import DONE, KEEP_ALIVE, Json, event

Object = dict[str, Any]

LAST_WORDS_S = 5.0  # for an error to reach a client that reads slowly
EVENT_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]


@dataclass(frozen=True)
class Usage:
    prompt: int = 0
    completion: int = 0
    cached: int = 0

    @property
    def body(self) -> Object:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Shape(Protocol):
    """What an answer looks like. Texts are counted through all prompts: `params.n` of each. typed: events have a `type`, which stands in a
    line before them, too, and tells which one is the last; otherwise `[DONE]` does."""

    typed: ClassVar[bool] = False

    def start(self) -> Iterable[Object]:
        """Events before the first token."""
        ...

    def more(self, text: int, tokens: list[Token]) -> Iterable[Object]:
        """Events of a text's new tokens."""
        ...

    def end(self, usage: Usage) -> Iterable[Object]:
        """Events after the last token."""
        ...

    def failed(self, error: Refused) -> Iterable[Object]:
        """Events in place of those at the end, where the stream cannot be finished."""
        return (error.body,)

    def whole(self, outputs: list[Output], usage: Usage) -> Object:
        """All in one."""
        ...


@dataclass(frozen=True)
class Job:
    """submit: in place of the engine's own `submit`, for the one prompt there is. leave: called with what was generated, whole or not, once
    it is over. grammar_from: the parameter that the grammar was made of. priority: of two that wait the lower goes first."""

    prompts: list[list[int]]
    params: SamplingParams
    shape: Shape
    stream: bool
    submit: Callable[[Engine], Request] | None = None
    leave: Callable[[Output], None] = lambda output: None
    grammar_from: str = "response_format"
    priority: int = 0


class Answer(Watched):
    """sequences: how many texts will be generated. prepare: makes the job, once there is room for it, and cleans up after it. renamed: what
    the client calls the engine's arguments."""

    def __init__(
        self, service: Service, sequences: int, prepare: Callable[[], AbstractAsyncContextManager[Job]],
        renamed: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(service, sequences, renamed)
        self.prepare = prepare
        self._shape: Shape | None = None  # once there is a job

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.prepare() as job:
            self._shape = job.shape
            try:
                await self.service.compile(job.params.grammar)
            except RequestError as error:
                raise refused(error.problems, {"grammar": job.grammar_from}) from error
            if job.stream:
                await self._events(job, send)
            else:
                content = await self._whole(job)
                self._begun = Begun.object
                await Json(content)(scope, receive, send)

    async def _fail(self, send: Send, error: Refused) -> None:
        """As an event, where those have begun."""
        if self._begun != Begun.events or self._shape is None:
            return await super()._fail(send, error)
        with contextlib.suppress(TimeoutError):  # who reads too slowly for that sees the connection end
            async with asyncio.timeout(LAST_WORDS_S):
                await send({"type": "http.response.body", "body": _written(self._shape, self._shape.failed(error)), "more_body": False})

    async def _open(
        self, job: Job, stack: AsyncExitStack, arrived: asyncio.Event | None = None
    ) -> tuple[list[Stream], list[Collector]]:  # fmt: skip
        """A stream and what gathers it for each prompt. arrived: set when one of them has tokens; None: nobody waits for single ones."""
        streams = await self.service.open(
            job.prompts, job.params, priority=job.priority, whole=arrived is None, submit=job.submit, arrived=arrived
        )
        for stream in streams:
            stack.callback(stream.close)
        collectors = [Collector(stream.request) for stream in streams]
        for collector in collectors:
            stack.callback(_leave, job, collector)
        return streams, collectors

    async def _whole(self, job: Job) -> Object:
        async with AsyncExitStack() as stack:
            streams, collectors = await self._open(job, stack)
            for stream, collector in zip(streams, collectors, strict=True):
                async for token in stream:
                    _check(token, self.service)
                    collector.add(token)
        outputs = [collector.output() for collector in collectors]
        return job.shape.whole(outputs, _usage(outputs))

    async def _events(self, job: Job, send: Send) -> None:
        arrived = asyncio.Event()
        async with AsyncExitStack() as stack:
            streams, collectors = await self._open(job, stack, arrived)
            stack.enter_context(_nudged(arrived, self.service.config.keep_alive_s))
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
            self._begun = Begun.events
            await send({"type": "http.response.body", "body": _written(job.shape, job.shape.start()), "more_body": True})
            loop, silence_s = asyncio.get_running_loop(), self.service.config.keep_alive_s
            said = loop.time()
            while not all(stream.done for stream in streams):
                await arrived.wait()
                arrived.clear()
                came = [stream.take() for stream in streams]
                data = b"".join(self._new(job, at, tokens, collectors[at]) for at, tokens in enumerate(came))
                if not data and loop.time() - said >= silence_s * 0.9:  # nothing came, or nothing that can be shown yet
                    data = KEEP_ALIVE
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    said = loop.time()
                if len(streams) == 1:
                    await streams[0].rest(self.service.pause_s)
            usage = _usage([collector.output() for collector in collectors])
            last = _written(job.shape, job.shape.end(usage)) + (b"" if job.shape.typed else DONE)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _new(self, job: Job, prompt: int, tokens: list[Token], collector: Collector) -> bytes:
        """The events of a prompt's new tokens."""
        texts: dict[int, list[Token]] = {}
        for token in tokens:
            _check(token, self.service)
            collector.add(token)
            texts.setdefault(token.index, []).append(token)
        first = prompt * job.params.n
        return b"".join(_written(job.shape, job.shape.more(first + index, new)) for index, new in texts.items())


def _written(shape: Shape, events: Iterable[Object]) -> bytes:
    return b"".join(event(content, content["type"] if shape.typed else "") for content in events)


@contextlib.contextmanager
def _nudged(event: asyncio.Event, every_s: float) -> Iterator[None]:
    """Sets the event now and then: one timer for all of a stream costs less than a timeout for each token."""
    timers: list[asyncio.TimerHandle] = []

    def nudge() -> None:
        event.set()
        timers[:] = [asyncio.get_running_loop().call_later(every_s, nudge)]

    timers.append(asyncio.get_running_loop().call_later(every_s, nudge))
    try:
        yield
    finally:
        timers[0].cancel()


def _check(token: Token, service: Service) -> None:
    """Raises Refused for a text that could not be finished."""
    if token.finish == Finish.error and not service.llm.alive:
        raise engine_stopped()
    if token.finish == Finish.error:
        raise Refused(
            500, f"the text could not be finished: {token.reason.splitlines()[0][:200] if token.reason else 'error'}", code="failed"
        )
    if token.finish == Finish.abort:
        raise Refused(503, "the server ended this request", code="aborted")


def _usage(outputs: list[Output]) -> Usage:
    return Usage(
        sum(len(o.prompt) for o in outputs),
        sum(len(c.token_ids) for o in outputs for c in o.completions),
        sum(o.cached_tokens for o in outputs),
    )


def _leave(job: Job, collector: Collector) -> None:
    job.leave(collector.output())
