"""`calibrate`: what runs it is in `calibrate_layer.py`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from quantflow.recipe import Calibration
from quantflow.stages.base import PlannedStage
from quantflow.stages.route import ROUTE, Route


class Calibrate(PlannedStage):
    """Take statistics of every linear's input and output, and of K and V per head and channel."""

    name: ClassVar[str] = "calibrate"
    example: ClassVar[str] = "- calibrate: {route: routed}"
    layer: ClassVar[str] = "quantflow.stages.calibrate_layer:calibrate"
    finish: ClassVar[str] = "quantflow.pipeline.statistics_file:write_statistics"
    original: ClassVar[bool] = True
    measures: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True

    route: Route = Field("routed", description=ROUTE)

    def looks_at(self, calibration: Calibration) -> int:
        return calibration.samples
