"""A quantised weight on another grid, where a format cannot hold its own: what `export --requantize` does, and reports."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantflow.quant.grid import AnyTensor, MinimumTensor, QuantizedTensor, Scheme
from quantflow.quant.nf4 import quantize_nf4
from quantflow.quant.rtn import Grid, GridRules, assemble, encode, find_grid, grouped


def requantize(weight: Tensor, source: AnyTensor | None, scheme: Scheme, rules: GridRules) -> AnyTensor:
    """`weight` `[N, K]` (float32) in `scheme`: on the grid it comes from, as far as that can be kept, or on the best that a range search
    finds, whichever has the smaller squared error. source: what `weight` was dequantised from, if anything."""
    if scheme.kind == "nf4":
        return quantize_nf4(weight, scheme)
    if scheme.kind == "minimum":
        found = [
            _with_minimums(weight, scheme, rules, *steps) for steps in (*_kept_minimums(source, weight, scheme), _range(weight, scheme))
        ]
        return min(found, key=lambda tensor: _loss(tensor, weight))
    grids = [*_kept_grid(source, weight, scheme, rules), find_grid(weight, scheme, rules, search=True)]
    tensors = [assemble(encode(grouped(weight, scheme), grid, scheme), grid, scheme, rules) for grid in grids]
    return min(tensors, key=lambda tensor: _loss(tensor, weight))


def relative_error(tensor: AnyTensor, weight: Tensor) -> float:
    """`|W' - W| / |W|` in the Frobenius norm; 0 for a weight of zeros that stayed so."""
    size = float(weight.double().norm())
    return _loss(tensor, weight) ** 0.5 / size if size else _loss(tensor, weight) ** 0.5


def _loss(tensor: AnyTensor, weight: Tensor) -> float:
    return float(tensor.dequantize().double().sub_(weight).square_().sum())


def _repeated(source: AnyTensor | None, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor] | None:
    """Scales of the source for each group of `scheme`, and where its zero lies in steps of them, float32; None where it has no even steps,
    groups cross, or a scale is not positive."""
    if not isinstance(source, QuantizedTensor | MinimumTensor):
        return None
    k, scales = weight.shape[1], source.scales.float()
    ratio, rest = divmod(source.scheme.group_of(k), scheme.group_of(k))
    indexed = isinstance(source, QuantizedTensor) and source.group_index is not None
    if rest or indexed or not bool((scales > 0).all()):
        return None
    zeros = source.zeros.float() if isinstance(source, QuantizedTensor) else -source.minimums.float() / scales
    return scales.repeat_interleave(ratio, 1), zeros.repeat_interleave(ratio, 1)


def _kept_grid(source: AnyTensor | None, weight: Tensor, scheme: Scheme, rules: GridRules) -> Iterator[Grid]:
    """The source's own steps, its zero points moved to where `scheme` has them: exact where all codes then fit."""
    if steps := _repeated(source, weight, scheme):
        scales, zeros = steps
        zeros = torch.full_like(zeros, scheme.midpoint) if scheme.symmetric else zeros.round().clamp(rules.min_zero, scheme.levels)
        yield Grid(rules.round_scale(scales), zeros)


def _kept_minimums(source: AnyTensor | None, weight: Tensor, scheme: Scheme) -> Iterator[tuple[Tensor, Tensor]]:
    if steps := _repeated(source, weight, scheme):
        scales, zeros = steps
        yield scales, -zeros * scales


def _range(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scales and minimums `[N, G]` that span each group."""
    parts = grouped(weight, scheme)
    low, high = parts.amin(-1), parts.amax(-1)
    return (high - low) / scheme.levels, low


def _with_minimums(weight: Tensor, scheme: Scheme, rules: GridRules, scales: Tensor, minimums: Tensor) -> MinimumTensor:
    scales = rules.round_scale(torch.where(scales > 0, scales, torch.ones_like(scales)))
    largest = torch.finfo(rules.scale_dtype).max
    minimums = minimums.clamp(-largest, largest).to(rules.scale_dtype).float()
    codes = ((grouped(weight, scheme) - minimums[:, :, None]) / scales[:, :, None]).round_().clamp_(0, scheme.levels)
    return MinimumTensor(scheme, codes.view(weight.shape).to(torch.uint8), scales.to(rules.scale_dtype), minimums.to(rules.scale_dtype))
