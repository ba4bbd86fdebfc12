"""What is wrong with a request that is not of the declared types, in OpenAI's words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError

from quantflow.serve.errors import Refused
from quantflow.serve.fields import REFUSED

# what pydantic calls those of unions
BRANCHES = ("str", "text", "texts", "tokens", "lists", "named", "allowed")

NAME = re.compile(r"[a-z][a-z_]*$")

MOST_NAME = 100  # letters of a client's own word in a message


def unreadable(error: RequestValidationError) -> Refused:
    """A refusal in OpenAI's words, for a request that pydantic does not accept."""
    problems = []
    for problem in _telling(error.errors())[:5]:
        # whatever it is called, it is a name
        last = len(problem["loc"]) - 1 if problem["type"] == "extra_forbidden" else 0
        place = [
            _shown(part)
            for at, part in enumerate(problem["loc"])
            if at and (at == last or _is_name(part, at))
        ]
        param = (
            "".join(
                f"[{part}]" if isinstance(part, int) else f".{part}" for part in place
            ).removeprefix(".")
            or "body"
        )
        if problem["type"] == "extra_forbidden":
            problems.append(
                (
                    param,
                    f"{param}: unknown parameter; expected one of the API's",
                    "unknown_parameter",
                )
            )
        elif problem["type"] == REFUSED:
            problems.append((param, f"{param}: {problem['msg']}", REFUSED))
        else:
            message = problem["msg"][:1].lower() + problem["msg"][1:]
            problems.append(
                (
                    param,
                    f"{param}: {message}",
                    "missing" if problem["type"] == "missing" else "invalid_value",
                )
            )
    param, _, code = problems[0]
    return Refused(
        400,
        "; ".join(dict.fromkeys(message for _, message, _ in problems)),
        param=param[:200],
        code=code,
    )


def _shown(part: int | str) -> int | str:
    return part[:MOST_NAME] if isinstance(part, str) else part


def _is_name(part: int | str, at: int) -> bool:
    """Whether a part of a place is a parameter's name or an item's number, and not a branch of a
    union."""
    return isinstance(part, int) or (
        NAME.match(part) is not None and (at < 2 or part not in BRANCHES)
    )


def _telling(problems: Sequence[Any]) -> list[Any]:
    """Of the problems of each parameter, the most telling: where a union's branches all
    complain, those that fit but for a detail, or else those that fit the furthest."""
    groups: dict[Any, list[Any]] = {}
    for problem in problems:
        groups.setdefault(problem["loc"][1:2], []).append(problem)
    telling = []
    for group in groups.values():
        details = [p for p in group if not p["type"].endswith("_type")]
        deepest = max(len(p["loc"]) for p in group)
        telling += details or [p for p in group if len(p["loc"]) == deepest]
    return telling
