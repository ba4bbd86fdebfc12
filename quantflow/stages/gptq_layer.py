"""`gptq`: a layer's linears, segment by segment, each on what the segments before it left of the
stream once they were rounded (GPTQ's true-sequential mode)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantflow.calibration.statistics import Hessian
from quantflow.quant.fit import shown
from quantflow.quant.gptq import Factor, GptqResult, factorize, output_error, quantize_gptq
from quantflow.quant.grid import GridRules
from quantflow.quant.scheme import Scheme
from quantflow.stages.rounded import Quantized, Rounder, Unrounded, line, nearest_linear
from quantflow.stages.route import expert_tokens
from quantflow.stages.work import LayerWork

if TYPE_CHECKING:
    from quantflow.stages.gptq import Gptq

Rows = Callable[[], Iterator[Tensor]]


@torch.inference_mode()
def gptq_layer(settings: Gptq, work: LayerWork) -> None:
    assert work.streams is not None
    block = work.make_block({**work.stored, **work.changed})
    block.everywhere = settings.route == "all"
    passage, tokens = block.passage(work.streams, work.batch, work.kv), dict[tuple[str, int], int]()
    for segment in work.segments:
        rows = partial(passage.rows, segment)
        names = work.names(segment)
        for name, result in gptq_segment(
            work.unrounded, names, segment.channels, rows, settings, work.device
        ):
            work.rounded[name] = result
            if segment.expert is not None:
                tokens[segment.part, segment.expert] = int(result.report.get("tokens", 0))
            block.tensors[f"{name}.weight"] = result.tensor.dequantize(work.dtype)
            work.tell(name)
        passage.advance(segment, feeds=not work.last)
    work.report |= expert_tokens(tokens)


def gptq_segment(
    source: Unrounded,
    names: Sequence[str],
    channels: int,
    rows: Rows,
    settings: Gptq,
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
    if not hessian.rows:
        for n in names:
            weight, scheme, rules = source.weight(n), source.schemes[n], source.rules
            reason, search = "no calibration token: rounded to nearest", settings.range_search
            yield n, nearest_linear(weight, scheme, rules, search=search, fallback=reason)
        return
    for scheme in dict.fromkeys(source.schemes[n] for n in names):
        alike = [n for n in names if source.schemes[n] == scheme]
        weights = [source.weight(n) for n in alike]
        together = weights[0] if len(weights) == 1 else torch.cat(weights)
        weights = list(together.split([len(weight) for weight in weights]))
        result = quantize_gptq(
            together,
            hessian.matrix,
            factor,
            scheme,
            source.rules,
            act_order=settings.act_order,
            search=settings.range_search,
            refine=settings.refine,
        )
        yield from zip(alike, _apart(weights, result, hessian, source.rules), strict=True)


def _hessian(channels: int, rows: Rows, device: torch.device, *, exact: bool = False) -> Hessian:
    hessian = Hessian(channels, device, exact=exact)
    for part in rows():
        hessian.add(part)
    return hessian


def _factor(hessian: Hessian, settings: Gptq) -> Factor | None:
    """None where the matrix has none, or no token was seen."""
    return (
        factorize(hessian.matrix, damp=settings.damp, act_order=settings.act_order != "none")
        if hessian.rows
        else None
    )


def _apart(
    weights: list[Tensor], result: GptqResult, seen: Hessian, rules: GridRules
) -> Iterator[Quantized]:
    """Linears that were solved with their rows under one another, each with its line of the
    report."""
    start = 0
    for weight in weights:
        tensor = result.tensor.rows(slice(start, start + len(weight)))
        start += len(weight)
        report = line(
            weight,
            tensor,
            rules,
            method="gptq",
            error=shown(output_error(weight, tensor.dequantize(), seen.matrix)),
            tokens=seen.rows,
            fallback=result.fallback,
        )
        yield Quantized(tensor, report)


def gptq_rounder(rules: GridRules, settings: Gptq) -> Rounder:
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
