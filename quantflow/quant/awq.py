"""AWQ (Lin et al. 2023): scale salient input channels up before rounding, and fold the inverse into
what comes before.

Shapes: weight `[N, K]`; scale `[K]`; Hessian `H = Xᵀ X` `[K, K]`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantflow.quant.grid import GridRules, decode, encode, find_grid, grouped
from quantflow.quant.scheme import Scheme

MAX_SCALE = 1e4  # a channel scaled further than this carries no signal worth keeping


def candidates(activation: Tensor, weight: Tensor, grid: int) -> Iterator[tuple[str, Tensor]]:
    """Scales to try, with their names: the identity, then `a^r` and `a^r / w^(1-r)` for `r = 0,
    1/grid, … 1` (eq. 4 and 5).

    activation: mean |x| a channel `[K]`. weight: mean relative |w| a channel `[K]` (see
    `weight_profile`). Dead channels keep scale 1: `0^r` would divide by zero. Every scale is
    normalised to `sqrt(max * min) = 1`, as llm-awq does.
    """
    yield "identity", torch.ones_like(activation)
    alive = (activation > 0) & (weight > 0)
    if not bool(alive.any()):
        return
    for i in range(grid + 1):
        r = i / grid
        for name, scale in (
            (f"a^{r:g}", activation**r),
            (f"a^{r:g} w^{r - 1:g}", activation**r / weight ** (1 - r)),
        ):
            if (i == 0 and name == "a^0") or (i == grid and name.endswith("w^0")):
                continue  # the identity, and a twin of a^1
            scale = torch.where(alive, scale, torch.ones_like(scale)).clamp(min=1e-4)
            spread = (scale[alive].max() * scale[alive].min()).sqrt()
            yield (
                name,
                torch.where(alive, scale / spread, torch.ones_like(scale)).clamp(
                    1 / MAX_SCALE, MAX_SCALE
                ),
            )


def weight_profile(weights: list[Tensor], scheme: Scheme) -> Tensor:
    """Mean over output channels of |w| relative to its group's largest, `[K]`."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight in weights:  # one at a time: those of all experts of a mixture are gigabytes
        parts = grouped(weight.float(), scheme).abs()
        total += parts.div_(parts.amax(-1, keepdim=True).clamp(min=1e-12)).view_as(weight).sum(0)
    return total / sum(len(weight) for weight in weights)


def rounded(weight: Tensor, scale: Tensor, scheme: Scheme, rules: GridRules) -> Tensor:
    """`Q(W * s) / s`: what the linear would compute with, seen from the unscaled input."""
    scaled = weight.float() * scale
    grid = find_grid(scaled, scheme, rules)
    return decode(encode(grouped(scaled, scheme), grid, scheme), grid).view_as(scaled) / scale


def linear_loss(
    weight: Tensor,
    approximation: Tensor,
    *,
    hessian: Tensor | None = None,
    rows: Tensor | None = None,
) -> float:
    """`||(W - Ŵ) X||²`: the exact loss on a linear's output, from its inputs `rows` `[T, K]` or
    from their Hessian `[K, K]`."""
    difference = weight.float() - approximation
    if rows is not None:
        return float((rows.float() @ difference.T).square().sum())
    assert hessian is not None
    return float(((difference @ hessian) * difference).sum())
