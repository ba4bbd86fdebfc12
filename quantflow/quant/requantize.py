"""A quantised weight in other numbers, where a format cannot hold its own: what `export
--requantize` does, and reports."""

from __future__ import annotations

from torch import Tensor

from quantflow.quant.grid import GridRules
from quantflow.quant.numbers import QuantizedTensor
from quantflow.quant.scheme import Scheme


def requantize(
    weight: Tensor, source: QuantizedTensor | None, scheme: Scheme, rules: GridRules
) -> QuantizedTensor:
    """`weight` `[N, K]` (float32) in `scheme`: on the grid it comes from, as far as that can be
    kept, or on the best that a range search finds, whichever has the smaller squared error. source:
    what `weight` was dequantised from, if anything."""
    candidates = list(scheme.numbers.candidates(weight, scheme, rules, source))
    return (
        candidates[0]
        if len(candidates) == 1
        else min(candidates, key=lambda tensor: _loss(tensor, weight))
    )


def relative_error(tensor: QuantizedTensor, weight: Tensor) -> float:
    """`|W' - W| / |W|` in the Frobenius norm; 0 for a weight of zeros that stayed so."""
    size = float(weight.double().norm())
    return _loss(tensor, weight) ** 0.5 / size if size else _loss(tensor, weight) ** 0.5


def _loss(tensor: QuantizedTensor, weight: Tensor) -> float:
    return float(tensor.dequantize().double().sub_(weight).square_().sum())
