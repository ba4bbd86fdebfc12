"""NF4: 4-bit codes of a normal distribution's quantiles, scaled by the largest magnitude of each
block (Dettmers et al. 2023, QLoRA: arXiv 2305.14314, equations 3 to 6): `W ≈ NF4[codes] * scales`.
What people know as `load_in_4bit`.

Shapes: weight `[N, K]`; scales `[N, G]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from quantflow.quant.numbers.base import QuantizedTensor

if TYPE_CHECKING:
    from quantflow.quant.grid import GridRules
    from quantflow.quant.scheme import Scheme

# QLoRA, appendix E: quantiles of a normal distribution, an exact 0 among them, scaled to [-1, 1].
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NestedScales:
    """Scales that are quantised themselves (QLoRA's double quantisation), in blocks of 256 along
    the flattened `[N, G]`: `scale = table[code] * absmax + offset`.

    codes: uint8 `[N * G]`. absmax: float32, one a block. table: float32 `[256]`. offset: of all of
    them, a float32 number.
    """

    BLOCK = 256

    codes: Tensor
    absmax: Tensor
    table: Tensor
    offset: float

    def scales(self) -> Tensor:
        """float32 `[N * G]`."""
        each = self.absmax.repeat_interleave(self.BLOCK)[: self.codes.numel()]
        return self.table[self.codes.long()] * each + torch.tensor(
            self.offset, dtype=torch.float32, device=self.codes.device
        )


@dataclass(frozen=True)
class Nf4Tensor(QuantizedTensor):
    """codes: 0 to 15. scales: float32, the largest magnitude of each group. nested: what they were
    computed from, where they are quantised too."""

    kind: ClassVar[str] = "nf4"
    grid: ClassVar[str] = "of NF4's table"
    method: ClassVar[str] = "nf4"
    stages: ClassVar[tuple[str, ...]] = ("nf4",)
    widths: ClassVar[tuple[int, ...]] = (4,)
    fixed_groups: ClassVar[bool] = True

    nested: NestedScales | None = None

    @classmethod
    def title(cls, scheme: Scheme, group: str) -> str:
        return f"NF4 {group}{' double' if scheme.double else ''}"

    @classmethod
    def group_bits(cls, scheme: Scheme) -> int:
        """A float32 scale, or its code."""
        return 8 if scheme.double else 32

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        scheme: Scheme,
        rules: GridRules,
        *,
        search: bool = False,
        importance: Tensor | None = None,
    ) -> Nf4Tensor:
        return quantize_nf4(weight, scheme)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` in `dtype`, computed in float32 as bitsandbytes does (float64 if that
        is `dtype`)."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        n, k = self.shape
        table = torch.tensor(NF4, dtype=torch.float32, device=self.codes.device).to(compute)
        values = table[self.codes.view(n, self.scales.shape[1], -1).int()]
        return values.mul_(self.scales.to(compute)[:, :, None]).view(n, k).to(dtype)

    def remarks(self, rules: GridRules) -> dict[str, Any]:
        """Blocks of zeros alone: their scale of 0 does not survive double quantisation."""
        empty = int(self.codes.view(*self.scales.shape, -1).eq(NF4.index(0.0)).all(-1).sum())
        return {"zero_blocks": empty} if empty else {}

    def rows(self, part: slice) -> Nf4Tensor:
        """Some of its output channels, with their scales as numbers."""
        return replace(super().rows(part), nested=None)

    def cut(self, dimension: int, rank: int, tp: int) -> Nf4Tensor:
        """As for any numbers. Raises ValueError for scales that are quantised themselves, whose
        blocks know nothing of rows."""
        if self.nested is not None:
            raise ValueError(f"{self.scheme} cannot be cut")
        return super().cut(dimension, rank, tp)

    def parts(self) -> dict[str, Tensor]:
        if (nested := self.nested) is None:
            return super().parts()
        offset = torch.tensor(nested.offset, dtype=torch.float32)
        return super().parts() | {
            "nested.codes": nested.codes,
            "nested.absmax": nested.absmax,
            "nested.offset": offset,
        }

    @classmethod
    def from_parts(cls, scheme: Scheme, parts: Mapping[str, Tensor], in_features: int) -> Nf4Tensor:
        tensor = super().from_parts(scheme, parts, in_features)
        if "nested.codes" not in parts:
            return tensor
        nested = NestedScales(
            parts["nested.codes"],
            parts["nested.absmax"],
            dynamic_table(),
            float(parts["nested.offset"]),
        )
        return replace(tensor, nested=nested)


def quantize_nf4(weight: Tensor, scheme: Scheme) -> Nf4Tensor:
    """`weight` `[N, K]` in the nearest codes, computed as bitsandbytes does, so that the codes are
    the same as its own.

    A block of zeros has scale 0, which stands for zeros whatever its codes. With `scheme.double`
    the scales are quantised after the codes were chosen, as in QLoRA.
    """
    n, k = weight.shape
    blocks = weight.float().view(n, scheme.groups(k), -1)
    scales = blocks.abs().amax(-1)
    table = torch.tensor(NF4, dtype=torch.float32, device=weight.device)
    borders = (table[:-1] + table[1:]) / 2
    shares = (blocks * (1.0 / scales.clamp(min=1e-38))[:, :, None]).clamp_(-1, 1)
    codes = torch.bucketize(shares, borders, out_int32=True).to(torch.uint8).view(n, k)
    if not scheme.double:
        return Nf4Tensor(scheme, codes, scales)
    nested = nest_scales(scales)
    return Nf4Tensor(scheme, codes, nested.scales().view_as(scales), nested)


def nest_scales(scales: Tensor) -> NestedScales:
    """The scales in 8 bits: their mean is taken off, and what is left is rounded to the dynamic
    table, in blocks of 256.

    The codes are the nearest, as bitsandbytes' GPU kernels choose them. Its CPU kernel rounds each
    share to a multiple of 2 / 65535 before it looks the code up, and so takes a neighbour of the
    nearest where two are about equally near.
    """
    flat = scales.reshape(-1)
    offset = flat.mean()
    rest = flat - offset
    block = NestedScales.BLOCK
    padded = torch.nn.functional.pad(rest, (0, -rest.numel() % block)).view(-1, block)
    absmax = padded.abs().amax(-1)
    table = dynamic_table().to(scales.device)
    shares = padded * (1.0 / absmax.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(shares, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    return NestedScales(codes.view(-1)[: rest.numel()].contiguous(), absmax, table, float(offset))


def dynamic_table() -> Tensor:
    """float32 `[256]`, sorted: bitsandbytes' signed dynamic data type (Dettmers 2016, arXiv
    1511.04561): the exponent -6..0 of ten is written in unary, and the bits that are left count
    linearly, `2^i` steps for exponent `i - 6`."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)
