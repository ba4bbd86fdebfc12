"""The kinds of numbers that weights are stored in: a file each, and a line here."""

from __future__ import annotations

from quantflow.quant.numbers.base import QuantizedTensor
from quantflow.quant.numbers.integer import IntegerTensor
from quantflow.quant.numbers.minimum import MinimumTensor
from quantflow.quant.numbers.nf4 import Nf4Tensor

NUMBERS: dict[str, type[QuantizedTensor]] = {
    kind.kind: kind for kind in (IntegerTensor, MinimumTensor, Nf4Tensor)
}

__all__ = ["NUMBERS", "QuantizedTensor"]
