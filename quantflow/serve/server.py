"""The process that serves: connections by uvicorn, signals, and an exit code that says how it went.

The first SIGTERM or Ctrl-C drains: the port is closed, what runs is finished or, after a while, ended with an error, and the process
exits with 0. The second quits at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from quantflow.serve.app import create_app
from quantflow.serve.errors import Refused, response
from quantflow.serve.guard import MOST_HEADER_BYTES, headers_too_large
from quantflow.serve.service import Service

HEADERS_S = 20.0  # for a request's first lines to arrive
LAST_S = 5.0  # for errors to reach the clients of requests that were ended
WATCH_S = 0.2
BACKLOG = 1024
UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)
SPARE_FILES = 64  # descriptors that are not connections

logger = logging.getLogger(__name__)


class Protocol(HttpToolsProtocol):
    """uvicorn's, with limits on the size of a request's first lines and how long they may take, and on how many connections there are, and
    with OpenAI's error body for what is no HTTP."""

    _late: asyncio.TimerHandle | None = None
    _unread = 0  # bytes of a request that has not begun

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            transport.abort()
        else:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        between = before is None or not before.more_body  # a body has come to its end
        super().data_received(_without_upgrade(data) if between else data)
        if self.cycle is not before:
            self._arrived()
        elif between:  # a part of the next request's first lines
            self._unread += len(data)
            if self._unread > MOST_HEADER_BYTES:
                self._refuse(headers_too_large())
            else:
                self._expect()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self._expect()  # the rest of a body that was refused

    def _expect(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEADERS_S, self._close_late)

    def _arrived(self) -> None:
        self._unread = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close_late(self) -> None:
        self._refuse(Refused(408, f"headers: not there after {HEADERS_S:g} s", code="timeout"))

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refused(400, "request: no valid HTTP", code="invalid_http"))

    def _refuse(self, error: Refused) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:  # in the middle of another answer there is nothing to say
            answer = response(error)
            lines = [STATUS_LINE[error.status], *(name + b": " + value + b"\r\n" for name, value in answer.raw_headers)]
            self.transport.write(b"".join([*lines, b"connection: close\r\n\r\n", bytes(answer.body)]))
        self.transport.close()


def _without_upgrade(data: bytes) -> bytes:
    """A request's first lines without an offer to change the protocol, which Java's HttpClient and `curl --http2` make: the parser would
    leave the body unread."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return UPGRADE.sub(b"\r\nx-refused-upgrade:", head) + end + rest


def most_connections() -> int:
    """As many as there are file descriptors for."""
    return max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES)


class Server(uvicorn.Server):
    """ready: called with the server's address once it answers."""

    def __init__(self, service: Service, ready: Callable[[str], None]) -> None:
        config = service.config
        super().__init__(
            uvicorn.Config(
                create_app(service), host=config.host, port=config.port, http=Protocol, ws="none", lifespan="on", loop="asyncio",
                log_level="warning" if config.log_level == "info" else config.log_level, access_log=config.log_level in ("debug", "trace"),
                proxy_headers=False, server_header=False, backlog=BACKLOG,
                timeout_graceful_shutdown=int(config.drain_timeout_s + LAST_S),
            )
        )  # fmt: skip
        self.service, self.exit_code = service, 0
        self._ready = ready
        self._watch: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
            self._watch = asyncio.create_task(self._look_after())

    async def _look_after(self) -> None:
        """Ends the process when its engine has died and somebody outside will start another; ends what runs too long when draining."""
        loop, until = asyncio.get_running_loop(), None
        while True:
            await asyncio.sleep(WATCH_S)
            if self.service.llm.failure is not None and not self.exit_code:
                logger.error("the engine has died", exc_info=self.service.llm.failure)
                self.exit_code = 1
                self.should_exit |= self.service.config.supervised
            if self.should_exit:
                until = until or loop.time() + self.service.config.drain_timeout_s
                if loop.time() >= until:
                    self.service.expired.set()

    async def shutdown(self, sockets: Any = None) -> None:
        self.service.draining = True
        await super().shutdown(sockets)
        if self._watch:
            self._watch.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which ends the process by the signal it was sent. Only the main thread hears signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kept = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.service.draining = self.should_exit = True


def serve(service: Service, ready: Callable[[str], None]) -> int:
    """Serves until it is told to stop, and returns the process's exit code. Raises SystemExit where the port is taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 65536)) if hard != resource.RLIM_INFINITY else max(soft, 65536), hard))
    server = Server(service, ready)
    server.run()
    return server.exit_code
