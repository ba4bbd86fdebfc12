"""Integers above a floating minimum: `W ≈ codes * scales + minimums`, as GGUF's Q4_1 has them.

Shapes: weight `[N, K]`; scales and minimums `[N, G]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from quantflow.quant.grid import GridRules, grouped
from quantflow.quant.numbers.base import QuantizedTensor
from quantflow.quant.numbers.integer import repeated_steps

if TYPE_CHECKING:
    from quantflow.quant.scheme import Scheme


@dataclass(frozen=True)
class MinimumTensor(QuantizedTensor):
    """minimums: floating `[N, G]`, in the dtype that is stored."""

    kind: ClassVar[str] = "minimum"
    grid: ClassVar[str] = "with floating minimums"
    floats: ClassVar[tuple[str, ...]] = ("scales", "minimums")

    minimums: Tensor

    @classmethod
    def title(cls, scheme: Scheme, group: str) -> str:
        return f"W{scheme.bits} {group} with minimums"

    @classmethod
    def group_bits(cls, scheme: Scheme) -> int:
        """A scale and a minimum of 16 bits."""
        return 32

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        scheme: Scheme,
        rules: GridRules,
        *,
        search: bool = False,
        importance: Tensor | None = None,
    ) -> MinimumTensor:
        """On the range of each group: none is searched for."""
        weight = weight.float()
        parts = grouped(weight, scheme)
        low, high = parts.amin(-1), parts.amax(-1)
        return _on(weight, scheme, rules, (high - low) / scheme.levels, low)

    @classmethod
    def candidates(
        cls, weight: Tensor, scheme: Scheme, rules: GridRules, source: QuantizedTensor | None
    ) -> Iterator[MinimumTensor]:
        """On the source's own steps, and on the range of each group."""
        if steps := repeated_steps(source, weight, scheme):
            scales, zeros = steps
            yield _on(weight, scheme, rules, scales, -zeros * scales)
        yield cls.quantize(weight, scheme, rules)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` in `dtype`; product and sum are computed and rounded in float32
        (float64 if that is `dtype`)."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        n, k = self.shape
        scales, minimums = self.scales.to(compute), self.minimums.to(compute)
        grouped_codes = self.codes.to(compute).view(n, scales.shape[1], -1)
        return (
            grouped_codes.mul_(scales[:, :, None]).add_(minimums[:, :, None]).view(n, k).to(dtype)
        )

    def steps(self) -> tuple[Tensor, Tensor]:
        scales = self.scales.float()
        return scales, -self.minimums.float() / scales


def _on(
    weight: Tensor, scheme: Scheme, rules: GridRules, scales: Tensor, minimums: Tensor
) -> MinimumTensor:
    """`weight` in the nearest codes of a grid, its numbers rounded to what is stored."""
    scales = rules.round_scale(torch.where(scales > 0, scales, torch.ones_like(scales)))
    minimums = rules.round_minimum(minimums)
    codes = (
        ((grouped(weight, scheme) - minimums[:, :, None]) / scales[:, :, None])
        .round_()
        .clamp_(0, scheme.levels)
    )
    return MinimumTensor(
        scheme,
        codes.view(weight.shape).to(torch.uint8),
        scales.to(rules.scale_dtype),
        minimums.to(rules.scale_dtype),
    )
