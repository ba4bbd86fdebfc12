"""One HTTP request's way to the engine and back: as one JSON object, or as server-sent events while
the text grows.

A `Job` says what to generate, a `Shape` what the answer looks like. `Answer` is the response, which
gives back all it holds however it ends: see `Watched`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol

from starlette.types import Receive, Scope, Send

from quantflow.engine.async_llm import Stream
from quantflow.engine.engine import Engine
from quantflow.engine.llm import Collector
from quantflow.engine.request import Finish, Output, Request, SamplingParams, Token
from quantflow.errors import Problem, RequestError
from quantflow.serve.errors import Refused, aborted, engine_stopped
from quantflow.serve.service import Service
from quantflow.serve.watched import Begun, Watched
from quantflow.serve.wire import DONE, KEEP_ALIVE, Object, encode, encode_large, event

Write = Callable[[Any], bytes]

SMALL = 4096  # tokens and scores that are put together in the loop itself; more go to a thread
# log-probabilities of one answer, which is held whole: 4096 tokens with 20 alternatives are a sixth
# of it
MOST_SCORES = 2**19
LAST_WORDS_S = 5.0  # for an error to reach a client that reads slowly
EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),
]

logger = logging.getLogger(__name__)


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
    """What an answer looks like. Texts are counted through all prompts: `params.n` of each. typed:
    events have a `type`, which stands in a line before them, too, and tells which one is the last;
    otherwise `[DONE]` does."""

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
    """submit: in place of the engine's own `submit`, for the one prompt there is. leave: called
    with what was generated, whole or not, once it is over. ended: what to say where it was given up
    for another reason than the server's end. grammar_from: the parameter that the grammar was made
    of. priority: of two that wait the lower goes first."""

    prompts: list[list[int]]
    params: SamplingParams
    shape: Shape
    stream: bool
    submit: Callable[[Engine], Request] | None = None
    leave: Callable[[Output], None] = lambda output: None
    ended: Callable[[], Refused | None] = lambda: None
    grammar_from: str = "response_format"
    priority: int = 0


def prepared(
    service: Service, make: Callable[[], Job]
) -> Callable[[], AbstractAsyncContextManager[Job]]:
    """How an answer comes to a job that takes a while to make, and holds nothing that must be given
    back."""

    @contextlib.asynccontextmanager
    async def job() -> AsyncIterator[Job]:
        yield await service.prepare(make)

    return job


class Answer(Watched):
    """sequences: how many sequences will be generated. prepare: makes the job, once there is room
    for it, and cleans up after it. renamed: what the client calls the engine's arguments."""

    def __init__(
        self,
        service: Service,
        sequences: int,
        prepare: Callable[[], AbstractAsyncContextManager[Job]],
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(service, sequences, renamed)
        self.prepare = prepare
        self._shape: Shape | None = None  # once there is a job

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.prepare() as job:
            self._shape, self.renamed = (
                job.shape,
                {**(self.renamed or {}), "grammar": job.grammar_from},
            )
            job = bounded(job, self.service.context)
            await self.service.compile(job.params.grammar)
            if job.stream:
                await self._events(job, send)
            else:
                await self._send(await self._whole(job), scope, receive, send)

    async def _fail(self, send: Send, error: Refused) -> None:
        """As an event, where those have begun."""
        if self._begun != Begun.events or self._shape is None:
            return await super()._fail(send, error)
        # who reads too slowly for that sees the connection end
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await send(
                    {
                        "type": "http.response.body",
                        "body": _written(self._shape, self._shape.failed(error)),
                        "more_body": False,
                    }
                )

    async def _open(
        self, job: Job, stack: AsyncExitStack, arrived: asyncio.Event | None = None
    ) -> tuple[list[Stream], list[Collector]]:
        """A stream and what gathers it for each prompt. arrived: set when one of them has tokens;
        None: nobody waits for single ones."""
        streams = await self.service.open(
            job.prompts,
            job.params,
            priority=job.priority,
            whole=arrived is None,
            submit=job.submit,
            arrived=arrived,
        )
        for stream in streams:
            stack.callback(stream.close)
        collectors = [Collector(stream.request) for stream in streams]
        for collector in collectors:
            stack.callback(_leave, job, collector)
        return streams, collectors

    async def _made(self, size: int, make: Callable[[Write], bytes]) -> bytes:
        """What is made of so many tokens and scores: of many beside the loop, so that nobody waits
        for it."""
        return (
            make(encode)
            if size <= SMALL
            else bytes(await self.service.put_together(partial(make, encode_large)))
        )

    async def _whole(self, job: Job) -> bytes:
        async with AsyncExitStack() as stack:
            streams, collectors = await self._open(job, stack)
            for stream, collector in zip(streams, collectors, strict=True):
                async for token in stream:
                    _check(token, self.service, job)
                    collector.add(token)
        outputs = [collector.output() for collector in collectors]
        usage = _usage(outputs)
        size = usage.prompt + usage.completion + sum(map(scores_in, outputs))
        return await self._made(size, lambda write: write(job.shape.whole(outputs, usage)))

    async def _events(self, job: Job, send: Send) -> None:
        arrived = asyncio.Event()
        async with AsyncExitStack() as stack:
            streams, collectors = await self._open(job, stack, arrived)
            stack.enter_context(_nudged(arrived, self.service.config.keep_alive_s))
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
            self._begun = Begun.events
            await send(
                {
                    "type": "http.response.body",
                    "body": _written(job.shape, job.shape.start()),
                    "more_body": True,
                }
            )
            loop, silence_s = asyncio.get_running_loop(), self.service.config.keep_alive_s
            last_sent, scores = loop.time(), 0
            while not all(stream.done for stream in streams):
                await arrived.wait()
                arrived.clear()
                came = [stream.take() for stream in streams]
                size = _size(came)
                scores += size
                # then some shapes tell all of a text again
                if any(token.finish for tokens in came for token in tokens):
                    size = scores
                data = await self._made(size, partial(self._new, job, came, collectors))
                # nothing came, or nothing that can be shown yet
                if not data and loop.time() - last_sent >= silence_s * 0.9:
                    data = KEEP_ALIVE
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    last_sent = loop.time()
                if len(streams) == 1:
                    await streams[0].rest(self.service.pause_s)
            usage = _usage([collector.output() for collector in collectors])
            last = await self._made(
                scores, lambda write: _written(job.shape, job.shape.end(usage), write)
            )
            last += b"" if job.shape.typed else DONE
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _new(
        self, job: Job, came: list[list[Token]], collectors: list[Collector], write: Write
    ) -> bytes:
        """The events of each prompt's new tokens."""
        events = list[bytes]()
        for prompt, (tokens, collector) in enumerate(zip(came, collectors, strict=True)):
            by_sequence: dict[int, list[Token]] = {}
            for token in tokens:
                _check(token, self.service, job)
                collector.add(token)
                by_sequence.setdefault(token.index, []).append(token)
            first = prompt * job.params.n
            events += (
                _written(job.shape, job.shape.more(first + index, new), write)
                for index, new in by_sequence.items()
            )
        return b"".join(events)


def _written(shape: Shape, events: Iterable[Object], write: Write = encode) -> bytes:
    return b"".join(
        event(content, content["type"] if shape.typed else "", write) for content in events
    )


def bounded(job: Job, room: int) -> Job:
    """The job, whose answer tells no more scores than one may: all are held, and written, at once.

    room: tokens of a prompt and what follows it. Where the client names no `max_tokens`, so many
    are generated as may be written. Raises RequestError for more than may be.
    """
    params, lengths = job.params, [len(prompt) for prompt in job.prompts]
    wanted = []
    if params.prompt_logprobs is not None:
        tokens = params.n * sum(max(0, length - params.prompt_logprobs_from) for length in lengths)
        wanted.append(("prompt_logprobs", tokens, params.prompt_logprobs))
    if params.logprobs is not None:
        left = MOST_SCORES - sum(tokens * (1 + top) for _, tokens, top in wanted)
        sequences = params.n * len(lengths)
        most = (
            max(1, left // (sequences * (1 + params.logprobs)))
            if params.max_tokens is None
            else params.max_tokens
        )
        tokens = params.n * sum(min(max(0, room - length), most) for length in lengths)
        wanted.append(("logprobs", tokens, params.logprobs))
        if params.max_tokens is None and most < room - min(lengths):
            job = replace(job, params=replace(params, max_tokens=most))
    scores = sum(tokens * (1 + top) for _, tokens, top in wanted)
    if scores > MOST_SCORES:
        name, tokens, top = max(wanted, key=lambda one: one[1] * (1 + one[2]))
        asked = f"{tokens} tokens, each with {top} alternatives: {scores} scores in all"
        raise RequestError(
            Problem(name, asked, f"at most {MOST_SCORES}", "fewer tokens, choices or alternatives")
        )
    return job


def scores_in(output: Output) -> int:
    """How many log-probabilities an output holds."""
    scored = (score for c in output.completions for score in c.logprobs)
    return sum(1 + len(score.top) for score in (*scored, *output.prompt_logprobs) if score)


def _size(came: list[list[Token]]) -> int:
    """How many tokens and scores have arrived."""
    size = 0
    for tokens in came:
        for token in tokens:
            size += 1 + (len(token.logprob.top) if token.logprob else 0)
            size += sum(1 + len(score.top) for score in token.prompt_logprobs if score)
    return size


@contextlib.contextmanager
def _nudged(event: asyncio.Event, every_s: float) -> Iterator[None]:
    """Sets the event now and then: one timer for all of a stream costs less than a timeout for each
    token."""
    timers: list[asyncio.TimerHandle] = []

    def nudge() -> None:
        event.set()
        timers[:] = [asyncio.get_running_loop().call_later(every_s, nudge)]

    timers.append(asyncio.get_running_loop().call_later(every_s, nudge))
    try:
        yield
    finally:
        timers[0].cancel()


def _check(token: Token, service: Service, job: Job) -> None:
    """Raises Refused, or RequestError where that is the grammar's fault, for a text that could not
    be finished."""
    if token.finish == Finish.error and not service.llm.alive:
        raise engine_stopped()
    # the reason may tell of the inside, such as where the model is
    if token.finish == Finish.error:
        logger.error("a text could not be finished: %s", token.reason)
        raise Refused(
            500,
            "the text could not be finished; the server's log says why, under this request's id",
            code="failed",
        )
    if token.finish == Finish.grammar:  # another try would come there, too
        reason = f"the text came to where it cannot be followed ({token.reason})"
        raise RequestError(
            Problem(
                "grammar", reason, "a simpler one, or one that can end", code="grammar_not_followed"
            )
        )
    if token.finish == Finish.abort:
        raise job.ended() or aborted()


def _usage(outputs: list[Output]) -> Usage:
    return Usage(
        sum(len(o.prompt) for o in outputs),
        sum(len(c.token_ids) for o in outputs for c in o.completions),
        sum(o.cached_tokens for o in outputs),
    )


def _leave(job: Job, collector: Collector) -> None:
    job.leave(collector.output())
