"""`rtn`: what runs it is in `nearest_layer.py`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from quantflow.stages.rounding import RoundingStage


class Rtn(RoundingStage):
    """Round to nearest. Needs no calibration."""

    name: ClassVar[str] = "rtn"
    example: ClassVar[str] = "- rtn: {range_search: true}"
    layer: ClassVar[str] = "quantflow.stages.nearest_layer:rtn_layer"

    range_search: bool = Field(
        default=False,
        description=(
            "Search each group's range for the least squared error, rather than take min and max."
        ),
    )
