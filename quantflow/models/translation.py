"""Model types that compute what another family computes, under names of their own: their config and
their tensors are carried over, and the artifact is one of that family, without remote code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from quantflow.models.architecture import Architecture, Json, Source
from quantflow.models.config import DecoderConfig


def as_named(name: str, shape: tuple[int, ...], values: Json) -> dict[str, Source]:
    """A tensor that has the family's own name."""
    return {name: Source(name)}


@dataclass(frozen=True)
class Translation:
    """How a model type is read as another family.

    config: config.json -> that of the family; raises ConfigProblem for what the family does not
    compute. sources: (tensor name, its shape, config.json) -> the parts of it under the family's
    names on disk. base, base_parts: as of `Architecture`; None for the family's. note: what is
    written, for the report.
    """

    name: str
    config: Callable[[Json], Json]
    note: str
    sources: Callable[[str, tuple[int, ...], Json], dict[str, Source]] = as_named
    base: str | None = None
    base_parts: tuple[str, ...] | None = None

    def architecture(self, model_type: str, values: Json, family: Architecture) -> Architecture:
        """The model type as an architecture. values: its config.json. family: what `config` of it
        is read as."""

        def sources(name: str, shape: tuple[int, ...], config: DecoderConfig) -> dict[str, Source]:
            native: dict[str, Source] = {}
            for own, part in self.sources(name, shape, values).items():
                # Of a part that is the whole tensor the family may know parts in turn.
                whole = part.view is None and not part.unit_rows
                inner = family.sources(own, shape, config) if whole else None
                native |= {n: replace(s, name=name) for n, s in (inner or {own: part}).items()}
            return native

        return replace(
            family,
            name=self.name,
            model_types=(model_type,),
            read_config=lambda config: family.read_config(self.config(config)),
            native_config=lambda config: family.native_config(self.config(config)),
            sources=sources,
            base=family.base if self.base is None else self.base,
            base_parts=family.base_parts if self.base_parts is None else self.base_parts,
            notes=(*family.notes, self.note),
        )
