"""`block_ap`: what runs it is in `block_ap_layer.py`, the mathematics in `quant/trained.py`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from quantflow.stages.training import TrainingStage

Rate = Annotated[float, Field(ge=0, le=1)]
# of weights and of grids: from the range of least error, and from what another stage has rounded
ALONE, BEGUN = (0.01, 0.003), (0.003, 0.001)


class BlockAp(TrainingStage):
    """Train weights, scales and zero points of one decoder layer after the other, seen through
    rounding (EfficientQAT's Block-AP)."""

    name: ClassVar[str] = "block_ap"
    example: ClassVar[str] = "- block_ap: {epochs: 2, batch: 2}"
    layer: ClassVar[str] = "quantflow.stages.block_ap_layer:block_ap_layer"

    epochs: int = Field(default=2, ge=1, le=100, description="Passes over the windows.")
    weight_lr: Rate | None = Field(
        default=None,
        description=(
            "Learning rate of the weights, in steps of their linear's grid. Left out: 0.01, or"
            " 0.003 where another stage has rounded before."
        ),
    )
    scale_lr: Rate | None = Field(
        default=None,
        description=(
            "Learning rate of the scales, as a share of them, and of the zero points. Left out:"
            " 0.003, or 0.001."
        ),
    )

    def rates(self, *, begun: bool) -> tuple[float, float]:
        """Of the weights, and of their grids. begun: another stage has rounded before."""
        weights, grids = BEGUN if begun else ALONE
        return (
            weights if self.weight_lr is None else self.weight_lr,
            grids if self.scale_lr is None else self.scale_lr,
        )

    def steps(self, windows: int) -> int:
        return self.epochs * -(-windows // self.batch)
