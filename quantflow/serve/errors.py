"""What a client is told when it does not get what it asked for: OpenAI's error body, or Anthropic's
where that API is asked, whatever went wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Scope

from quantflow.errors import Problem, RequestError
from quantflow.serve.wire import Json

LONG_WORD = re.compile(r"(\S{79})\S{2,}")
MOST_CHARACTERS = 1000  # of a message


class Refused(HTTPException):
    """An answer that is an error. param: the name of what is wrong in the request; code: a name for
    programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, shortened(message), dict(headers or {}))
        self.status, self.message, self.param, self.code = (
            status,
            shortened(message),
            param and shortened(param),
            code,
        )

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": kind(self.status),
                "param": self.param,
                "code": self.code,
            }
        }


def shortened(text: str) -> str:
    """A message that may hold what a client sent, a number of thousands of digits, say: words of at
    most 80 characters, 1000 in all."""
    short = LONG_WORD.sub(r"\1…", text)
    return short if len(short) <= MOST_CHARACTERS else short[: MOST_CHARACTERS - 1] + "…"


def kind(status: int) -> str:
    """OpenAI's `type` of an error."""
    named = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    return named.get(status, "invalid_request_error" if status < 500 else "server_error")


def refused(problems: Sequence[Problem], renamed: Mapping[str, str] | None = None) -> Refused:
    """What the engine would not take. renamed: what the client calls the engine's arguments."""
    names = renamed or {}
    first = problems[0]
    param = names.get(first.where, first.where)
    message = "; ".join(
        str(Problem(names.get(p.where, p.where), p.found, p.expected, p.hint)) for p in problems[:5]
    )
    return Refused(400, message, param=param, code=first.code or "invalid_value")


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """For an API with other names for what the rest of the server speaks of: errors are refusals
    that name what the client sent."""
    try:
        yield
    except RequestError as error:
        raise refused(error.problems, names) from error
    except Refused as error:
        if error.param is None or error.param not in names:
            raise
        name = names[error.param]
        message = name + error.message.removeprefix(error.param)
        raise Refused(
            error.status, message, param=name, code=error.code, headers=error.headers
        ) from error


def shutting_down() -> Refused:
    return Refused(
        503,
        "the server is shutting down",
        code="shutting_down",
        headers={"connection": "close", "retry-after": "10"},
    )


def engine_stopped() -> Refused:
    """Whatever it died of, which is in the server's log."""
    return Refused(503, "the engine has stopped", code="engine_stopped")


def aborted() -> Refused:
    """The server's end, or an administrator's word."""
    return Refused(503, "the server ended this request", code="aborted")


def response(error: Refused, scope: Scope | None = None) -> Json:
    """scope: of the request, where there is one to speak of."""
    body = (
        anthropic_body(error, scope["state"]["request_id"])
        if scope and asks_anthropic(scope)
        else error.body
    )
    return Json(body, error.status, error.headers)


def asks_anthropic(scope: Scope) -> bool:
    """Whether a request is made in the words of Anthropic's API, whose clients all say its
    version."""
    return scope["path"].startswith("/v1/messages") or "anthropic-version" in Headers(scope=scope)


def anthropic_body(error: Refused, request_id: str) -> dict[str, Any]:
    default = "invalid_request_error" if error.status < 500 else "api_error"
    body: dict[str, Any] = {
        "type": ANTHROPIC_KINDS.get(error.status, default),
        "message": error.message,
    }
    if error.code == NO_THREAD:
        body["details"] = {"error_code": NO_THREAD}
    return {"type": "error", "error": body, "request_id": request_id}


NO_THREAD = "thread_unsupported_request"  # Anthropic's code for what its clients do without
ANTHROPIC_KINDS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    409: "conflict_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
