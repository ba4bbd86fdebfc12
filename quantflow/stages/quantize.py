"""Rounding to nearest, and `gptq`, on the linears of one segment: fold, quantise, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantflow.calibration.statistics import Hessian
from quantflow.quant.fit import fit, shown
from quantflow.quant.gptq import Factor, factorize, output_error, quantize_gptq
from quantflow.quant.grid import GridRules
from quantflow.quant.numbers import QuantizedTensor
from quantflow.quant.scheme import Scheme
from quantflow.stages.awq_layer import Rounder
from quantflow.stages.folding import Folding

Rows = Callable[[], Iterator[Tensor]]


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


def _line(
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
    return Quantized(tensor, _line(weight, tensor, rules, method=tensor.method, fallback=fallback))


def nearest_segment(
    source: Unrounded, names: Sequence[str], *, search: bool, importance: Mapping[str, Tensor]
) -> Iterator[tuple[str, Quantized]]:
    """The linears `names` of a segment, each rounded for itself, to the nearest of its scheme's
    numbers. search, importance: see `nearest_linear`."""
    for n in names:
        yield (
            n,
            nearest_linear(
                source.plain(n),
                source.schemes[n],
                source.rules,
                search=search,
                importance=importance.get(n),
            ),
        )


def gptq_segment(
    source: Unrounded,
    names: Sequence[str],
    channels: int,
    rows: Rows,
    settings: Any,
    device: torch.device,
) -> Iterator[tuple[str, Quantized]]:
    """The linears `names` of a segment by GPTQ. Those of one scheme are solved together.

    channels: of what the segment reads. rows: what it reads, some windows at a time; it may be
    called again. An expert that saw no token is rounded to nearest, and the report says so.
    """
    if not names:
        return
    hessian = _hessian(channels, rows, device)
    factor = _factor(hessian, settings)
    if hessian.rounded and (factor is None or factor.fallback):
        # Under strong outliers bfloat16's rounding alone can cost the matrix its definiteness: look
        # again, exactly.
        hessian = _hessian(channels, rows, device, exact=True)
        factor = _factor(hessian, settings)
    if hessian.rows:
        for scheme in dict.fromkeys(source.schemes[n] for n in names):
            yield from _solve(
                source,
                [n for n in names if source.schemes[n] == scheme],
                scheme,
                hessian,
                factor,
                settings,
            )
    else:
        for n in names:
            reason = "no calibration token: rounded to nearest"
            yield (
                n,
                nearest_linear(
                    source.weight(n),
                    source.schemes[n],
                    source.rules,
                    search=settings.range_search,
                    fallback=reason,
                ),
            )


def _hessian(channels: int, rows: Rows, device: torch.device, *, exact: bool = False) -> Hessian:
    hessian = Hessian(channels, device, exact=exact)
    for part in rows():
        hessian.add(part)
    return hessian


def _factor(hessian: Hessian, settings: Any) -> Factor | None:
    """None where the matrix has none, or no token was seen."""
    return (
        factorize(hessian.matrix, damp=settings.damp, act_order=settings.act_order != "none")
        if hessian.rows
        else None
    )


def _solve(
    source: Unrounded,
    names: list[str],
    scheme: Scheme,
    seen: Hessian,
    factor: Factor | None,
    settings: Any,
) -> Iterator[tuple[str, Quantized]]:
    """Linears of one scheme that share an input, their rows under one another."""
    weights = [source.weight(n) for n in names]
    sizes = [len(weight) for weight in weights]
    together = weights[0] if len(weights) == 1 else torch.cat(weights)
    weights = list(together.split(sizes))
    result = quantize_gptq(
        together,
        seen.matrix,
        factor,
        scheme,
        source.rules,
        act_order=settings.act_order,
        search=settings.range_search,
        refine=settings.refine,
    )
    start = 0
    for n, weight in zip(names, weights, strict=True):
        tensor = result.tensor.rows(slice(start, start + len(weight)))
        start += len(weight)
        error = shown(output_error(weight, tensor.dequantize(), seen.matrix))
        lines = _line(
            weight,
            tensor,
            source.rules,
            method="gptq",
            error=error,
            tokens=seen.rows,
            fallback=result.fallback,
        )
        yield n, Quantized(tensor, lines)


def gptq_rounder(rules: GridRules, settings: Any) -> Rounder:
    """What GPTQ (without refinement) makes of a scaled weight, seen from the unscaled input: for
    AWQ's choice among its finalists."""

    def rounder(hessian: Tensor) -> Callable[[Tensor], Callable[[Tensor, Scheme], Tensor]]:
        factor = factorize(hessian, damp=settings.damp, act_order=settings.act_order != "none")

        def of_scale(scale: Tensor) -> Callable[[Tensor, Scheme], Tensor]:
            scaled, scaled_factor = (
                hessian / scale[:, None] / scale,
                factor and factor.of_scaled(scale),
            )

            def round_scaled(weight: Tensor, scheme: Scheme) -> Tensor:
                result = quantize_gptq(
                    weight.float() * scale,
                    scaled,
                    scaled_factor,
                    scheme,
                    rules,
                    act_order=settings.act_order,
                    search=settings.range_search,
                    refine=0,
                )
                return result.tensor.dequantize() / scale

            return round_scaled

        return of_scale

    return rounder
