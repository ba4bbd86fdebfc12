"""JSON schemas that no value can satisfy, since they always need another of themselves.

Whoever writes text by such a schema never comes to its end: `{"$ref": "#"}`, or an object whose
required property is that object again.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

ALL, ANY = "all", "any"
BRANCHES = {"allOf": ALL, "anyOf": ANY, "oneOf": ANY}


def endless(schema: Any) -> str | None:
    """The place of a part of it that no finite value satisfies, as in `#/$defs/a`; None where there
    is none. What is not known of a part counts in its favour. Linear in the schema's size."""
    return _Parts(schema).endless()


class _Parts:
    """Parts of a schema, each of which has a finite value once enough of those that it needs have
    one."""

    def __init__(self, root: Any) -> None:
        self._root = root
        # of each part: in which other it stands, and where
        self._within = list[tuple[int | None, str]]()
        self._missing = list[int]()  # how many of its needs are not yet met
        self._needed_by = list[list[int]]()
        self._known = dict[int, int]()  # by the identity of what it was made of
        self._targets = dict[str, int | None]()
        # and not a recursion: references make long ways
        self._unread = list[tuple[int, dict[str, Any]]]()
        self._of(root, None, "#")
        while self._unread:
            self._read(*self._unread.pop())

    def endless(self) -> str | None:
        ended = [part for part, missing in enumerate(self._missing) if missing == 0]
        for part in ended:  # it grows
            for other in self._needed_by[part]:
                self._missing[other] -= 1
                if self._missing[other] == 0:
                    ended.append(other)
        return next(
            (self._place(part) for part, missing in enumerate(self._missing) if missing > 0), None
        )

    def _place(self, part: int | None) -> str:
        """Written out for the one that is told: all of them would take the square of the schema's
        size."""
        steps, at = list[str](), part
        while at is not None:
            at, step = self._within[at]
            steps.append(step)
        return "/".join(step for step in reversed(steps) if step)

    def _of(self, schema: Any, within: int | None, step: str) -> int:
        """The part's number. within: of the one in which it stands; step: the way to it from
        there."""
        if id(schema) in self._known:
            return self._known[id(schema)]
        part = self._new(within, step)
        if isinstance(schema, dict):
            self._known[id(schema)] = part
            self._unread.append((part, schema))
        return part

    def _read(self, part: int, schema: dict[str, Any]) -> None:
        target = self._target(schema.get("$ref"))
        needs = [target] if target is not None else []
        for word, how in BRANCHES.items():
            branches = [
                self._of(branch, part, f"{word}/{at}")
                for at, branch in enumerate(_list(schema.get(word)))
            ]
            if how == ALL:
                needs += branches
            elif branches:
                needs.append(self._new(part, word, branches, enough=1))
        types = schema["type"] if isinstance(schema.get("type"), list) else [schema.get("type")]
        kinds = {kind if isinstance(kind, str) else "" for kind in types}
        inside = {"object": self._members(part, schema), "array": self._items(part, schema)}
        of_kinds = [inside.get(kind, []) for kind in kinds]
        if of_kinds and all(of_kinds) and "const" not in schema and "enum" not in schema:
            needs.append(
                self._new(part, "", [self._new(part, "", parts) for parts in of_kinds], enough=1)
            )
        self._need(part, needs, len(needs))

    def _members(self, part: int, schema: dict[str, Any]) -> list[int]:
        """Those that an object must have; the others are looked at, too."""
        properties = _dict(schema.get("properties"))
        parts = {
            name: self._of(value, part, f"properties/{name}") for name, value in properties.items()
        }
        for name, value in _dict(schema.get("patternProperties")).items():
            self._of(value, part, f"patternProperties/{name}")
        self._of(schema.get("additionalProperties"), part, "additionalProperties")
        return [
            parts[name]
            for name in _list(schema.get("required"))
            if isinstance(name, str) and name in parts
        ]

    def _items(self, part: int, schema: dict[str, Any]) -> list[int]:
        """The same of an array's."""
        least_items = schema.get("minItems")
        least = least_items if isinstance(least_items, int) else 0
        first = [
            self._of(item, part, f"prefixItems/{at}")
            for at, item in enumerate(_list(schema.get("prefixItems")))
        ]
        rest = self._of(schema.get("items"), part, "items")
        return first[: max(0, least)] + ([rest] if least > len(first) else [])

    def _target(self, reference: Any) -> int | None:
        """Of a reference into this schema."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return None
        if reference not in self._targets:
            schema = self._root
            for step in map(_step, reference.split("/")[1:]):
                if isinstance(schema, dict) and step in schema:
                    schema = schema[step]
                elif isinstance(schema, list) and step.isdecimal() and int(step[:9]) < len(schema):
                    schema = schema[int(step[:9])]
                else:
                    schema = None
                    break
            self._targets[reference] = (
                self._of(schema, None, reference) if schema is not None else None
            )
        return self._targets[reference]

    def _new(
        self,
        within: int | None,
        step: str,
        needs: list[int] | None = None,
        enough: int | None = None,
    ) -> int:
        self._within.append((within, step))
        self._missing.append(0)
        self._needed_by.append([])
        part = len(self._within) - 1
        self._need(part, needs or [], len(needs or []) if enough is None else enough)
        return part

    def _need(self, part: int, needs: list[int], enough: int) -> None:
        self._missing[part] = enough
        for need in needs:
            self._needed_by[need].append(part)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _step(text: str) -> str:
    return unquote(text).replace("~1", "/").replace("~0", "~")
