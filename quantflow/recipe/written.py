"""A recipe as it is written, before anything of it is known to be valid: what checks of values
together look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantflow.recipe.source import Source
from quantflow.recipe.words import Steps


@dataclass(frozen=True)
class Entry:
    """An entry of `stages`. settings: {} where they are no mapping. place: `file:line`."""

    position: int
    name: str
    settings: dict[Any, Any]
    place: str

    def steps(self, key: str) -> Steps:
        """The way to one of its settings."""
        return "stages", self.position, self.name, key


@dataclass(frozen=True)
class Written:
    source: Source

    @cached_property
    def entries(self) -> list[Entry]:
        """Those whose name is known, or could be mended."""
        return [
            Entry(position, name, settings, self.source.place(("stages", position)))
            for position, name, settings in self.source.stages()
            if name is not None
        ]

    @cached_property
    def names(self) -> list[str]:
        return [entry.name for entry in self.entries]

    @cached_property
    def complete(self) -> bool:
        """Whether all stages are known: an unknown one may be the one that seems to be missing."""
        stages = self.source.data.get("stages")
        return isinstance(stages, list) and all(name for _, name, _ in self.source.stages())

    def at(self, name: str) -> str:
        """The place of the first entry of that name."""
        return next(entry.place for entry in self.entries if entry.name == name)

    def having(self, what: str) -> list[str]:
        """The names of the stages of which that is true: `rounds`, `measures`, …; each once, in the
        registry's order."""
        stages = self.source.kinds.items()
        return [name for name, stage in stages if name in self.names and getattr(stage, what)]

    @cached_property
    def only_measures(self) -> bool:
        """LMDeploy's users take the KV cache's parameters of a model whose weights stay as they
        are."""
        changing = self.having("rounds") or self.having("unrounded")
        return (
            not changing
            and self.source.data.get("weights") is None
            and bool(self.having("measures"))
        )

    @property
    def weights(self) -> dict[Any, Any]:
        """The section, {} where it is none."""
        weights = self.source.data.get("weights")
        return weights if isinstance(weights, dict) else {}

    def of_weights(self, keys: Iterable[str]) -> Iterator[tuple[Steps, Any]]:
        """Where `weights` and its overrides say something of `keys`, and what."""
        yield from ((("weights", key), self.weights[key]) for key in keys if key in self.weights)
        for position, override in self.overrides():
            for key in keys:
                if override.get(key) is not None:
                    yield ("weights", "overrides", position, key), override[key]

    def overrides(self) -> Iterator[tuple[int, dict[Any, Any]]]:
        """Position and mapping of those that are mappings."""
        overrides = self.weights.get("overrides")
        for position, override in enumerate(overrides if isinstance(overrides, list) else []):
            if isinstance(override, dict):
                yield position, override
