"""A recipe as text: what a command proposes, to run as it is or to change by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Draft:
    """name: as `name_of` gives it. calibration, weights: the sections, in the order that they are
    to have. stages: names, or `{name: settings}` of one. comments: lines that stand before it
    all."""

    name: str
    model: str
    calibration: Mapping[str, Any]
    weights: Mapping[str, Any]
    stages: Sequence[str | Mapping[str, Any]]
    comments: Sequence[str] = ()

    @property
    def text(self) -> str:
        """The recipe, which `load_recipe` reads."""
        lines = [
            *(f"# {' '.join(line.split())}" for line in self.comments),
            f"name: {flow(self.name)}",
            f"model: {flow(self.model)}",
            f"calibration: {flow(self.calibration)}",
            "weights:",
            *(line for key, value in self.weights.items() for line in _lines(key, value)),
            "stages:",
            *(f"  - {_stage(stage)}" for stage in self.stages),
        ]
        return "\n".join(lines) + "\n"


def name_of(model: Path, suffix: str) -> str:
    """A recipe's name for what is made of a model: its directory's name (in the hub's cache, the
    model's), with nothing in it that a recipe's name must not have."""
    place = model.expanduser().resolve()
    cached = next(
        (part.rpartition("--")[2] for part in place.parts if part.startswith("models--")), ""
    )
    stem = (
        re.sub(r"[^A-Za-z0-9._-]+", "-", cached or place.name.removesuffix(".gguf")).lstrip("._-")
        or "model"
    )
    return stem + suffix


def flow(value: Any) -> str:
    """A value in one line, as YAML reads it back: text is quoted where it could be anything
    else."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {flow(own)}' for key, own in value.items())}}}"
    if isinstance(value, str):
        return _scalar(value)
    if isinstance(value, Sequence):
        return f"[{', '.join(map(flow, value))}]"
    return yaml.safe_dump(value).removesuffix("\n").removesuffix("\n...")


def _stage(stage: str | Mapping[str, Any]) -> str:
    if isinstance(stage, str):
        return flow(stage)
    ((name, settings),) = stage.items()
    return f"{name}: {flow(settings)}"


def _lines(key: str, value: Any) -> list[str]:
    """Of a section. A list of mappings has a line for each."""
    if value and isinstance(value, Sequence) and all(isinstance(own, Mapping) for own in value):
        return [f"  {key}:", *(f"    - {flow(own)}" for own in value)]
    return [f"  {key}: {flow(value)}"]


def _scalar(text: str) -> str:
    endless = 2**30  # no line is broken
    # The first letter: recipes are read with more kinds of numbers than yaml writes in quotes.
    plain = (
        re.fullmatch(r"(\.?/|[A-Za-z_])[A-Za-z0-9_./-]*", text)
        and yaml.safe_dump(text, width=endless).split("\n")[0] == text
    )
    return (
        text
        if plain
        else yaml.safe_dump(
            text, default_style='"', allow_unicode=True, width=endless
        ).removesuffix("\n")
    )
