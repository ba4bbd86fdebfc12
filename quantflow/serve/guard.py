"""What every request meets before a route: a key, limits on its size, where it comes from; and what
every answer carries.

Keys are compared by their digests, all of them and to the last letter, so that the time taken tells
nothing. A server on loopback and without keys answers to loopback names alone, and every server
takes nothing but JSON: no page of another site can make a browser use it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantflow.serve import log
from quantflow.serve.absent import check_present
from quantflow.serve.config import ServerConfig
from quantflow.serve.errors import Refused, asks_anthropic, response

HEALTH = ("/health", "/v1/health", "/ping")  # the last two: llama.cpp's and SageMaker's names
OPEN = HEALTH  # beside the static pages
READ_S = 30.0  # for a body to arrive
MOST_HEADER_BYTES = 32768
MOST_BODIES = 64  # of the largest kind, that are here at once
CROWDED = "crowded"  # in the state of a request that came when too many others were being answered
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src"
        " 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}

logger = logging.getLogger(__name__)


class Guard:
    """app: what is behind. static: paths that need no key. count: told the path and the status of
    each answer."""

    def __init__(
        self,
        app: ASGIApp,
        config: ServerConfig,
        static: Iterable[str],
        count: Callable[[str, int], None],
    ) -> None:
        self.app, self.config, self._count = app, config, count
        self._held = 0  # bytes of the bodies of requests that are here
        self._open = frozenset((*OPEN, *static))
        self._names = (*LOCAL_NAMES, config.host)
        self._keys = tuple(_digest(key) for key in config.keys)
        self._admin_keys = tuple(_digest(key) for key in config.admin_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        id = f"req-{secrets.token_hex(12)}"
        scope["state"]["request_id"] = id
        log.note(id, log.address(scope.get("client")))

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(scope["path"], message["status"])
                logger.debug("%s %s %d", scope["method"], scope["path"], message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers["x-request-id"] = id
                if asks_anthropic(scope):
                    headers["request-id"] = id
            await send(message)

        try:
            scope["state"]["owner"] = self._check(scope, headers)
        except Refused as error:
            await response(error, scope)(scope, receive, answer)
            return
        body = _Body(receive, self.config.max_body, self._hold)
        try:
            await self.app(scope, body.receive, answer)
        finally:
            self._held -= body.held

    def _hold(self, size: int) -> None:
        """Counts what has come of a body. Raises Refused where all of them together are too
        much."""
        if self._held + size > MOST_BODIES * self.config.max_body:
            message = "too many large requests are here at once: try again"
            raise Refused(
                503,
                message,
                code="too_many_bytes",
                headers={"retry-after": "1", "connection": "close"},
            )
        self._held += size

    def _check(self, scope: Scope, headers: Headers) -> str:
        """Who asks: "" where no key is needed. Raises Refused."""
        path = scope["path"]
        owner = ""
        if scope["state"].get(CROWDED) and path not in OPEN:
            message = (
                "too many requests are being answered for the file descriptors that there are: try"
                " again"
            )
            raise Refused(
                503,
                message,
                code="too_many_connections",
                headers={"retry-after": "1", "connection": "close"},
            )
        if (
            not self.config.keys
            and self.config.loopback
            and _host(headers.get("host", "localhost")) not in self._names
        ):
            raise Refused(
                421,
                f"host: {headers['host'][:100]!r}; expected one of {', '.join(self._names)}",
                code="unknown_host",
            )
        if path not in self._open:
            owner = self._owner(path, headers)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADER_BYTES:
            raise headers_too_large()
        check_present(path)
        length = headers.get("content-length")
        if length is not None and (
            not length.isdecimal() or len(length) > 15 or int(length) > self.config.max_body
        ):
            raise _too_large(self.config.max_body)
        if (
            scope["method"] in ("POST", "PUT", "PATCH")
            and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json"
        ):
            message = (
                f"content-type: {headers.get('content-type', 'none')[:100]!r}; expected"
                " application/json"
            )
            raise Refused(415, message, code="unsupported_media_type")
        return owner

    def _owner(self, path: str, headers: Headers) -> str:
        admin = path.startswith("/admin/")
        allowed = (
            self._admin_keys if admin else (*self._keys, *self._admin_keys) if self._keys else ()
        )
        if admin and not allowed:
            message = "administration is off: no admin key was given when the server was started"
            raise Refused(403, message, code="no_admin_key")
        if not allowed:
            return ""
        for key in _given(headers):
            # every one, whichever fits
            matches = [hmac.compare_digest(key, known) for known in allowed]
            if any(matches):
                return key.hex()
        message = "authorization: no valid key; expected 'Bearer' and a key of this server"
        raise Refused(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


class _Body:
    """A request's body as it arrives: not too much of it, and not too slowly. hold: told how much
    more there is. held: of which it took so much."""

    def __init__(self, receive: Receive, most: int, hold: Callable[[int], None]) -> None:
        self._receive, self._most, self._hold, self._whole = receive, most, hold, False
        self.held = 0
        self._until = asyncio.get_running_loop().time() + READ_S

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()  # waits for the client to go away
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise Refused(
                408,
                f"body: not there after {READ_S:g} s",
                code="timeout",
                headers={"connection": "close"},
            ) from None
        size = len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self.held + size > self._most:
            raise _too_large(self._most)
        self._hold(size)
        self.held += size
        return message


def headers_too_large() -> Refused:
    return Refused(
        431,
        f"headers: too large; expected at most {MOST_HEADER_BYTES} bytes",
        code="headers_too_large",
    )


def _too_large(most: int) -> Refused:
    return Refused(
        413,
        f"body: too large; expected at most {most} bytes",
        code="body_too_large",
        headers={"connection": "close"},
    )


def _given(headers: Headers) -> list[bytes]:
    """The digests of the keys that a request carries: OpenAI's clients write theirs one way,
    Anthropic's the other."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return [
        _digest(key.strip())
        for key in (key if scheme.lower() == "bearer" else "", headers.get("x-api-key", ""))
        if key.strip()
    ]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    name, colon, port = header.rpartition(":")
    return (name if colon and port.isdecimal() else header).lower()
