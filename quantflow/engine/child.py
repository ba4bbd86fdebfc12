"""A process of our own for work that must not harm this one: it answers a line of JSON with a line,
in time, or is ended."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time

from quantflow.machine import ending


class ChildSlow(Exception):
    """No answer in time; the process has been ended."""


class ChildEnded(Exception):
    """The process has ended without an answer."""


class ChildUnwanted(Exception):
    """Nobody waits for the answer any longer; the process has been ended."""


LOOK_S = 0.1  # how often it is looked whether an answer is still wanted


class Child:
    """`python -m module`, started when it is first needed, and again after it had to be ended. For
    one thread at a time."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, first: bytes | None = None, timeout_s: float = 30.0) -> bytes:
        """Its answer to its first line; b"" where it needs none. Raises ChildSlow, ChildEnded."""
        self.end()
        # -P: nothing of the current folder is imported.
        command = [sys.executable, "-P", "-m", self._module]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._process.stdin
        os.set_blocking(self._process.stdin.fileno(), False)
        return self.ask(first, timeout_s) if first is not None else b""

    def ask(self, line: bytes, timeout_s: float, unwanted: threading.Event | None = None) -> bytes:
        """The answer to a line. unwanted: set by another thread once nobody waits for it. Raises
        ChildSlow, ChildEnded, ChildUnwanted; then, or where anything else is raised, the process is
        gone: an answer that nobody waited for would be the next question's."""
        try:
            return self._exchange(
                line + b"\n", time.monotonic() + timeout_s, unwanted or threading.Event()
            )
        except BaseException as error:
            self.end()
            if isinstance(error, OSError):
                raise ChildEnded(str(error)) from error
            raise

    def _exchange(self, data: bytes, until: float, unwanted: threading.Event) -> bytes:
        process = self._process
        assert process and process.stdin and process.stdout
        input_fd, output_fd = process.stdin.fileno(), process.stdout.fileno()
        view, parts = memoryview(data), list[bytes]()
        # not select(), which knows no descriptors from 1024 on: a server has many
        ready = select.poll()
        ready.register(output_fd, select.POLLIN)
        ready.register(input_fd, select.POLLOUT)
        while True:
            if unwanted.is_set():
                raise ChildUnwanted
            left = until - time.monotonic()
            events = dict(ready.poll(max(0.0, min(left, LOOK_S)) * 1000))
            if not events and left <= LOOK_S:
                raise ChildSlow
            if input_fd in events:
                view = view[os.write(input_fd, view[:65536]) :]
                if not view:
                    ready.unregister(input_fd)
            if output_fd in events:
                part = os.read(output_fd, 1 << 20)
                if not part:
                    raise ChildEnded(ending(process.wait()))
                parts.append(part)
                if part.endswith(b"\n"):
                    return b"".join(parts)

    def end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    pipe.close()
            self._process = None

    def __del__(self) -> None:
        if self.running:
            self.end()
