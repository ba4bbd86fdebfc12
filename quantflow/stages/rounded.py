"""What rounding begins from and what it leaves, of a layer's linears; and rounding to nearest,
which others fall back to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantflow.quant.fit import fit
from quantflow.quant.grid import GridRules
from quantflow.quant.numbers import QuantizedTensor
from quantflow.quant.scheme import Scheme
from quantflow.stages.folding import Folding

ScaledRounder = Callable[[Tensor], Callable[[Tensor, Scheme], Tensor]]
Rounder = Callable[[Tensor], ScaledRounder]
"""How the recipe's next stage would round: Hessian of the unscaled input -> scale -> (weight `[N,
K]`, scheme) -> rounded weight."""


@dataclass(frozen=True)
class Unrounded:
    """What a layer's rounding begins from. tensors: as stored. folding: the scales that are folded
    into them first. schemes: linear -> its scheme."""

    tensors: Mapping[str, Tensor]
    folding: Folding
    schemes: Mapping[str, Scheme]
    rules: GridRules

    def weight(self, linear: str) -> Tensor:
        """The folded weight in at least float32, a fresh tensor."""
        return self.folding.weight(linear, self.tensors[f"{linear}.weight"])

    def plain(self, linear: str) -> Tensor:
        """The same; as it is stored, and no copy, where nothing is folded into it."""
        touched = linear in self.folding.columns or linear in self.folding.rows
        return self.weight(linear) if touched else self.tensors[f"{linear}.weight"]


@dataclass(frozen=True)
class Quantized:
    """A linear's canonical tensor, and its line of the report."""

    tensor: QuantizedTensor
    report: dict[str, Any]


def line(
    weight: Tensor,
    tensor: QuantizedTensor,
    rules: GridRules,
    *,
    method: str,
    fallback: str = "",
    **more: Any,
) -> dict[str, Any]:
    remarks = tensor.remarks(rules)
    fallback = "; ".join(filter(None, (fallback, remarks.pop("fallback", ""))))
    said = {k: v for k, v in {**more, "fallback": fallback}.items() if v not in ("", None)}
    return {
        "scheme": str(tensor.scheme),
        "method": method,
        **said,
        **remarks,
        **fit(weight, tensor).as_dict(),
    }


def nearest_linear(
    weight: Tensor,
    scheme: Scheme,
    rules: GridRules,
    *,
    search: bool,
    importance: Tensor | None = None,
    fallback: str = "",
) -> Quantized:
    """One linear, rounded to the nearest of its numbers; with `importance` (AWQ's clip search) on
    the range of least output error."""
    tensor = scheme.numbers.quantize(
        weight, scheme, rules, search=search or importance is not None, importance=importance
    )
    return Quantized(tensor, line(weight, tensor, rules, method=tensor.method, fallback=fallback))
