"""`signround`: what runs it is in `signround_layer.py`, the mathematics in `quant/trained.py`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from quantflow.stages.training import TrainingStage


class Signround(TrainingStage):
    """Train how the weights of one decoder layer after the other are rounded, by the signs of
    gradients (SignRound)."""

    name: ClassVar[str] = "signround"
    example: ClassVar[str] = "- signround: {iterations: 200}"
    layer: ClassVar[str] = "quantflow.stages.signround_layer:signround_layer"

    iterations: int = Field(default=200, ge=1, le=10_000, description="Steps a layer.")
    batch: int = Field(default=8, ge=1, le=256, description="Windows a step.")

    def steps(self, windows: int) -> int:
        return self.iterations
