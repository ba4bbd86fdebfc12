"""Overrides of a recipe: which module a pattern matches, and the fewest patterns that give each
module its width."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


def matches(module: str, pattern: str) -> bool:
    """Whether a shell pattern matches a module's full name, or the end of it after a dot."""
    return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"*.{pattern}")


@dataclass(frozen=True)
class Widths:
    """bits: of what no pattern matches. overrides: (pattern, bits), of which the last match
    counts."""

    bits: int
    overrides: tuple[tuple[str, int], ...]

    def of(self, module: str) -> int:
        """The width of a module."""
        return next(
            (bits for pattern, bits in reversed(self.overrides) if matches(module, pattern)),
            self.bits,
        )


def compact(widths: Mapping[str, int]) -> Widths:
    """The widths of all of a model's quantised modules as a base and a short list of overrides,
    which gives each of them just its own.

    Modules whose names differ in numbers alone (layers, experts) are a family. A family whose
    commonest width is not the base gets a pattern; then what differs from that, layers together:
    `model.layers.1[035].mlp.down_proj`.
    """
    base = _commonest(widths.values())
    families: dict[str, dict[tuple[str, ...], int]] = {}
    for module, bits in widths.items():
        families.setdefault(_NUMBER.sub(_MARK, module), {})[tuple(_NUMBER.findall(module))] = bits
    # families that have the same widths everywhere, as q, k and v
    alike: dict[tuple[tuple[tuple[str, ...], int], ...], list[str]] = {}
    for family, members in families.items():
        alike.setdefault(tuple(members.items()), []).append(family)
    overrides: list[tuple[str, int]] = []
    for members_, names in alike.items():
        for family in _joined(names):
            overrides += _of_family(family, dict(members_), base)
    rules = Widths(base, tuple(overrides))
    # a star that reached into another family
    if any(rules.of(module) != bits for module, bits in widths.items()):
        rules = Widths(
            base, tuple((module, bits) for module, bits in widths.items() if bits != base)
        )
    return rules


_MARK = "\0"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _commonest(widths: Iterable[int]) -> int:
    return Counter(widths).most_common(1)[0][0]


def _of_family(
    family: str, members: Mapping[tuple[str, ...], int], base: int
) -> list[tuple[str, int]]:
    result, usual = [], _commonest(members.values())
    if usual != base:
        result.append((family.replace(_MARK, "*"), usual))
    layers: dict[str, set[int]] = {}
    for numbers, bits in members.items():
        layers.setdefault(numbers[0] if numbers else "", set()).add(bits)
    for bits in sorted(set(members.values()) - {usual}):
        whole = [layer for layer, its in layers.items() if its == {bits}]
        result += [
            (family.replace(_MARK, numbers, 1).replace(_MARK, "*"), bits)
            for numbers in _classes(whole)
        ]
        for numbers, its in members.items():
            if its == bits and numbers[:1] and numbers[0] not in whole:
                result.append((_filled(family, numbers), bits))
    return result


def _classes(numbers: list[str]) -> list[str]:
    """Shell patterns that match just these numbers: those that differ in their last digit
    together."""
    tens: dict[str, list[str]] = {}
    for number in numbers:
        tens.setdefault(number[:-1], []).append(number[-1:])
    return [
        ten + (digits[0] if len(digits) == 1 else f"[{''.join(digits)}]")
        for ten, digits in tens.items()
    ]


def _joined(names: list[str]) -> list[str]:
    """One pattern for names that differ in one letter alone, `self_attn.[qkv]_proj`; else the
    names."""
    if len({len(name) for name in names}) == 1 and len(names) > 1:
        columns = [sorted(set(column_parts)) for column_parts in zip(*names, strict=True)]
        if sum(len(column) > 1 for column in columns) == 1:
            return [
                "".join(
                    column[0] if len(column) == 1 else f"[{''.join(column)}]" for column in columns
                )
            ]
    return names


def _filled(family: str, numbers: tuple[str, ...]) -> str:
    for number in numbers:
        family = family.replace(_MARK, number, 1)
    return family
