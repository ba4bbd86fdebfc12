"""How well a quantised weight stands for the original: what a report says of every linear.

Shapes: weight `[N, K]`; groups of `g` input channels, `[N, G, g]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantflow.quant.numbers import QuantizedTensor

# output channels, evenly spaced, that error and clip are measured on: each is thousands of weights
ROWS = 256


@dataclass(frozen=True)
class Fit:
    """error: `||W - Ŵ||² / ||W||²`, 0 for a weight of zeros. low, high: of the weights. clip: the
    share of each group's range (zero included) that its grid spans, the mean over groups;
    least_clip: the smallest. Both None where no group has a range, and for NF4, whose scale is the
    group's largest magnitude. More than 1: GPTQ's refinement has widened a grid. Error and clip are
    those of a sample of rows (`ROWS`)."""

    error: float
    low: float
    high: float
    clip: float | None = None
    least_clip: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a report: four digits, `None` for what is no number."""
        result: dict[str, Any] = {
            "weight_error": shown(self.error),
            "weight_range": [shown(self.low), shown(self.high)],
        }
        if self.clip is not None and self.least_clip is not None:
            result["clip"] = {"mean": shown(self.clip), "least": shown(self.least_clip)}
        return result


def shown(value: float) -> float | None:
    """Four digits of a number; None for NaN and infinities, which JSON does not have."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def fit(weight: Tensor, tensor: QuantizedTensor) -> Fit:
    """Of the weight that was rounded, and what it became."""
    low, high = weight.aminmax()
    every = slice(None, None, max(1, -(-len(weight) // ROWS)))
    part, rounded = weight[every].float(), tensor.rows(every)
    power, error = (
        float(part.square().sum()),
        float(rounded.dequantize().sub_(part).square_().sum()),
    )
    shares = rounded.spanned(part)
    clip = (
        (float(shares.mean()), float(shares.min()))
        if shares is not None and len(shares)
        else (None, None)
    )
    return Fit(error / power if power else error, float(low), float(high), *clip)
