"""Integers: `W ≈ (codes - zeros) * scales`, what GPTQ, AWQ and most engines mean by a quantised
weight.

Shapes: weight `[N, K]`; scales and zeros `[N, G]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from quantflow.errors import Problem
from quantflow.quant.grid import Grid, GridRules, encode, find_grid, grouped
from quantflow.quant.numbers.base import QuantizedTensor

if TYPE_CHECKING:
    from quantflow.quant.scheme import Scheme


@dataclass(frozen=True)
class IntegerTensor(QuantizedTensor):
    """Codes and integer grid of one weight, each scale serving one group of input channels.

    zeros: uint8 `[N, G]`, the middle code everywhere where the scheme is symmetric. group_index:
    None where channel `k` belongs to group `k // g`, else int32 `[K]` (GPTQ's `g_idx`).
    """

    kind: ClassVar[str] = "integer"
    grid: ClassVar[str] = "with integer zero points"
    stages: ClassVar[tuple[str, ...]] = ("rtn", "gptq", "block_ap", "signround")
    zero_points: ClassVar[bool] = True
    integers: ClassVar[tuple[str, ...]] = ("zeros",)

    zeros: Tensor
    group_index: Tensor | None = None

    @classmethod
    def title(cls, scheme: Scheme, group: str) -> str:
        return f"W{scheme.bits} {group} {'symmetric' if scheme.symmetric else 'asymmetric'}"

    @classmethod
    def group_bits(cls, scheme: Scheme) -> int:
        """A scale of 16 bits and, where it is asymmetric, a zero point of as many as a code."""
        return 16 + (0 if scheme.symmetric else scheme.bits)

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        scheme: Scheme,
        rules: GridRules,
        *,
        search: bool = False,
        importance: Tensor | None = None,
    ) -> IntegerTensor:
        return quantize_rtn(weight, scheme, rules, search=search, importance=importance)

    @classmethod
    def candidates(
        cls, weight: Tensor, scheme: Scheme, rules: GridRules, source: QuantizedTensor | None
    ) -> Iterator[IntegerTensor]:
        """On the source's own steps, its zero points moved to where `scheme` has them (exact where
        all codes then fit), and on the grid that a range search finds."""
        grids = []
        if steps := repeated_steps(source, weight, scheme):
            scales, zeros = steps
            zeros = (
                torch.full_like(zeros, scheme.midpoint)
                if scheme.symmetric
                else zeros.round().clamp(rules.min_zero, scheme.levels)
            )
            grids.append(Grid(rules.round_scale(scales), zeros))
        grids.append(find_grid(weight, scheme, rules, search=True))
        yield from (
            assemble(encode(grouped(weight, scheme), grid, scheme), grid, scheme, rules)
            for grid in grids
        )

    @property
    def indexed(self) -> bool:
        return self.group_index is not None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        n, k = self.shape
        scales, zeros = self.scales.to(compute), self.zeros.to(compute)
        if self.group_index is not None:
            index = self.group_index.long()
            return ((self.codes.to(compute) - zeros[:, index]) * scales[:, index]).to(dtype)
        grouped_codes = self.codes.to(compute).view(n, scales.shape[1], -1)
        return grouped_codes.sub_(zeros[:, :, None]).mul_(scales[:, :, None]).view(n, k).to(dtype)

    def steps(self) -> tuple[Tensor, Tensor] | None:
        return None if self.indexed else (self.scales.float(), self.zeros.float())

    def spanned(self, weight: Tensor) -> Tensor:
        if self.group_index is not None:
            weight = weight[:, torch.argsort(self.group_index, stable=True)]
        parts = grouped(weight, self.scheme)
        low, high = parts.amin(-1).clamp_(max=0), parts.amax(-1).clamp_(min=0)
        # what a grid spans that clips nothing
        reach = torch.maximum(-low, high) * 2 if self.scheme.symmetric else high - low
        alive = reach > 0
        return (self.scales.float() * self.scheme.levels)[alive] / reach[alive]

    def remarks(self, rules: GridRules) -> dict[str, Any]:
        if not (clamped := rules.clamped(self.scales)):
            return {}
        dtypes = " and ".join(
            dict.fromkeys(str(d).removeprefix("torch.") for d in rules.scale_dtypes)
        )
        return {
            "fallback": f"{clamped} of {self.scales.numel()} scales clamped to what {dtypes} hold"
        }

    def parts(self) -> dict[str, Tensor]:
        index = {} if self.group_index is None else {"group_index": self.group_index}
        return super().parts() | index

    @classmethod
    def from_parts(
        cls, scheme: Scheme, parts: Mapping[str, Tensor], in_features: int
    ) -> IntegerTensor:
        return replace(
            super().from_parts(scheme, parts, in_features), group_index=parts.get("group_index")
        )

    def problems(self, name: str) -> list[Problem]:
        """As for any numbers; also zero points where the scheme has them, and groups of equal
        size."""
        problems, scheme, k = super().problems(name), self.scheme, self.shape[1]
        groups = scheme.groups(k)
        if (
            scheme.symmetric
            and self.zeros.numel()
            and any(int(end) != scheme.midpoint for end in self.zeros.aminmax())
        ):
            problems.append(
                Problem(
                    f"{name} zeros",
                    f"a symmetric scheme with a zero point other than {scheme.midpoint}",
                )
            )
        index = self.group_index
        if index is not None:
            if tuple(index.shape) != (k,) or index.dtype != torch.int32:
                problems.append(
                    Problem(
                        f"{name} group index",
                        f"{index.dtype} {list(index.shape)}",
                        f"torch.int32 [{k}]",
                    )
                )
            elif not groups_are_full(index, groups):
                problems.append(
                    Problem(
                        f"{name} group index",
                        "groups of unequal size",
                        f"{groups} groups of {k // groups} channels",
                    )
                )
        return problems


def groups_are_full(index: Tensor, groups: int) -> bool:
    """Whether each of the groups `0..groups - 1` has the same number of channels in `index`, and no
    other group any."""
    if int(index.min()) < 0 or int(index.max()) >= groups:
        return False
    return bool((torch.bincount(index, minlength=groups) == index.numel() // groups).all())


def repeated_steps(
    source: QuantizedTensor | None, weight: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor] | None:
    """The source's `steps` for each group of `scheme`; None where it has none, groups cross, or a
    scale is not positive."""
    steps = source.steps() if source is not None else None
    if source is None or steps is None:
        return None
    k, (scales, zeros) = weight.shape[1], steps
    ratio, rest = divmod(source.scheme.group_of(k), scheme.group_of(k))
    if rest or not bool((scales > 0).all()):
        return None
    return scales.repeat_interleave(ratio, 1), zeros.repeat_interleave(ratio, 1)


# Rounding to nearest


def assemble(
    codes: Tensor, grid: Grid, scheme: Scheme, rules: GridRules, group_index: Tensor | None = None
) -> IntegerTensor:
    """The tensor of float codes `[N, G, g]` or `[N, K]` and their grid."""
    flat = codes.reshape(codes.shape[0], -1).to(torch.uint8)
    return IntegerTensor(
        scheme, flat, grid.scales.to(rules.scale_dtype), grid.zeros.to(torch.uint8), group_index
    )


def quantize_rtn(
    weight: Tensor,
    scheme: Scheme,
    rules: GridRules,
    *,
    search: bool = False,
    importance: Tensor | None = None,
    rows: int = 0,
) -> IntegerTensor:
    """`weight` `[N, K]` rounded to the nearest code of its grid, some rows at a time so that
    temporaries stay in the cache."""
    rows = rows or max(1, 2**20 // weight.shape[1])
    pieces: Sequence[IntegerTensor] = [
        _round(part, scheme, rules, search, importance) for part in weight.split(rows)
    ]
    return IntegerTensor(
        scheme,
        torch.cat([p.codes for p in pieces]),
        torch.cat([p.scales for p in pieces]),
        torch.cat([p.zeros for p in pieces]),
    )


def _round(
    part: Tensor, scheme: Scheme, rules: GridRules, search: bool, importance: Tensor | None
) -> IntegerTensor:
    part = part.float()
    grid = find_grid(part, scheme, rules, search=search, importance=importance)
    return assemble(encode(grouped(part, scheme), grid, scheme), grid, scheme, rules)
