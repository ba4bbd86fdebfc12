"""`gptq`: what runs it is in `gptq_layer.py`, the mathematics in `quant/gptq.py`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from quantflow.recipe import Calibration
from quantflow.stages.rounding import RoundingStage
from quantflow.stages.route import ROUTE, Route


class Gptq(RoundingStage):
    """Round with error feedback through the inverse Hessian of the layer's inputs (GPTQ)."""

    name: ClassVar[str] = "gptq"
    example: ClassVar[str] = "- gptq: {act_order: static, damp: 0.01}"
    layer: ClassVar[str] = "quantflow.stages.gptq_layer:gptq_layer"
    rounder: ClassVar[str] = "quantflow.stages.gptq_layer:gptq_rounder"
    needs_calibration: ClassVar[bool] = True

    act_order: Literal["none", "static", "dynamic"] = Field(
        default="static",
        description=(
            "Order of the columns. static: by importance, groups stay contiguous, every format"
            " holds it. dynamic: groups follow the order (g_idx), for the GPTQ formats and plain"
            " weights."
        ),
    )
    damp: float = Field(
        0.01, gt=0, lt=1, description="Added to the Hessian's diagonal, as a share of its mean."
    )
    range_search: bool = Field(
        default=True,
        description=(
            "Search each group's range for the least weighted error, rather than take min and max."
        ),
    )
    refine: int = Field(
        default=4,
        ge=0,
        le=100,
        description="Passes of coordinate descent over codes and scales after GPTQ; 0: plain GPTQ.",
    )

    route: Route = Field("routed", description=ROUTE)

    @property
    def indexed(self) -> bool:
        return self.act_order == "dynamic"

    def looks_at(self, calibration: Calibration) -> int:
        return calibration.samples
