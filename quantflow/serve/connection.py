"""A connection: uvicorn's, with limits on how long each of its parts may take, how much may be
unread, and how many there are.

Of more connections than there are file descriptors for, the one that has waited the longest makes
room: one between two requests, or whose request is not whole yet. So whoever asks at once is
answered, `/health` above all, however many others hold connections open.
"""

from __future__ import annotations

import asyncio
import logging
import re
import resource
import secrets
from collections import OrderedDict
from typing import Any

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from quantflow.serve import log
from quantflow.serve.errors import Refused, response, shutting_down
from quantflow.serve.guard import CROWDED, MOST_HEADER_BYTES, headers_too_large

HEADERS_S = 20.0  # for a request's first lines to arrive
# of an answer that is written, so many bytes must be read in so long; of a stream, any
SEND_S, SEND_LEAST = 60.0, 65536
# how long, and how much, a client that is refused may go on sending before it reads its answer
LINGER_S, MOST_LINGER = 5.0, 16 * 2**20
SPARE_FILES = 64  # descriptors that are not connections
# connections in which nothing but /health is answered once all others are being answered
RESERVE = 8
CHUNK_BYTES = 12  # of a chunk that are not body: eight digits and two line ends
UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)

logger = logging.getLogger(__name__)


def accepts() -> int:
    """Connections that are taken between two rounds of the loop: not so many that a round takes
    long, nor more than there are descriptors for before others are closed."""
    return min(128, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 16))


def most_connections() -> int:
    """As many as there are file descriptors for, beside those that have just come and those that
    are about to go."""
    return max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES - 2 * accepts())


class Connections:
    """Those of a server. waiting: in which no whole request is under way, the one that has waited
    the longest first."""

    def __init__(self) -> None:
        self.most = most_connections()
        self.open: set[Connection] = set()
        self.waiting: OrderedDict[Connection, str] = OrderedDict()

    @property
    def crowded(self) -> bool:
        """Whether so many are being answered that no more should be."""
        return len(self.open) - len(self.waiting) >= self.most - RESERVE

    def add(self, new: Connection) -> bool:
        """Makes room for one more, and says whether there is any."""
        self.open.add(new)
        while len(self.open) > self.most and self.waiting:
            next(iter(self.waiting)).drop()
        return len(self.open) <= self.most

    def waits(self, one: Connection, for_what: str | None) -> None:
        """None: it does not wait any longer. For what it has waited already, it keeps its turn."""
        if one not in self.open or self.waiting.get(one) == for_what:
            return
        self.waiting.pop(one, None)
        if for_what is not None:
            self.waiting[one] = for_what

    def dismiss(self) -> None:
        """Those that wait when the server is told to stop."""
        for one in list(self.waiting):
            one.dismiss()

    def drop(self) -> None:
        for one in list(self.open):
            one.drop()

    def remove(self, one: Connection) -> None:
        self.open.discard(one)
        self.waiting.pop(one, None)


class _Transport:
    """uvicorn's way to the client, closed in ours."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport, self._connection = transport, connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._connection.parting:
            self._transport.write(data)

    def is_closing(self) -> bool:
        return self._connection.parting or self._transport.is_closing()

    def close(self) -> None:
        self._connection.part()


class Connection(HttpToolsProtocol):
    """uvicorn's protocol. all: those of its server."""

    def __init__(self, all: Connections, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.parting = False  # the last answer has been sent
        self._all = all
        self._raw: asyncio.Transport
        self._late: asyncio.TimerHandle | None = None
        self._slow: asyncio.TimerHandle | None = None
        # bytes of a request that has not begun; of one that parts, those that nobody reads
        self._unread = 0
        # bytes of the request at hand since its headers that are not its body: trailers, and what
        # is said of chunks
        self._beside = 0
        # the cycle whose turn it is, of those that came at once
        self._running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._raw = transport
        room = self._all.add(self)
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        if not room:
            self.drop()
            return
        self._expect()
        self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        self.parting = True
        self._all.remove(self)
        self._arrived()
        self._unwatch()
        self._tell_gone()  # uvicorn tells the last request of those that came at once alone
        super().connection_lost(exc)

    def _tell_gone(self) -> None:
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def drop(self) -> None:
        """Ends it now; what was not sent never is."""
        self._all.remove(self)
        self.parting = True
        self._raw.abort()

    def data_received(self, data: bytes) -> None:
        if self.parting:
            self._unread += len(data)
            if self._unread > MOST_LINGER:
                self.drop()
            return
        before = self.cycle
        between = before is None or not before.more_body  # a body has come to its end
        self._beside += len(data)
        with log.about("-", log.address(self.client)):
            super().data_received(_without_upgrade(data) if between else data)
        self._beside = 0 if between or self.cycle is not before else max(self._beside, 0)
        if self.cycle is not before:
            self._arrived()
        elif not between and self.cycle.more_body and self._beside > MOST_HEADER_BYTES:
            self._refuse(headers_too_large())
        elif between and not self.parting:  # a part of the next request's first lines
            self._unread += len(data)
            if self._unread > MOST_HEADER_BYTES:
                self._refuse(headers_too_large())
            else:
                self._expect()
        self._settle()

    def on_headers_complete(self) -> None:
        if self._all.crowded:
            self.scope["state"][CROWDED] = True
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of a trailer nothing is kept: it is no header, whatever it is called, and there may be no
        end of them."""
        if self.cycle is None or not self.cycle.more_body:
            super().on_header(name, value)

    def on_chunk_header(self) -> None:
        self._beside -= CHUNK_BYTES

    def on_body(self, body: bytes) -> None:
        self._beside -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.cycle.more_body = False  # which uvicorn leaves as it was where the answer came first

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self._expect()  # the rest of a body that was refused
        self._settle()

    def _settle(self) -> None:
        if self.parting or self.cycle is None or self.cycle.response_complete:
            self._all.waits(self, "a request")
        else:
            # Behind an answer that runs, a second request may have begun.
            self._all.waits(
                self, "its body" if self.cycle is self._running and self.cycle.more_body else None
            )

    # --- what must be there in time

    def _expect(self) -> None:
        if self._late is None and not self.parting:
            self._late = self.loop.call_later(HEADERS_S, self._close_late)

    def _arrived(self) -> None:
        self._unread = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close_late(self) -> None:
        self._refuse(Refused(408, f"headers: not there after {HEADERS_S:g} s", code="timeout"))

    # --- what must be read in time

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.parting:
            self._unwatch()

    def _watch(self) -> None:
        if self._slow is None:
            self._slow = self.loop.call_later(
                SEND_S, self._check_sent, self._raw.get_write_buffer_size()
            )

    def _check_sent(self, before: int) -> None:
        self._slow = None
        left = self._raw.get_write_buffer_size()
        streams = self._running is not None and not self._running.response_complete
        if left > before - (1 if streams else SEND_LEAST):
            self.drop()
        else:
            self._watch()

    def _unwatch(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    # --- the end

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refused(400, "request: no valid HTTP", code="invalid_http"))

    def _refuse(self, error: Refused) -> None:
        """Of what never comes to a route."""
        if self.parting:
            return
        id = f"req-{secrets.token_hex(12)}"
        with log.about(id, log.address(self.client)):
            logger.warning("refused with %d: %s", error.status, error.message)
        if self.cycle is not None and not self.cycle.response_complete:
            if (
                self.cycle is not self._running
                or self.cycle.response_started
                or not self.cycle.more_body
            ):
                self.drop()  # in the middle of another answer there is nothing to say
                return
            self._tell_gone()
        answer = response(error)
        lines = [
            STATUS_LINE[error.status],
            *(name + b": " + value + b"\r\n" for name, value in answer.raw_headers),
        ]
        self._raw.write(
            b"".join(
                [
                    *lines,
                    f"x-request-id: {id}\r\nconnection: close\r\n\r\n".encode(),
                    bytes(answer.body),
                ]
            )
        )
        self.part(unread=True)

    def shutdown(self) -> None:
        # who has sent a part of a request's first lines is given a moment for the others
        if not self._unread:
            super().shutdown()

    def dismiss(self) -> None:
        """Ends it where no answer is on its way: who has sent half a request is told, who has been
        told is listened to no longer."""
        if not self.parting and (self._unread or (self.cycle is not None and self.cycle.more_body)):
            self._refuse(shutting_down())
        if not self._raw.get_write_buffer_size():
            self._close() if self.parting else self.drop()

    def part(self, *, unread: bool = False) -> None:
        """Ends it, once all answers are sent. unread: the client may still be sending, and a
        connection closed over what nobody read is reset before its answer is read: what comes is
        passed over for a while."""
        if self.parting or self._raw.is_closing():
            return
        unread = unread or self._unread > 0 or (self.cycle is not None and self.cycle.more_body)
        self._arrived()
        self.parting = True
        self._settle()
        if unread:
            self._raw.write_eof()
            self.flow.resume_reading()
            self._late = self.loop.call_later(LINGER_S, self._close)
        else:
            self._close()

    def _close(self) -> None:
        self._raw.close()
        if self._raw.get_write_buffer_size():
            self._watch()


def _without_upgrade(data: bytes) -> bytes:
    """A request's first lines without an offer to change the protocol, which Java's HttpClient and
    `curl --http2` make: the parser would leave the body unread."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return UPGRADE.sub(b"\r\nx-refused-upgrade:", head) + end + rest
