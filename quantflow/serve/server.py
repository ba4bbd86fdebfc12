"""The process that serves: connections by uvicorn, signals, and an exit code that says how it went.

The first SIGTERM or Ctrl-C drains: the port is closed, what runs is finished or, after a while, ended with an error, and the process
exits with 0. The second quits at once.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from quantflow.serve.app import create_app
from quantflow.serve.errors import Refused, response
from quantflow.serve.service import Service

HEADERS_S = 20.0  # for a request's first lines to arrive
MOST_HEADER_BYTES = 32768
LAST_S = 5.0  # for errors to reach the clients of requests that were ended
WATCH_S = 0.2
BACKLOG = 1024
SPARE_FILES = 64  # descriptors that are not connections


class Protocol(H11Protocol):
    """uvicorn's, with a limit on how long a request's first lines may take and on how many connections there are, and OpenAI's error body
    for what is no HTTP."""

    _late: asyncio.TimerHandle | None = None

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
        super().data_received(data)
        if self.cycle is not before:
            self._arrived()
        elif before is None or before.response_complete:
            self._expect()  # a part of the next request

    def _expect(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEADERS_S, self._close_late)

    def _arrived(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close_late(self) -> None:
        if not self.transport.is_closing():
            self._refuse(Refused(408, f"headers: not there after {HEADERS_S:g} s", code="timeout"))

    def send_400_response(self, msg: str) -> None:
        message = f"request: no valid HTTP, or more than {MOST_HEADER_BYTES} bytes of headers"
        self._refuse(Refused(400, message, code="invalid_http"))

    def _refuse(self, error: Refused) -> None:
        answer = response(error)
        with suppress(h11.LocalProtocolError):  # in the middle of another answer there is nothing to say
            headers = [*answer.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=error.status, headers=headers), h11.Data(data=bytes(answer.body)), h11.EndOfMessage()
            ):  # fmt: skip
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


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
                proxy_headers=False, server_header=False, h11_max_incomplete_event_size=MOST_HEADER_BYTES, backlog=BACKLOG,
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
            if not self.service.llm.alive and self.service.config.supervised and not self.should_exit:
                self.exit_code, self.should_exit = 1, True
            if self.should_exit:
                until = until or loop.time() + self.service.config.drain_timeout_s
                if loop.time() >= until:
                    await self.service.expire()

    async def shutdown(self, sockets: Any = None) -> None:
        self.service.draining = True
        await super().shutdown(sockets)
        if self._watch:
            self._watch.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which ends the process by the signal it was sent."""
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
