"""What a client is told when it does not get what it asked for: OpenAI's error body, whatever went wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

from quantflow.errors import Problem
from quantflow.serve.wire import Json

LONG_WORD = re.compile(r"(\S{79})\S{2,}")
MOST_LETTERS = 1000  # of a message


class Refused(HTTPException):
    """An answer that is an error. param: the name of what is wrong in the request; code: a name for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, shortened(message), dict(headers or {}))
        self.status, self.message, self.param, self.code = status, shortened(message), param and shortened(param), code

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": kind(self.status), "param": self.param, "code": self.code}}


def shortened(text: str) -> str:
    """A message that may hold what a client sent, a number of thousands of digits, say: words of at most 80 letters, 1000 in all."""
    found = LONG_WORD.sub(r"\1…", text)
    return found if len(found) <= MOST_LETTERS else found[: MOST_LETTERS - 1] + "…"


def kind(status: int) -> str:
    """OpenAI's `type` of an error."""
    named = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return named.get(status, "invalid_request_error" if status < 500 else "server_error")


def refused(problems: Sequence[Problem], renamed: Mapping[str, str] | None = None) -> Refused:
    """What the engine would not take. renamed: what the client calls the engine's arguments."""
    names = renamed or {}
    first = problems[0]
    param = names.get(first.where, first.where)
    message = "; ".join(str(Problem(names.get(p.where, p.where), p.found, p.expected, p.hint)) for p in problems[:5])
    return Refused(400, message, param=param, code=first.code or "invalid_value")


def engine_stopped() -> Refused:
    """Whatever it died of, which is in the server's log."""
    return Refused(503, "the engine has stopped", code="engine_stopped")


def response(error: Refused) -> Json:
    return Json(error.body, error.status, error.headers)
