"""A request's body: JSON in UTF-8, of which no part is lost, and whose parts are not so many that
reading them holds up everybody else."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from quantflow.serve.errors import Refused

MOST_DEPTH = 128  # of lists and objects in each other
# What is in a body, in all. An honest request stays far below: a million token ids are the most
# there can be of anything.
MOST_VALUES, MOST_STRINGS, MOST_MEMBERS, MOST_CONTAINERS = 2**20 + 2**16, 2**18, 2**17, 2**16
MOST_KEYS = 4096  # of one object
LARGE = 2**16  # bytes
# beside the loop, which goes on, and one after the other
_LARGE_READER = ThreadPoolExecutor(1, "large-body")
size: ContextVar[int] = ContextVar("size", default=0)  # of the body of the request at hand


class JsonRequest(Request):
    async def json(self) -> Any:
        """Raises Refused."""
        encoding = self.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            message = f"content-encoding: {encoding[:80]!r}; expected a body as it is"
            raise Refused(
                415, message, code="unsupported_encoding", headers={"accept-encoding": "identity"}
            )
        body = await self.body()
        size.set(len(body))
        if len(body) <= LARGE:
            return read(body)
        return await asyncio.get_running_loop().run_in_executor(_LARGE_READER, read, body)


class JsonRoute(APIRoute):
    """A route that reads its body so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read_so(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return read_so


def read(body: bytes) -> Any:
    """The value. Raises Refused for what is no JSON, says two things at once, or has too many
    parts."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = (
            f"body: byte {error.start} is no part of a letter in UTF-8; expected JSON in UTF-8"
        )
        raise Refused(400, message, code="invalid_utf8") from None
    _check_parts(body)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        message = (
            f"body: {half} alone is half a letter, which no UTF-8 can hold; expected the other half"
            " beside it"
        )
        raise Refused(400, message, code="invalid_utf8") from None
    except json.JSONDecodeError as error:
        message = f"body: no valid JSON ({error.msg}, line {error.lineno} column {error.colno})"
        raise Refused(400, message, code="invalid_json") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # Python reads no longer ones
        raise Refused(
            400, "body: a number of more than 4300 digits", code="number_too_long"
        ) from None


def read_text(text: str, param: str) -> Any:
    """The same of JSON that stands in a string of a body, which nobody has looked into: `param`."""
    with _within(param):
        return read(text.encode("utf-8", "surrogatepass"))


def check_texts(prompts: Iterable[str], param: str) -> None:
    """Of several such strings, before one after the other is read: together they have no more parts
    than a body may. Raises Refused."""
    with _within(param):
        _check_parts(",".join(prompts).encode("utf-8", "surrogatepass"))


@contextmanager
def _within(param: str) -> Iterator[None]:
    try:
        yield
    except Refused as error:
        raise Refused(
            400, param + error.message.removeprefix("body"), param=param, code=error.code
        ) from None


_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # of a pair, or half of one


def _no_number(name: str) -> Any:
    """NaN, Infinity and -Infinity, which Python reads and writes, and JSON does not know."""
    raise Refused(
        400, f"body: no valid JSON ({name}); expected a number or null", code="invalid_json"
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise Refused(
            400,
            f"body: {twice[:80]!r} stands in an object twice; expected it once",
            code="duplicate_key",
        )
    if len(members) > MOST_KEYS:
        raise _too_many(f"an object of {len(members)} keys; expected at most {MOST_KEYS}")
    return members


def _check_parts(body: bytes) -> None:
    """Raises Refused where there are too many, or too many in each other."""
    opened = body.count(b"[") + body.count(b"{")
    if (
        opened <= MOST_DEPTH
        and body.count(b":") <= MOST_MEMBERS
        and body.count(b",") <= MOST_VALUES
    ):
        return
    outside = _outside_strings(body)
    brackets = outside.translate(None, _NO_BRACKETS)
    opened = brackets.count(b"[") + brackets.count(b"{")
    if opened > MOST_CONTAINERS:
        raise _too_many(f"{opened} lists and objects; expected at most {MOST_CONTAINERS}")
    for mark, kind, most in (
        (b":", "members of objects", MOST_MEMBERS),
        (b",", "values", MOST_VALUES),
    ):
        if (count := outside.count(mark)) > most:
            raise _too_many(f"{count} {kind}; expected at most {most}")
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > MOST_DEPTH:
            raise _too_deep()
        # no JSON, which is read up to here alone; closing brackets may be of any number
        if depth < 0:
            return


_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _outside_strings(body: bytes) -> bytes:
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if (strings := plain.count(b'"') // 2) > MOST_STRINGS:
        raise _too_many(f"{strings} strings; expected at most {MOST_STRINGS}")
    return b"".join(plain.split(b'"')[::2])


def _too_deep() -> Refused:
    return Refused(
        400,
        f"body: lists and objects in each other; expected at most {MOST_DEPTH} deep",
        code="json_too_deep",
    )


def _too_many(message: str) -> Refused:
    return Refused(400, f"body: {message}", code="json_too_large")
