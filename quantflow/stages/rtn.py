"""`rtn`: what runs it is in `nearest_layer.py`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from quantflow.recipe.stage import Stage


class Rtn(Stage):
    """Round to nearest. Needs no calibration."""

    name: ClassVar[str] = "rtn"
    example: ClassVar[str] = "- rtn: {range_search: true}"
    rounds: ClassVar[bool] = True

    range_search: bool = Field(
        default=False,
        description=(
            "Search each group's range for the least squared error, rather than take min and max."
        ),
    )
