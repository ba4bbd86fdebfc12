"""The way from the recipe's top to a section or a value of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from quantflow.recipe.schema import Calibration, Recipe, Weights
from quantflow.recipe.stage import Stages
from quantflow.recipe.words import Steps, did_you_mean, dotted, listing


def value_at(value: Any, path: Steps) -> Any:
    """What lies at `path` in plain data, None if nothing does."""
    for step in path:
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return None
    return value


def section(kind: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The section that a field holds, or holds a list of: Calibration for `calibration`, Override
    for `overrides`."""

    def search(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for argument in get_args(annotation):
            yield from search(argument)

    return None if field == "stages" else next(search(kind.model_fields[field].annotation), None)


def section_at(path: Steps, kinds: Stages) -> type[BaseModel]:
    """The section that the value at `path` should be."""
    kind: type[BaseModel] = Recipe
    steps = list(path)
    if len(steps) >= 3 and steps[0] == "stages":
        kind, steps = kinds[str(steps[2])], steps[3:]
    for step in steps:
        if isinstance(step, str):
            kind = section(kind, step) or kind
    return kind


def unknown_key(
    key: str, kind: type[BaseModel], kinds: Stages, path: Steps = ()
) -> tuple[str, str, str]:
    """Found, expected and hint for a key that `kind` does not have."""
    under = f" under `{dotted(path)}`" if path else ""
    fields = list(kind.model_fields)
    hint = did_you_mean(key, fields)
    if not hint:
        homes: dict[str, type[BaseModel]] = {
            "calibration": Calibration,
            "weights": Weights,
            **{f"stages.{n}": c for n, c in kinds.items()},
        }
        owners = [
            name for name, home in homes.items() if key in home.model_fields and home is not kind
        ]
        hint = (
            f"`{key}` belongs under {listing(f'`{owner}`' for owner in owners)}" if owners else ""
        )
        if key in kinds and kind is Recipe:
            hint = f"`{key}` is a stage: write `- {key}` under `stages`"
    return (
        f"unknown key `{key}`{under}",
        f"one of {listing(fields)}" if fields else "no settings",
        hint,
    )
