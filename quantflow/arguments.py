"""Messages for who calls a function: what they call an option of the command line, `--dtype
float16`, is an argument, `dtype="float16"`."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from quantflow.errors import QuantFlowError

OTHER_NAMES = {"set": "overrides"}
# Of these, the next word is a value; of the others, a placeholder (DIR) or a number is.
CHOICES = ("format", "dtype", "kv_scales", "device", "kv")
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*)(?: ([\w./=]*\w))?")


def for_callers(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose errors name its arguments in place of a verb's options."""
    parameters = inspect.signature(function).parameters

    def argument(match: re.Match[str]) -> str:
        option, word = match[1], match[2] or ""
        name = OTHER_NAMES.get(option, option.replace("-", "_"))
        if name not in parameters:
            return match[0]
        behind = f" {word}" if word else ""
        if isinstance(parameters[name].default, bool):
            return f"{name}=True{behind}"
        if name == "overrides" and "=" in word:
            return f'{name}=["{word}"]'
        if word.isupper() or word.isdecimal():
            return f"{name}={word}"
        return f'{name}="{word}"' if word and name in CHOICES else f"{name}{behind}"

    def reworded(text: str) -> str:
        # what stands in backticks is a command
        parts = text.split("`")
        return "`".join(
            part if odd % 2 else OPTION.sub(argument, part) for odd, part in enumerate(parts)
        )

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except QuantFlowError as error:
            texts = ("where", "found", "expected", "hint")
            error.problems = tuple(
                replace(problem, **{name: reworded(getattr(problem, name)) for name in texts})
                for problem in error.problems
            )
            error.args = ("\n".join(map(str, error.problems)),)
            raise

    return call
