"""A stage as the plan and the run see it: what it asks for, and where the code is that does it.

A stage's settings import no torch, and what it computes imports no pydantic, so the two stand in
two files: the settings name the code as "module:function".
"""

from __future__ import annotations

from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Any, ClassVar, Self

from quantflow.models.config import DecoderConfig
from quantflow.recipe import Calibration, Recipe, Stage


class PlannedStage(Stage):
    """A stage that does its part in a run.

    layer: what it does to one decoder layer, given the stage and a `LayerWork`. original: it looks
    at the full-precision model's stream, in a pass of its own; else at the stream that the stages
    before it have altered. finish: what it does to the artifact when all layers are done, given the
    stage and the run's `Build`; phase: of the run that this counts as.
    """

    layer: ClassVar[str] = ""
    original: ClassVar[bool] = False
    finish: ClassVar[str] = ""
    phase: ClassVar[str] = "pack"

    def looks_at(self, calibration: Calibration) -> int:
        """Windows of the stream that it looks at; 0 of one that looks at weights alone."""
        return 0

    def resolved(self, config: DecoderConfig) -> Self:
        """With the model's numbers where the recipe leaves them open."""
        return self

    def notes(self) -> Iterator[str]:
        """What is to be known of it before a run, each in a sentence."""
        yield from ()

    @property
    def ranks(self) -> int:
        """How many ranks it cuts the checkpoint for."""
        return 1

    def identity(self) -> dict[str, Any]:
        """What of its settings the layers' stored results depend on."""
        return self.model_dump(mode="json")

    def parts(self, linears: int, experts: int) -> int:
        """Equal parts of a layer's work that it tells of as they are done. linears: that are
        quantised."""
        return 0

    @classmethod
    def modules(cls) -> tuple[str, ...]:
        """Where its code for layers is: what these import is in the identity of its results."""
        return (cls.layer.partition(":")[0],)


def planned(recipe: Recipe) -> Iterator[PlannedStage]:
    """The recipe's stages, in its order."""
    return (stage for stage in recipe.stages if isinstance(stage, PlannedStage))


def code(place: str) -> Any:
    """The function that "module:function" names."""
    return resolve_name(place)
