"""The engine for asyncio: it steps in a thread of its own, and each request's tokens arrive in the
loop that asked for them.

The thread alone touches the engine; everybody else sends it calls. `progress` says when it last did
something, for health checks.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.engine.llm import Collector, Prompt
from quantflow.engine.request import Finish, Output, Request, SamplingParams, Token
from quantflow.errors import Problem, ResourceError, contained

T = TypeVar("T")

IDLE_S = 0.5  # how often an idle engine says that it is alive


class Stream:
    """A request's tokens as they come: `async for token in stream`. Close it, or use it in `async
    with`: whoever leaves it early aborts the request. whole: nobody waits for single tokens, and
    who waits is woken when the last one is there. hear: called in the loop with each token as it
    comes. arrived: set when there are tokens, for who waits for several streams at once. Raises
    ResourceError where the engine has stopped."""

    def __init__(
        self,
        llm: AsyncLLM,
        request: Request,
        loop: asyncio.AbstractEventLoop,
        *,
        whole: bool,
        hear: Callable[[Token], None],
        arrived: asyncio.Event | None = None,
    ) -> None:
        self.request, self.loop = request, loop
        # the texts that have not ended; the engine's thread takes them out
        self.left = set(range(request.params.n))
        self._llm, self._whole, self._hear, self._open = llm, whole, hear, request.params.n
        self._tokens: list[Token] = []
        self._arrived, self._ended = arrived or asyncio.Event(), asyncio.Event()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[Token]:
        while not self.done:
            for token in await self.some():
                yield token

    @property
    def done(self) -> bool:
        """Whether every token has been taken."""
        return not self._open and not self._tokens

    async def some(self) -> list[Token]:
        """All tokens that came since the last call, at least one; [] at the end."""
        if not self.done:
            await self._arrived.wait()
        self._arrived.clear()
        return self.take()

    def take(self) -> list[Token]:
        """All tokens that came since the last call."""
        taken, self._tokens = self._tokens, []
        return taken

    async def rest(self, seconds: float) -> None:
        """Lets tokens gather for a while, or until the last one is there."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()

    def put(self, token: Token) -> None:
        """In the loop."""
        self._tokens.append(token)
        self._hear(token)
        self._open -= token.finish is not None
        if not self._open:
            self._ended.set()
        if not self._open or not self._whole:
            self._arrived.set()

    def close(self) -> None:
        """Aborts the request, if it still runs."""
        if self._open:
            self._llm.abandon([self])


class AsyncLLM:
    """A model for asyncio. Close it when done, or use it in `async with`.

    Args:
        model: An artifact, a checkpoint in a format that is read, or a hub id.
        options: Those of `EngineConfig`.

    Raises:
        UserError: For a model that cannot be run, and options that make no sense.
        ResourceError: Where the machine has not enough memory.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.progress = time.monotonic()
        self.engine = Engine(model, EngineConfig(**options), self._beat)
        self.failure: BaseException | None = None
        self.alive = True
        # so that no call is queued once the thread has looked for the last time
        self._gate = threading.Lock()
        self._calls: queue.SimpleQueue[tuple[Callable[[], None], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._streams: dict[str, Stream] = {}
        self._thread = threading.Thread(target=self._run, name="quantflow-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def _beat(self) -> None:
        self.progress = time.monotonic()

    def close(self, timeout_s: float | None = None) -> bool:
        """Ends the thread after the step at hand, and waits for it; requests that still run end as
        aborted. timeout_s: how long to wait; None: for ever. Whether it has ended: a thread that
        hangs is left behind."""
        self._calls.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self.engine.close()
        return True

    def abort(self, id: str) -> Future[None]:
        """Ends a request, if it runs: whoever waits for it hears so."""
        return self.call(lambda engine: self._deliver(engine.abort(id)))

    def end_session(self, session: int) -> Future[None]:
        """Forgets a session, if there is one, and ends the turn that runs in it: whoever waits for
        it hears so."""

        def end(engine: Engine) -> None:
            known = engine.sessions.get(session)
            if known is not None:
                self._deliver(engine.abort(known.turn) if known.turn else [])
                engine.end(session)

        return self.call(end)

    async def open(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        priority: int = 0,
        session: int | None = None,
        whole: bool = False,
    ) -> Stream:
        """The request, submitted. Raises RequestError, and ResourceError where the engine has
        stopped. whole: see `Stream`."""
        streams = await self.open_by(
            lambda engine: [
                engine.submit(prompt, params, id=id, priority=priority, session=session)
            ],
            whole=whole,
        )
        return streams[0]

    async def open_by(
        self,
        submit: Callable[[Engine], list[Request]],
        *,
        whole: bool = False,
        hear: Callable[[], Callable[[Token], None]] = lambda: lambda token: None,
        arrived: asyncio.Event | None = None,
    ) -> list[Stream]:
        """A stream for each of the requests that `submit` makes, in the engine's thread and between
        two steps: all of them are open, or none is. hear: makes what hears a stream's tokens. The
        rest: see `Stream`."""
        loop = asyncio.get_running_loop()

        def begin(engine: Engine) -> list[Stream]:
            requests = submit(engine)
            try:
                streams = [
                    Stream(self, request, loop, whole=whole, hear=hear(), arrived=arrived)
                    for request in requests
                ]
            except BaseException:
                for request in requests:
                    engine.abort(request.id)
                raise
            self._streams |= {stream.request.id: stream for stream in streams}
            return streams

        submitted = self.call(begin)
        try:
            return await asyncio.shield(asyncio.wrap_future(submitted))
        except BaseException:
            if not submitted.cancel():  # it has begun, and will be done before the next call
                self.call(
                    lambda engine: (
                        None if submitted.exception() else self._drop(engine, submitted.result())
                    )
                )
            raise

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[Token]:
        """The tokens as they come; leaving the loop, or being cancelled, aborts the request.
        options: those of `open`."""
        async with await self.open(prompt, params, **options) as stream:
            async for token in stream:
                yield token

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> Output:
        """All of it at once. Raises ResourceError where a text could not be finished. options:
        those of `open`."""
        async with await self.open(prompt, params, **options, whole=True) as stream:
            collector = Collector(stream.request)
            async for token in stream:
                collector.add(token)
                if token.finish and (token.finish.failed or token.finish == Finish.abort):
                    raise ResourceError(Problem(token.request, token.reason or "aborted"))
        return collector.output()

    def call(self, action: Callable[[Engine], T]) -> Future[T]:
        """Runs `action` in the engine's thread, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(contained(lambda: action(self.engine)))
                except BaseException as error:  # whatever it is, it is the caller's
                    future.set_exception(error)

        with self._gate:
            if self.alive:
                self._calls.put((run, future))
            else:
                future.set_exception(self._stopped())
        return future

    def abandon(self, streams: list[Stream]) -> None:
        """Aborts what nobody waits for any longer."""
        self.call(lambda engine: self._drop(engine, streams))

    def _drop(self, engine: Engine, streams: list[Stream]) -> None:
        for stream in streams:
            # else it has ended, and the id may be another request's by now
            if self._streams.get(stream.request.id) is stream:
                del self._streams[stream.request.id]
                engine.abort(stream.request.id)

    def _run(self) -> None:
        try:
            while True:
                self._beat()
                try:
                    call = self._calls.get(block=not self.engine.has_work, timeout=IDLE_S)
                except queue.Empty:
                    self._deliver(self.engine.step())
                    continue
                if call is None:
                    break
                call[0]()  # all that wait, before the next step
        except BaseException as error:
            self.failure = error
        finally:
            with self._gate:
                self.alive = False
            finish, reason = (
                (Finish.error, str(self._stopped()))
                if self.failure
                else (Finish.abort, "the engine was closed")
            )
            # Every text that somebody still waits for, those of the step that failed among them.
            self._deliver(
                [
                    Token(id, i, None, finish=finish, reason=reason)
                    for id, s in self._streams.items()
                    for i in sorted(s.left)
                ]
            )
            while not self._calls.empty():
                call = self._calls.get()
                if call is not None and call[1].set_running_or_notify_cancel():
                    call[1].set_exception(self._stopped())

    def _deliver(self, tokens: list[Token]) -> None:
        """A step's tokens to their streams, with one message to each loop that waits."""
        messages: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Token]]] = {}
        for token in tokens:
            stream = self._streams.get(token.request)
            if stream is None:
                continue
            messages.setdefault(stream.loop, []).append((stream, token))
            if token.finish:
                stream.left.discard(token.index)
                if not stream.left:
                    del self._streams[token.request]
        for loop, message in messages.items():
            try:
                loop.call_soon_threadsafe(_hand_over, message)
            except RuntimeError:  # it has been closed
                for id in {token.request for _, token in message}:
                    self._streams.pop(id, None)
                    if self.alive:  # who has died gives nothing back
                        self.engine.abort(id)

    def _stopped(self) -> ResourceError:
        reason = (
            f"failed: {type(self.failure).__name__}: {self.failure}"
            if self.failure
            else "was closed"
        )
        return ResourceError(Problem("engine", reason, "a running engine"))


def _hand_over(message: list[tuple[Stream, Token]]) -> None:
    for stream, token in message:
        stream.put(token)
