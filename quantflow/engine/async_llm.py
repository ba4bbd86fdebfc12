"""The engine for asyncio: it steps in a thread of its own, and each request's tokens arrive in the loop that asked for them.

The thread alone touches the engine; everybody else sends it calls. `progress` says when it last did something, for health checks.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from quantflow.engine.engine import Engine, EngineConfig
from quantflow.engine.llm import Collector, Prompt
from quantflow.engine.request import Finish, Output, Request, SamplingParams, Token
from quantflow.errors import Problem, ResourceError

T = TypeVar("T")

IDLE_S = 0.5  # how often an idle engine says that it is alive


@dataclass(frozen=True)
class _Listener:
    """Who waits for a request. open: the texts that have not ended."""

    hear: Callable[[Token], None]
    open: set[int]


class AsyncLLM:
    """A model for asyncio. options: those of `EngineConfig`. Close it when done, or use it in `async with`."""

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.engine = Engine(model, EngineConfig(**options))
        self.progress = time.monotonic()
        self.failure: BaseException | None = None
        self.alive = True
        self._gate = threading.Lock()  # so that no call is queued once the thread has looked for the last time
        self._calls: queue.SimpleQueue[tuple[Callable[[], None], Future[Any]] | None] = queue.SimpleQueue()
        self._listeners: dict[str, _Listener] = {}
        self._thread = threading.Thread(target=self._run, name="quantflow-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def close(self) -> None:
        """Ends the thread after the step at hand, and waits for it; requests that still run end as aborted."""
        self._calls.put(None)
        self._thread.join()

    def abort(self, id: str) -> Future[None]:
        """Ends a request, if it runs: whoever waits for it hears so."""
        return self.call(lambda engine: self._deliver(engine.abort(id)))

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, id: str | None = None, priority: int = 0, session: int | None = None
    ) -> AsyncIterator[Token]:
        """The tokens as they come; leaving the loop, or being cancelled, aborts the request. Raises RequestError, and ResourceError
        where the engine has stopped."""
        request, tokens, listener = await self._open(prompt, params, id=id, priority=priority, session=session)
        left = request.params.n
        try:
            while left:
                token = await tokens.get()
                left -= token.finish is not None
                yield token
        finally:
            if left:
                self._abandon(request.id, listener)

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Output:
        """All of it at once. Raises ResourceError where a text could not be finished."""
        request, tokens, listener = await self._open(prompt, params, **options)
        collector = Collector(request)
        try:
            while not collector.done:
                token = await tokens.get()
                collector.add(token)
                if token.finish in (Finish.error, Finish.abort):
                    raise ResourceError(Problem(token.request, token.reason or "aborted"))
        finally:
            if not collector.done:
                self._abandon(request.id, listener)
        return collector.output()

    async def _open(
        self, prompt: Prompt, params: SamplingParams | None, **options: Any
    ) -> tuple[Request, asyncio.Queue[Token], _Listener]:  # fmt: skip
        loop, tokens = asyncio.get_running_loop(), asyncio.Queue[Token]()

        def hear(token: Token) -> None:
            loop.call_soon_threadsafe(tokens.put_nowait, token)

        listener = _Listener(hear, set(range((params or SamplingParams()).n)))

        def submit(engine: Engine) -> Request:
            request = engine.submit(prompt, params, **options)
            self._listeners[request.id] = listener
            return request

        submitted = self.call(submit)
        try:
            return await asyncio.shield(asyncio.wrap_future(submitted)), tokens, listener
        except asyncio.CancelledError:
            submitted.add_done_callback(lambda f: None if f.cancelled() or f.exception() else self._abandon(f.result().id, listener))
            raise

    def call(self, action: Callable[[Engine], T]) -> Future[T]:
        """Runs `action` in the engine's thread, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(action(self.engine))
                except BaseException as error:  # whatever it is, it is the caller's
                    future.set_exception(error)

        with self._gate:
            if self.alive:
                self._calls.put((run, future))
            else:
                future.set_exception(self._stopped())
        return future

    def _abandon(self, id: str, listener: _Listener) -> None:
        def abort(engine: Engine) -> None:
            if self._listeners.get(id) is listener:  # else it has ended, and the id may be another request's by now
                del self._listeners[id]
                engine.abort(id)

        self.call(abort)

    def _run(self) -> None:
        try:
            while True:
                self.progress = time.monotonic()
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
            finish, reason = (Finish.error, str(self._stopped())) if self.failure else (Finish.abort, "the engine was closed")
            # Every text that somebody still waits for, those of the step that failed among them.
            self._deliver([Token(id, i, None, finish=finish, reason=reason) for id, found in self._listeners.items() for i in found.open])
            while not self._calls.empty():
                call = self._calls.get()
                if call is not None and call[1].set_running_or_notify_cancel():
                    call[1].set_exception(self._stopped())

    def _deliver(self, tokens: list[Token]) -> None:
        for token in tokens:
            listener = self._listeners.get(token.request)
            if listener is None:
                continue
            try:
                listener.hear(token)
            except RuntimeError:  # its event loop has been closed
                del self._listeners[token.request]
                self.engine.abort(token.request)
                continue
            if token.finish:
                listener.open.discard(token.index)
                if not listener.open:
                    del self._listeners[token.request]

    def _stopped(self) -> ResourceError:
        said = f"failed: {type(self.failure).__name__}: {self.failure}" if self.failure else "was closed"
        return ResourceError(Problem("engine", said, "a running engine"))
