"""Grids that are trained: a weight, its scales and its zero points, seen through rounding.

Chen et al., EfficientQAT (arXiv 2407.11062), equations 1, 2 and 5: `ŵ = (clamp(⌊w/s⌉ + z, 0, q) -
z) s`, with rounding's gradient taken for 1. Within the range `∂ŵ/∂w = 1` and `∂ŵ/∂s = ⌊w/s⌉ - w/s`;
outside of it `∂ŵ/∂w = 0`, `∂ŵ/∂z = -s`, and `∂ŵ/∂s` is the code less `z`.

Shapes: weight `[N, K]`; scales and zeros `[N, G]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantflow.quant.grid import Grid, GridRules, grouped
from quantflow.quant.numbers.integer import IntegerTensor, assemble
from quantflow.quant.scheme import Scheme

LEAST_SHARE = 0.1  # of what it was, that a scale may become


class _Rounded(torch.autograd.Function):
    """`ŵ` `[N, G, g]` of a grouped weight, scales and whole zero points."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Tensor:
        scale, zero = scales[..., None], zeros[..., None]
        steps = weight / scale
        codes = steps.round().add_(zero).clamp_(0, levels).sub_(zero)
        ctx.save_for_backward(steps, codes, scales, zeros)
        ctx.levels = levels
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        (gradient,), (steps, codes, scales, zeros) = gradients, ctx.saved_tensors
        raw = steps.round().add_(zeros[..., None])
        inside = (raw >= 0) & (raw <= ctx.levels)
        of_weight = gradient * inside
        of_scales = (gradient * codes - of_weight * steps).sum(-1)
        of_zeros = None
        if ctx.needs_input_grad[2]:
            of_zeros = (gradient - of_weight).sum(-1).mul_(scales).neg_()
        return of_weight, of_scales, of_zeros, None


def rounded(weight: Tensor, scales: Tensor, zeros: Tensor, levels: int, least: int = 0) -> Tensor:
    """`ŵ` `[N, K]`, to be differentiated by all three. zeros need not be whole: they are rounded to
    `least..levels`, and the gradient goes through."""
    n, groups = scales.shape
    whole = zeros + (zeros.round().clamp(least, levels) - zeros).detach()
    parts = _Rounded.apply(weight.view(n, groups, -1), scales, whole, levels)
    out: Tensor = parts.reshape(n, -1)
    return out


@dataclass
class TrainedGrid:
    """What is trained of a linear, in float32: its weight, scales and zero points, which stay where
    they are in a symmetric scheme."""

    scheme: Scheme
    rules: GridRules
    weight: Tensor
    scales: Tensor
    zeros: Tensor
    least: Tensor

    @classmethod
    def start(cls, weight: Tensor, tensor: IntegerTensor, rules: GridRules) -> TrainedGrid:
        """From a weight and the grid that something else found for it."""
        scales = tensor.scales.float()
        return cls(
            tensor.scheme,
            rules,
            weight.float().clone(),
            scales.clone(),
            tensor.zeros.float().clone(),
            scales * LEAST_SHARE,
        )

    def parameters(self) -> list[Tensor]:
        """The weight, and what the grid is made of."""
        return [self.weight, self.scales, *([] if self.scheme.symmetric else [self.zeros])]

    def value(self) -> Tensor:
        """The rounded weight `[N, K]`, on scales that the formats hold."""
        scales = _held(self.scales, self.rules)
        return rounded(self.weight, scales, self.zeros, self.scheme.levels, self.rules.min_zero)

    def keep_in_range(self) -> None:
        """Scales stay positive."""
        torch.maximum(self.scales, self.least, out=self.scales)

    def tensor(self) -> IntegerTensor:
        """What it has become, as it is stored."""
        return _stored(self.weight, self.scales, self.zeros, self.scheme, self.rules)


@dataclass
class SignedGrid:
    """What SignRound trains of a linear: how far each weight is moved before it is rounded, at most
    half a step, and factors on both ends of every group's range.

    Cheng et al., SignRound (arXiv 2309.05516), equations 3 and 4: `ŵ = (clamp(⌊w/s + v⌉ + z, 0, q)
    - z) s`, with `s = (β high - α low) / q`. There the range is a group's least and largest weight,
    and factors are in `[0, 1]`; here it is the range that something else found, in which a factor
    of more than 1 takes in what was clipped.
    """

    scheme: Scheme
    rules: GridRules
    weight: Tensor
    low: Tensor
    high: Tensor
    moves: Tensor
    factors: Tensor  # [2, N, G]: of the lower end, and of the upper

    @classmethod
    def start(cls, weight: Tensor, tensor: IntegerTensor, rules: GridRules) -> SignedGrid:
        """From a weight and the grid that something else found for it."""
        scales, zeros = tensor.scales.float(), tensor.zeros.float()
        low, high = -zeros * scales, (tensor.scheme.levels - zeros) * scales
        factors = torch.ones(2, *scales.shape, device=scales.device)
        return cls(
            tensor.scheme, rules, weight.float(), low, high, torch.zeros_like(weight), factors
        )

    def parameters(self) -> list[Tensor]:
        """Moves and factors."""
        return [self.moves, self.factors]

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points, to be differentiated."""
        levels = self.scheme.levels
        low, high = self.factors[0] * self.low, self.factors[1] * self.high
        if self.scheme.symmetric:  # one range on both sides, of which the upper factor is left
            scales = self.factors[1] * (self.high - self.low) / levels
            return scales, torch.full_like(scales, self.scheme.midpoint)
        scales = (high - low) / levels
        return scales, -low / scales

    def _moved(self, scales: Tensor) -> Tensor:
        return self.weight + self.moves * scales.repeat_interleave(
            self.weight.shape[1] // scales.shape[1], 1
        )

    def value(self) -> Tensor:
        """The rounded weight `[N, K]`, on scales that the formats hold."""
        scales, zeros = self._grid()
        scales = _held(scales, self.rules)
        levels, least = self.scheme.levels, self.rules.min_zero
        return rounded(self._moved(scales), scales, zeros, levels, least)

    def keep_in_range(self) -> None:
        """A weight moves by half a step at most."""
        self.moves.clamp_(-0.5, 0.5)
        self.factors.clamp_(0.5, 1.5)

    def tensor(self) -> IntegerTensor:
        """What it has become, as it is stored."""
        with torch.no_grad():
            scales, zeros = self._grid()
            moved = self._moved(self.rules.round_scale(scales))
            return _stored(moved, scales, zeros, self.scheme, self.rules)


def _held(scales: Tensor, rules: GridRules) -> Tensor:
    """The scales as formats hold them; gradients go through."""
    return scales + (rules.round_scale(scales) - scales).detach()


@torch.no_grad()
def _stored(
    weight: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, rules: GridRules
) -> IntegerTensor:
    """What `rounded` makes of a weight, as codes on their grid."""
    scales = rules.round_scale(scales)
    grid = Grid(scales, zeros.round().clamp(rules.min_zero, scheme.levels))
    steps = (grouped(weight, scheme) / grid.scales[..., None]).round_()
    codes = steps.add_(grid.zeros[..., None]).clamp_(0, scheme.levels)
    return assemble(codes, grid, scheme, rules)
