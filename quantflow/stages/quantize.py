"""`rtn` and `gptq` on the linears of one input group: fold, quantise, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantflow.calibration.statistics import Hessian
from quantflow.quant.fit import fit, shown
from quantflow.quant.gptq import Factor, factorize, output_error, quantize_gptq
from quantflow.quant.grid import NF4, AnyTensor, QuantizedTensor, Scheme
from quantflow.quant.nf4 import quantize_nf4
from quantflow.quant.rtn import GridRules, quantize_rtn
from quantflow.stages.awq import Rounder
from quantflow.stages.folding import Folding


@dataclass(frozen=True)
class Quantized:
    """A linear's canonical tensor, and its line of the report."""

    tensor: AnyTensor
    report: dict[str, Any]


def _line(weight: Tensor, tensor: QuantizedTensor, rules: GridRules, *, fallback: str = "", **more: Any) -> dict[str, Any]:
    if clamped := rules.clamped(tensor.scales):
        dtypes = " and ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in rules.scale_dtypes))
        fallback = "; ".join(filter(None, (fallback, f"{clamped} of {tensor.scales.numel()} scales clamped to what {dtypes} hold")))
    said = {k: v for k, v in {**more, "fallback": fallback}.items() if v not in ("", None)}
    return {"scheme": str(tensor.scheme), **said, **fit(weight, tensor).as_dict()}


def rtn_linear(
    weight: Tensor, scheme: Scheme, rules: GridRules, *, search: bool, importance: Tensor | None = None, fallback: str = ""
) -> Quantized:
    """One linear, rounded to nearest; with `importance` (AWQ's clip search) on the range of least output error."""
    tensor = quantize_rtn(weight, scheme, rules, search=search or importance is not None, importance=importance)
    return Quantized(tensor, _line(weight, tensor, rules, method="rtn", fallback=fallback))


def nf4_linear(weight: Tensor, scheme: Scheme) -> Quantized:
    """One linear, in the nearest of NF4's numbers."""
    tensor = quantize_nf4(weight, scheme)
    empty = int(tensor.codes.view(*tensor.scales.shape, -1).eq(NF4.index(0.0)).all(-1).sum())  # a scale of 0 does not survive double
    report = {"scheme": str(scheme), "method": "nf4", **({"zero_blocks": empty} if empty else {})}
    return Quantized(tensor, report | fit(weight, tensor).as_dict())


def factor_for(hessian: Hessian, settings: Any) -> Factor | None:
    """The Hessian's factor for a recipe's gptq settings; None where it has none, or no token was seen."""
    return factorize(hessian.matrix, damp=settings.damp, act_order=settings.act_order != "none") if hessian.rows else None


def gptq_group(
    stored: Mapping[str, Tensor], folding: Folding, schemes: Mapping[str, Scheme], group: list[str], seen: Hessian, factor: Factor | None,
    rules: GridRules, settings: Any,
) -> dict[str, Quantized]:  # fmt: skip
    """The linears of `group`, which share the input that `seen` has seen, by GPTQ. Those of one scheme are solved together.

    An expert that saw no token is rounded to nearest, and the report says so.
    """
    found: dict[str, Quantized] = {}
    hessian, rows = seen.matrix, seen.rows
    if not rows:
        for n in group:
            weight = folding.weight(n, stored[f"{n}.weight"])
            found[n] = rtn_linear(
                weight, schemes[n], rules, search=settings.range_search, fallback="no calibration token: rounded to nearest"
            )
        return found
    for scheme in dict.fromkeys(schemes[n] for n in group):
        members = [n for n in group if schemes[n] == scheme]
        weights = [folding.weight(n, stored[f"{n}.weight"]) for n in members]
        sizes = [len(weight) for weight in weights]
        together = weights[0] if len(weights) == 1 else torch.cat(weights)
        weights = list(together.split(sizes))
        result = quantize_gptq(
            together, hessian, factor, scheme, rules, act_order=settings.act_order, search=settings.range_search, refine=settings.refine,
        )  # fmt: skip
        start = 0
        for n, weight in zip(members, weights, strict=True):
            part = slice(start, start + len(weight))
            start += len(weight)
            whole = result.tensor
            tensor = whole.rows(part)
            error = shown(output_error(weight, tensor.dequantize(), hessian))
            found[n] = Quantized(tensor, _line(weight, tensor, rules, method="gptq", error=error, tokens=rows, fallback=result.fallback))
    return found


def gptq_rounder(rules: GridRules, settings: Any) -> Rounder:
    """What GPTQ (without refinement) makes of a scaled weight, seen from the unscaled input: for AWQ's choice among its finalists."""

    def rounder(hessian: Tensor) -> Callable[[Tensor], Callable[[Tensor, Scheme], Tensor]]:
        factor = factorize(hessian, damp=settings.damp, act_order=settings.act_order != "none")

        def of_scale(scale: Tensor) -> Callable[[Tensor, Scheme], Tensor]:
            scaled, scaled_factor = hessian / scale[:, None] / scale, factor and factor.of_scaled(scale)

            def round_scaled(weight: Tensor, scheme: Scheme) -> Tensor:
                result = quantize_gptq(
                    weight.float() * scale, scaled, scaled_factor, scheme, rules,
                    act_order=settings.act_order, search=settings.range_search, refine=0,
                )  # fmt: skip
                return result.tensor.dequantize() / scale

            return round_scaled

        return of_scale

    return rounder
