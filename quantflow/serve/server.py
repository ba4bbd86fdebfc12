"""The process that serves: connections by uvicorn, signals, and an exit code that says how it went.

The first SIGTERM or Ctrl-C drains: the port is closed, what runs is finished or, after a while,
ended with an error, and the process exits with 0. The second quits at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn

from quantflow.serve import log
from quantflow.serve.app import create_app
from quantflow.serve.connection import Connection, Connections, accepts
from quantflow.serve.service import Service

WHOLE_S = 1.0  # for a request that is on its way to be whole, when the server is told to stop
END_S = 1.0  # for errors to be read by the clients of requests that were ended
LAST_S = 5.0  # for errors to reach the clients of requests that were ended
WATCH_S = 0.2
# How long a thread may keep the interpreter while others want it. The loop wants it back after
# every read and write: at Python's 5 ms, a round that serves some hundred clients took seconds
# beside an engine that computes.
SWITCH_S = 0.0005
BACKLOG = 1024  # connections that the system keeps until they are taken

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """ready: called with the server's address once it answers. process_log: the process's log."""

    def __init__(
        self, service: Service, ready: Callable[[str], None], process_log: log.Log | None = None
    ) -> None:
        config = service.config
        self._connections = Connections()
        super().__init__(
            uvicorn.Config(
                create_app(service),
                host=config.host,
                port=config.port,
                http=partial(Connection, self._connections),  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                loop="asyncio",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=accepts(),
                timeout_graceful_shutdown=int(config.drain_timeout_s + LAST_S),
            )
        )
        self.service, self.exit_code = service, 0
        self._log = process_log
        self._ready = ready
        self._watch: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            for socket in (socket for server in self.servers for socket in server.sockets):
                with socket.dup() as same:
                    same.listen(BACKLOG)
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
            self._watch = asyncio.create_task(self._look_after())

    async def _look_after(self) -> None:
        """Ends the process when its engine has died and somebody outside will start another; ends
        what runs too long when draining."""
        loop, stopped = asyncio.get_running_loop(), 0.0
        while True:
            await asyncio.sleep(WATCH_S)
            if self._log:
                self._log.tell_rest()
            if self.service.llm.failure is not None and not self.exit_code:
                logger.error("the engine has died", exc_info=self.service.llm.failure)
                self.exit_code = 1
                self.should_exit |= self.service.config.supervised
            if self.should_exit:
                stopped = stopped or loop.time()
                ends = stopped + self.service.config.drain_timeout_s
                if loop.time() >= min(stopped + WHOLE_S, ends):
                    self._connections.dismiss()
                if loop.time() >= ends:
                    self.service.expired.set()
                if loop.time() >= ends + END_S:
                    self._connections.drop()

    async def shutdown(self, sockets: Any = None) -> None:
        self.service.draining = True
        await super().shutdown(sockets)
        if self._watch:
            self._watch.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which ends the process by the signal it was sent. Only the main
        thread hears signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kept = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
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
    """Serves until it is told to stop, and returns the process's exit code. Raises SystemExit where
    the port is taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE,
        (min(hard, max(soft, 65536)) if hard != resource.RLIM_INFINITY else max(soft, 65536), hard),
    )
    sys.setswitchinterval(SWITCH_S)
    process_log = log.start(service.config.log_level)
    server = Server(service, ready, process_log)
    try:
        server.run()
    finally:
        process_log.tell_rest(at_once=True)
    return server.exit_code
