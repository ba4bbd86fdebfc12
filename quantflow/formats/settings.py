"""Reading a `quantization_config`, which may come from anywhere: every value is checked, and
regular expressions are kept from running for ever."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from quantflow.errors import FormatError, Problem
from quantflow.formats.weight import in_words

if TYPE_CHECKING:
    from quantflow.quant.scheme import Scheme

_LONGEST_PATTERN, _MOST_REPEATS = 100_000, 4


def setting(
    config: Mapping[str, Any],
    key: str,
    kind: type,
    where: str = "quantization_config",
    default: Any = None,
) -> Any:
    """`config[key]`, or `default` if it is absent or null. Raises FormatError if it is not of
    `kind` (a bool is no int)."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(
            Problem(
                f"{where}.{key}",
                "missing" if value is None else f"{value!r}",
                f"a value of type {kind.__name__}",
            )
        )
    return value


def names(config: Mapping[str, Any], key: str, where: str = "quantization_config") -> list[str]:
    """The list of names `config[key]`, [] if it is absent or null. Raises FormatError for anything
    else."""
    entries = setting(config, key, list, where, default=[])
    if strange := [entry for entry in entries if not isinstance(entry, str)]:
        raise FormatError(Problem(f"{where}.{key}", f"{strange[0]!r}"[:80], "names"))
    return list(entries)


def read_scheme(
    bits: int, group_size: int, symmetric: bool, where: str, kind: str = "integer"
) -> Scheme:
    """The scheme. Raises FormatError if its numbers are none that QuantFlow knows."""
    from quantflow.quant.numbers import NUMBERS
    from quantflow.quant.scheme import PER_CHANNEL, Scheme

    if bits not in (widths := NUMBERS[kind].widths):
        raise FormatError(Problem(where, f"{bits} bits", in_words(widths)))
    if group_size < 1 and group_size != PER_CHANNEL:
        raise FormatError(
            Problem(where, f"group_size {group_size}", "a positive number, or -1 for per channel")
        )
    return Scheme(bits, group_size, symmetric, kind)


def own_settings(config: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """What a `quantization_config` says of one module alone, over what it says of all: in
    GPTQModel's `dynamic`, where the first pattern counts, or in AutoRound's `extra_config`, by its
    name or the first expression found in it. None where it is left alone. Raises FormatError."""
    dynamic = setting(config, "dynamic", dict, default={})
    for pattern in dynamic:
        if matches(re.sub(r"^[+-]:", "", pattern), module):
            return (
                None
                if pattern.startswith("-:")
                else setting(dynamic, pattern, dict, "quantization_config.dynamic")
            )
    extra = setting(config, "extra_config", dict, default={})
    expressions = (key for key in extra if extra[key] and re.search(r"[^\w.-]", key))
    entry = (
        module
        if module in extra
        else next((key for key in expressions if matches(_anywhere(key), module)), None)
    )
    if entry is None:
        return {}
    own: Mapping[str, Any] = setting(extra, entry, dict, "quantization_config.extra_config")
    if (
        own.get("bits") is not None
        and setting(own, "bits", int, f"quantization_config.extra_config.{entry}") > 8
    ):
        return None
    return {key: value for key, value in own.items() if value is not None}


def _anywhere(pattern: str) -> str:
    """An expression that matches from the start what `pattern` finds anywhere."""
    return pattern if pattern.startswith((".*", "^")) and "|" not in pattern else f".*(?:{pattern})"


def matches(pattern: str, module: str) -> bool:
    """Whether a regular expression from a config matches the start of a module's name. Raises
    FormatError if it is none, or one that may take for ever."""
    return _compiled(pattern).match(module) is not None


@lru_cache(1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        if len(pattern) > _LONGEST_PATTERN or _backtracks(pattern):
            raise FormatError(
                Problem(
                    "quantization_config",
                    f"{pattern[:80]!r}, an expression that could take for ever",
                    "one without repeats of repeats, and with few of `.*`",
                )
            )
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(
            Problem("quantization_config", f"{pattern!r} is no regular expression: {error}")
        ) from error


def _backtracks(pattern: str) -> bool:
    """Whether an expression has an unbounded repeat within another, or so many that the ways to
    match a name are millions. A cheap guard: Python's engine has no limit of time."""
    text = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)  # escapes and sets are characters here
    repeat = re.compile(r"[*+]|\{\d*,\d*\}")
    depth: list[bool] = [False]  # whether each open group holds a repeat
    count = 0
    for at, character in enumerate(text):
        if character == "(":
            depth.append(False)
        elif character == ")" and len(depth) > 1:
            inner = depth.pop()
            if inner and repeat.match(text, at + 1):
                return True
            depth[-1] = depth[-1] or inner
        elif repeat.match(text, at) and text[at - 1 : at] not in ("", "("):
            depth[-1] = True
            count += 1
    return count > _MOST_REPEATS
