"""Pydantic's errors as problems of the recipe's file."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

from quantflow.errors import Problem
from quantflow.recipe.schema import NO_STAGE, UNKNOWN_STAGE
from quantflow.recipe.sections import section_at, unknown_key, value_at
from quantflow.recipe.source import Source
from quantflow.recipe.stage import Stages, stage_name
from quantflow.recipe.words import Steps, did_you_mean, dotted, kind_of, listing, shown

_TYPES = {
    "string_type": "a text",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a mapping of keys to values",
    "finite_number": "a finite number",
}


def translate(error: dict[str, Any], source: Source) -> Problem:
    """The problem that an error of pydantic's stands for."""
    path = steps_of(error, source)
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    where, name = source.place(path), dotted(path)
    # Keys and stages that are missing or unknown.
    if kind == "missing":
        holder = section_at(path[:-1], source.kinds)
        return Problem(
            where,
            f"`{name}` is missing",
            (holder.model_fields[str(path[-1])].description or "").rstrip("."),
        )
    if kind in ("extra_forbidden", "invalid_key"):
        return Problem(where, *_unknown(path, source))
    if kind == UNKNOWN_STAGE:
        tag = str(context["tag"])
        return Problem(
            where,
            f"there is no stage `{tag}`",
            f"one of {listing(source.kinds)}",
            did_you_mean(tag, source.kinds),
        )
    if kind == NO_STAGE:
        return Problem(
            where,
            f"`{name}` is {shown(value)}",
            "a stage's name, or one name with its settings",
            _entry_hint(value, source.kinds),
        )
    # What stands there, and in which words.
    problem = f"`{name}` is {shown(value)}"
    hint = ""
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        written = source.text(path)
        if written is not None:
            problem = (
                f"`{name}` is {written}, which YAML reads as {shown(value)} ({kind_of(value)})"
            )
            hint = f'Quote it: "{written}"'
    elif kind in _TYPES:
        problem += "" if value is None else f" ({kind_of(value)})"
        if kind == "tuple_type" and isinstance(value, str):
            hint = f"Write [{value[:100]}]"
    # What would be right.
    expected = _TYPES.get(kind) or error["msg"].removeprefix("Input should be ").removeprefix(
        "Value error, "
    )
    if kind == "literal_error":
        expected = f"one of {expected}" if " or " in expected else expected
        choices = re.findall(r"'([^']*)'", expected)
        if isinstance(value, str):
            hint = did_you_mean(value, choices)
        elif (written := source.text(path)) is not None and choices:
            problem = (
                f"`{name}` is {written}, which YAML reads as {shown(value)} ({kind_of(value)})"
            )
    elif kind == "string_pattern_mismatch":
        expected = "letters, digits, '.', '_' and '-', a letter or digit first"
    elif kind == "string_too_short":
        expected = "a text that is not empty"
    if (
        kind in ("int_type", "float_type")
        and isinstance(value, str)
        and re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", value.strip(), re.I)
    ):
        hint = "Remove the quotes"
    return Problem(where, problem, expected, hint)


def steps_of(error: dict[str, Any], source: Source) -> Steps:
    """The way to the value that an error is about; in a stage by its name, `("stages", 2, "gptq",
    "damp")`, which pydantic leaves out."""
    steps: Steps = error["loc"]
    if steps[0] != "stages" or len(steps) < 2 or error["type"] in (NO_STAGE, UNKNOWN_STAGE):
        return steps
    return (*steps[:2], stage_name(value_at(source.data, steps[:2])) or "", *steps[2:])


def _unknown(path: Steps, source: Source) -> tuple[str, str, str]:
    """Found, expected and hint for the key at the end of `path`, which no section has there."""
    holder = section_at(path[:-1], source.kinds)
    return unknown_key(str(path[-1]), holder, source.kinds, path[:-1])


def is_misspelt(error: dict[str, Any], source: Source) -> bool:
    """Whether a key seems to be missing because it is there in another spelling, which is a problem
    of its own already."""
    *holder, key = steps_of(error, source)
    fields = section_at(tuple(holder), source.kinds).model_fields
    section = value_at(source.data, tuple(holder))
    unknown = [str(k) for k in section if k not in fields] if isinstance(section, dict) else []
    return error["type"] == "missing" and any(
        get_close_matches(k, fields, n=1) == [key] for k in unknown
    )


def _entry_hint(value: Any, kinds: Stages) -> str:
    if isinstance(value, dict):
        names = [key for key in value if key in kinds]
        if len(names) == 1:
            return f"Indent the settings further than `{names[0]}`, or write {names[0]}: {{…}}"
        if len(names) > 1:
            return "Begin each stage with a dash of its own"
    return ""
