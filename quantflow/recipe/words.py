"""Values, places and names as problems of a recipe write them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from difflib import get_close_matches
from typing import Any

from quantflow.errors import Problem

Steps = tuple[str | int, ...]  # the way to a value: keys, and positions in lists


def dotted(path: Steps) -> str:
    """`stages.gptq.damp` for `("stages", 2, "gptq", "damp")`; positions in other lists as
    `overrides[0]`."""
    if path[0] == "stages" and len(path) > 2:
        path = ("stages", *path[2:])
    return "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" for step in path
    ).removeprefix(".")


def kind_of(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "a boolean"
    names = {int: "an integer", float: "a number", str: "a text", list: "a list", dict: "a mapping"}
    return names.get(type(value), f"a {type(value).__name__}")


def shown(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict)) and len(value) > 8:  # an alias can make it huge, or endless
        return f"{kind_of(value)} of {len(value)}"
    if isinstance(value, (list, dict)):
        items = [
            kind_of(v) if isinstance(v, (list, dict)) else shown(v)
            for v in (value.values() if isinstance(value, dict) else value)
        ]
        if isinstance(value, dict):
            return (
                "{"
                + ", ".join(f"{key}: {item}" for key, item in zip(value, items, strict=True))
                + "}"
            )
        return f"[{', '.join(items)}]"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:196]}…{text[-1]}"


def listing(names: Iterable[str]) -> str:
    return ", ".join(names)


def did_you_mean(word: Hashable, known: Iterable[str]) -> str:
    near = get_close_matches(str(word), list(known), n=1)
    return f"Did you mean `{near[0]}`?" if near else ""


def line(where: str) -> int:
    end = where.rsplit(":", 1)[-1]
    return int(end) if end.isdecimal() else 0


def by_line(problem: Problem) -> tuple[bool, int]:
    """Sorts the file's problems by line, those of the command line after them."""
    return problem.where.startswith("--"), line(problem.where)
