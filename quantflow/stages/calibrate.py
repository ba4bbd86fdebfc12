"""`calibrate`: what runs it is in `calibrate_layer.py`."""

from __future__ import annotations

from typing import ClassVar

from quantflow.recipe.stage import Stage


class Calibrate(Stage):
    """Take statistics of every linear's input and output, and of K and V per head and channel."""

    name: ClassVar[str] = "calibrate"
    example: ClassVar[str] = "- calibrate"
    measures: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
