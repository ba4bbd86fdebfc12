"""What the server says to whoever runs it: a line each with time, level, request, client and
message, and never very many of a kind."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from quantflow.errors import TURNING

MOST_ALIKE, ALIKE_S = 5, 10.0  # lines of a kind in so many seconds; the others are counted
MOST_KINDS = 256
MOST_CHARACTERS = 2000  # of a message, which may hold what a client sent
# characters of a traceback: of a longer one its beginning, and its end, which says what happened
MOST_TRACE = 16_000
LEVELS = {
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}
# of uvicorn, which says at `info` what nobody asked
OTHERS = {"info": logging.WARNING, "debug": logging.INFO}
# by uvicorn, of what `connection` refuses, with an id
SAID_BETTER = "Invalid HTTP request received."
# A client's text must neither begin a line, nor work a terminal, nor turn what is around it.
HARMLESS = {n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160))} | {
    n: f"\\u{n:04x}" for n in (0x2028, 0x2029, *TURNING)
}

_about: ContextVar[tuple[str, str]] = ContextVar("about", default=("-", "-"))


def note(request: str, client: str) -> None:
    """Lines of this task, and of those that it starts, are about this request from here on."""
    _about.set((request, client))


@contextmanager
def about(request: str, client: str) -> Iterator[None]:
    """Lines in this block are about this request."""
    token = _about.set((request, client))
    try:
        yield
    finally:
        _about.reset(token)


def address(client: Any) -> str:
    """host:port of a socket's peer."""
    return (
        f"[{client[0]}]:{client[1]}"
        if client and ":" in client[0]
        else f"{client[0]}:{client[1]}"
        if client
        else "-"
    )


class Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        request, client = _about.get()
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        message = record.getMessage().strip()[:MOST_CHARACTERS].translate(HARMLESS)
        line = (
            f"{at}.{int(record.msecs):03d}Z {record.levelname.lower()} {request} {client} {message}"
        )
        if record.exc_info:
            trace = _shortened(self.formatException(record.exc_info))
            line += "".join(f"\n  {part.translate(HARMLESS)}" for part in trace.splitlines())
        return line


@dataclass
class _Alike:
    """Lines of a kind since `began`; the first of those that were left out."""

    began: float
    count: int = 0
    first: str = ""


class Log(logging.StreamHandler[Any]):
    """Of lines that say the same, whatever of, the first few; then, once in a while, how many more
    there were. Those for debugging are all shown."""

    def __init__(self, stream: Any = None, clock: Any = time.monotonic) -> None:
        super().__init__(stream or sys.stderr)
        self.setFormatter(Line())
        self._clock = clock
        self._kinds: dict[object, _Alike] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self._tell_rest()
        if record.levelno > logging.DEBUG:
            alike = self._kinds.setdefault(_kind(record), _Alike(self._clock()))
            alike.count += 1
            if alike.count > MOST_ALIKE:
                alike.first = alike.first or record.getMessage().strip()[:MOST_CHARACTERS]
                return
        super().emit(record)

    def tell_rest(self, *, at_once: bool = False) -> None:
        """How many lines were left out, of the kinds whose time is over. at_once: of all."""
        with self.lock or nullcontext():
            self._tell_rest(at_once)

    def _tell_rest(self, at_once: bool = False) -> None:
        now = self._clock()
        crowded = at_once or len(self._kinds) > MOST_KINDS
        for kind, alike in [
            (k, a) for k, a in self._kinds.items() if crowded or now - a.began >= ALIKE_S
        ]:
            del self._kinds[kind]
            if (more := alike.count - MOST_ALIKE) > 0:
                message = (
                    f"{more} more like this in {max(now - alike.began, 0.0):.0f} s: {alike.first}"
                )
                with about("-", "-"):
                    super().emit(
                        logging.LogRecord(
                            __name__, logging.WARNING, __file__, 0, message, None, None
                        )
                    )


def _shortened(trace: str) -> str:
    half = MOST_TRACE // 2
    left_out = len(trace) - 2 * half
    return trace if left_out <= 0 else f"{trace[:half]}\n… {left_out} characters …\n{trace[-half:]}"


def _kind(record: logging.LogRecord) -> object:
    """What lines that say the same have in common: not what they say it of."""
    error = record.exc_info[1] if record.exc_info else None
    trace = error.__traceback__ if error else None
    while trace and trace.tb_next:
        trace = trace.tb_next
    place = (trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace else None
    return (
        record.name,
        record.levelno,
        record.msg if isinstance(record.msg, str) else type(record.msg),
        type(error),
        place,
    )


def start(level: str) -> Log:
    """All that this process says goes through one handler, in the one form. level: error, warning,
    info or debug."""
    handler = Log()
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("quantflow").setLevel(LEVELS[level])
    logging.getLogger("uvicorn.error").addFilter(lambda record: record.msg != SAID_BETTER)
    for name in ("uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(OTHERS.get(level, LEVELS[level]))
    return handler
