"""Affine grids: which numbers the codes of a group stand for, and the search for the best.

Shapes: weight `[N, K]`, grouped `[N, G, g]`; grids (scales, zeros) `[N, G]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from quantflow_kernels import cpu_solver
from torch import Tensor

if TYPE_CHECKING:
    from quantflow.quant.scheme import Scheme

# of the range, in a range search: 1.0 down to 0.5
SHRINK_STEPS = tuple(1 - 0.05 * i for i in range(11))
# weights whose range is searched together: what the search makes of them stays in the cache
SEARCH_ELEMENTS = 2**19


@dataclass(frozen=True)
class GridRules:
    """What the formats that will be written ask of a grid.

    scale_dtypes: a scale must be exact in each of these. min_zero: 1 for GPTQ v1, which cannot hold
    a zero point of 0.
    """

    scale_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    min_zero: int = 0

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype that scales are kept in: the first of `scale_dtypes`."""
        return self.scale_dtypes[0]

    def round_scale(self, scale: Tensor) -> Tensor:
        """The scale, positive and exact in every dtype of the rules, as float32.

        Rounding to bfloat16 first leaves 8 significant bits, which float16 keeps (or, below 2^-14,
        cuts to fewer): so the chain ends in a number that both hold.
        """
        largest = _largest(self.scale_dtypes)
        for dtype in sorted(set(self.scale_dtypes), key=lambda d: torch.finfo(d).eps, reverse=True):
            scale = scale.clamp(min=_smallest(dtype), max=largest).to(dtype).float()
        return scale

    def round_minimum(self, minimum: Tensor) -> Tensor:
        """A number of either sign, exact in every dtype of the rules, as float32."""
        largest = _largest(self.scale_dtypes)
        minimum = minimum.clamp(-largest, largest)
        for dtype in sorted(set(self.scale_dtypes), key=lambda d: torch.finfo(d).eps, reverse=True):
            minimum = minimum.to(dtype).float()
        return minimum

    def clamped(self, scales: Tensor) -> int:
        """How many scales stand at the end of what the dtypes hold: their groups reach further, or
        are finer."""
        smallest = max(_smallest(dtype) for dtype in self.scale_dtypes)
        return int(((scales <= smallest) | (scales >= _largest(self.scale_dtypes))).sum())


def _smallest(dtype: torch.dtype) -> float:
    # float16 scales below 2^-24 flush to zero; the others are kept to numbers whose reciprocal is
    # finite in float32.
    return 2.0**-24 if dtype == torch.float16 else 2.0**-120


def _largest(dtypes: tuple[torch.dtype, ...]) -> float:
    # The largest number that all hold: 65280 for float16 and bfloat16 together, whose own 65504 has
    # too many bits for bfloat16.
    exponent = min(math.frexp(torch.finfo(d).max)[1] for d in dtypes)
    return 2.0 ** (exponent - 1) * (2 - max(torch.finfo(d).eps for d in dtypes))


@dataclass(frozen=True)
class Grid:
    """scales and zeros, float32 `[N, G]`; zeros hold integers."""

    scales: Tensor
    zeros: Tensor


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """`[N, K]` seen as `[N, G, g]`."""
    return weight.view(weight.shape[0], scheme.groups(weight.shape[1]), -1)


def grid_of_range(low: Tensor, high: Tensor, scheme: Scheme, rules: GridRules) -> Grid:
    """The grid that spans `[low, high]` (`[N, G]`), zero included. An empty range gets scale 1 and
    the zero point's code."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme.symmetric:
        reach = torch.maximum(-low, high)
        scale = reach * 2 / scheme.levels
        zero = torch.full_like(scale, scheme.midpoint)
    else:
        if rules.min_zero:
            low = torch.minimum(low, -high * rules.min_zero / (scheme.levels - rules.min_zero))
        scale = (high - low) / scheme.levels
        zero = None
    scale = rules.round_scale(torch.where(scale > 0, scale, torch.ones_like(scale)))
    if zero is None:
        zero = (-low / scale).round_().clamp_(rules.min_zero, scheme.levels)
    return Grid(scale, zero)


def encode(weight: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """Codes `[N, G, g]` (float) of a grouped weight: nearest, ties to even, clamped."""
    return (
        (weight / grid.scales[:, :, None])
        .add_(grid.zeros[:, :, None])
        .round_()
        .clamp_(0, scheme.levels)
    )


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """The values `[N, G, g]` of codes (float)."""
    return (codes - grid.zeros[:, :, None]).mul_(grid.scales[:, :, None])


def group_loss(error: Tensor, importance: Tensor | None) -> Tensor:
    """The loss `[N, G]` of an error `[N, G, g]`.

    importance: None for the squared error; `[G, g]` to weigh each input channel; `[G, g, g]` for
    the output error `e Hg eᵀ` that the group alone causes, `Hg` being its block of the Hessian.
    """
    if importance is None:
        return error.square().sum(-1)
    if importance.ndim == 2:
        return (error.square() * importance).sum(-1)
    by_group = error.transpose(0, 1)
    return (torch.bmm(by_group, importance) * by_group).sum(-1).T


def rounding_loss(parts: Tensor, grid: Grid, scheme: Scheme, importance: Tensor | None) -> Tensor:
    """`group_loss` of rounding a grouped weight to its grid."""
    if (
        importance is not None
        and importance.ndim == 3
        and parts.shape[2] <= cpu_solver.WIDEST_GROUP
        and cpu_solver.available(parts)
    ):
        return cpu_solver.block_losses(
            parts.contiguous(),
            grid.scales.contiguous(),
            grid.zeros.contiguous(),
            scheme.levels,
            importance.contiguous(),
        )
    # decode(encode(parts)) - parts, without a detour over unsigned codes.
    scale, zero = grid.scales[:, :, None], grid.zeros[:, :, None]
    rounded = torch.div(parts, scale).round_().clamp_(-zero, scheme.levels - zero)
    return group_loss(rounded.mul_(scale).sub_(parts), importance)


def find_grid(
    weight: Tensor,
    scheme: Scheme,
    rules: GridRules,
    *,
    search: bool = False,
    importance: Tensor | None = None,
) -> Grid:
    """The grid of `weight` `[N, K]` (float32): that of its range or, with `search`, of the shrunken
    range of least loss.

    The search shrinks both ends together, then each alone around the best (an outlier usually sits
    on one side).
    """
    rows = max(1, SEARCH_ELEMENTS // weight.shape[1])
    if search and len(weight) > rows:
        grids = [
            find_grid(part, scheme, rules, search=True, importance=importance)
            for part in weight.split(rows)
        ]
        return Grid(
            torch.cat([grid.scales for grid in grids]), torch.cat([grid.zeros for grid in grids])
        )
    parts = grouped(weight, scheme)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    best = grid_of_range(low, high, scheme, rules)
    if not search:
        return best
    scales, zeros = best.scales.clone(), best.zeros.clone()
    least = torch.full_like(scales, torch.inf)
    shrink_low, shrink_high = torch.ones_like(low), torch.ones_like(high)

    def consider(by_low: Tensor | float, by_high: Tensor | float) -> None:
        grid = grid_of_range(low * by_low, high * by_high, scheme, rules)
        loss = rounding_loss(parts, grid, scheme, importance)
        better = loss < least
        for kept, new in ((least, loss), (scales, grid.scales), (zeros, grid.zeros)):
            torch.where(better, new, kept, out=kept)
        for kept, ratio in ((shrink_low, by_low), (shrink_high, by_high)):
            kept.copy_(torch.where(better, torch.as_tensor(ratio, dtype=kept.dtype), kept))

    for step in SHRINK_STEPS:
        consider(step, step)
    if not scheme.symmetric:
        for step in (0.9, 0.95, 1.05):
            consider(shrink_low.clone() * step, shrink_high.clone())
            consider(shrink_low.clone(), shrink_high.clone() * step)
    return Grid(scales, zeros)
