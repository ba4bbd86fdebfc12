"""`awq`: what runs it is in `awq_layer.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from quantflow.errors import Problem
from quantflow.recipe import Calibration
from quantflow.recipe.written import Entry, Written
from quantflow.stages.base import PlannedStage


class Awq(PlannedStage):
    """Scale the channels that the activations make important, folded into the preceding norm or
    linear (AWQ)."""

    name: ClassVar[str] = "awq"
    example: ClassVar[str] = "- awq: {grid: 20, clip: true}"
    layer: ClassVar[str] = "quantflow.stages.awq_layer:awq_layer"
    unrounded: ClassVar[str] = "awq only scales: add `- rtn` or `- gptq` after it"
    needs_calibration: ClassVar[bool] = True

    grid: int = Field(
        default=20,
        ge=1,
        le=1000,
        description="Steps of the exponent between 0 and 1 that the scale search tries.",
    )
    clip: bool = Field(
        default=True, description="Also search for the range that each group is clipped to."
    )
    max_tokens: int = Field(
        default=8192,
        ge=1,
        description="Calibration tokens that the loss of the searches is measured on, at most.",
    )

    @classmethod
    def check(cls, recipe: Written, entry: Entry) -> Iterator[Problem]:
        kind = recipe.weights.get("numbers", "integer")
        if kind != "integer":
            yield Problem(
                entry.place,
                f"awq with `weights.numbers: {kind}`",
                "integer",
                "AWQ searches its scales for a grid of integers",
            )

    def looks_at(self, calibration: Calibration) -> int:
        return self.windows_of(calibration.samples, calibration.seqlen)

    def windows_of(self, windows: int, length: int) -> int:
        """As many whole ones as `max_tokens` allows, and one at least."""
        return min(windows, max(1, self.max_tokens // length))

    def parts(self, linears: int, experts: int) -> int:
        return 3 + max(1, experts)  # searches: of each expert's `down` one
