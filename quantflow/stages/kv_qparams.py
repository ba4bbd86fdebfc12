"""`kv_qparams`: what runs it is in `kv_parameters.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from quantflow.errors import Problem
from quantflow.recipe import Calibration
from quantflow.recipe.written import Entry, Written
from quantflow.stages.base import PlannedStage


class KvQparams(PlannedStage):
    """Scales and zero points for an int8 KV cache, measured on the K and V of the quantised
    model."""

    name: ClassVar[str] = "kv_qparams"
    example: ClassVar[str] = "- kv_qparams: {symmetric: false, granularity: tensor}"
    layer: ClassVar[str] = "quantflow.stages.kv_parameters:keep_extremes"
    finish: ClassVar[str] = "quantflow.pipeline.kv_files:write_parameters"
    measures: ClassVar[bool] = True
    alters: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True

    bits: Literal[8] = Field(default=8, description="Bits a cached value.")
    symmetric: bool = Field(
        default=False,
        description="absmax / 127 without a zero point, rather than (max - min) / 255.",
    )
    granularity: Literal["tensor", "head", "channel"] = Field(
        default="tensor", description="Values that share a scale."
    )

    @classmethod
    def check(cls, recipe: Written, entry: Entry) -> Iterator[Problem]:
        if recipe.complete and "calibrate" not in recipe.names:
            yield Problem(
                entry.place,
                "kv_qparams without calibrate",
                "`- calibrate` first, for the ranges of K and V",
            )

    def looks_at(self, calibration: Calibration) -> int:
        return calibration.samples

    def identity(self) -> dict[str, Any]:
        return {}  # the extremes that are stored serve all settings
