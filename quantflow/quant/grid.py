"""The canonical form of a quantised weight: unsigned codes, and the grid that says which number each stands for.

Shapes: `N` output channels, `K` input channels, `g` group size, `G = K / g` groups a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

BITS = (2, 3, 4, 5, 6, 7, 8)
PER_CHANNEL = -1  # a group size: one group spans the whole row

# integer: (code - zero) * scale, zero an integer. minimum: code * scale + minimum. nf4: table[code] * scale.
Kind: TypeAlias = Literal["integer", "minimum", "nf4"]


@dataclass(frozen=True)
class Scheme:
    """How a linear layer's weight is quantised.

    bits: 2 to 8. group_size: input channels that share a scale, or `PER_CHANNEL`. symmetric: the zero point is the
    middle code, `2^(bits-1)`. kind: of its grid. double: the scales of an nf4 grid are quantised themselves.
    """

    bits: int
    group_size: int
    symmetric: bool
    kind: Kind = "integer"
    double: bool = False

    @property
    def levels(self) -> int:
        """The largest code, `2^bits - 1`."""
        return 2**self.bits - 1

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric grid, `2^(bits-1)`."""
        return 2 ** (self.bits - 1)

    def group_of(self, in_features: int) -> int:
        """Input channels in one group of a row of `in_features`."""
        return in_features if self.group_size == PER_CHANNEL else self.group_size

    def groups(self, in_features: int) -> int:
        """Groups in a row of `in_features`; the caller has checked that the group size divides it."""
        return in_features // self.group_of(in_features)

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a packed weight `(N, K)`: codes in whole words of 32 bits, scales (16 bits; of NF4 32, or 8 where they are quantised)
        and, where it is asymmetric, zeros in as many bits as a code."""
        n, k = shape
        groups = self.groups(k)
        scale = 2 if self.kind == "integer" else 1 if self.double else 4
        return n * math.ceil(k * self.bits / 32) * 4 + n * groups * scale + (0 if self.symmetric else n * groups * self.bits // 8)

    def __str__(self) -> str:
        group = "channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        if self.kind == "nf4":
            return f"NF4 {group}{' double' if self.double else ''}"
        kind = "with minimums" if self.kind == "minimum" else "symmetric" if self.symmetric else "asymmetric"
        return f"W{self.bits} {group} {kind}"


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes and integer grid of one weight: `W ≈ (codes - zeros) * scales`, each scale serving one group of input channels.

    codes: uint8 `[N, K]`, in `0..2^bits - 1`. scales: floating `[N, G]`, in the dtype that is stored.
    zeros: uint8 `[N, G]`. group_index: None where channel `k` belongs to group `k // g`, else int32 `[K]` (GPTQ's `g_idx`).
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_index: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, part: slice) -> QuantizedTensor:
        """Some of its output channels."""
        return QuantizedTensor(self.scheme, self.codes[part], self.scales[part], self.zeros[part], self.group_index)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` in `dtype`, computed in float32 (float64 if that is `dtype`)."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        n, k = self.shape
        scales, zeros = self.scales.to(compute), self.zeros.to(compute)
        if self.group_index is not None:
            index = self.group_index.long()
            return ((self.codes.to(compute) - zeros[:, index]) * scales[:, index]).to(dtype)
        grouped = self.codes.to(compute).view(n, scales.shape[1], -1)
        return grouped.sub_(zeros[:, :, None]).mul_(scales[:, :, None]).view(n, k).to(dtype)


@dataclass(frozen=True)
class MinimumTensor:
    """Codes and a grid with a floating minimum (GGUF's Q4_1): `W ≈ codes * scales + minimums`.

    codes: uint8 `[N, K]`. scales, minimums: floating `[N, G]`, in the dtype that is stored.
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    minimums: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, part: slice) -> MinimumTensor:
        """Some of its output channels."""
        return MinimumTensor(self.scheme, self.codes[part], self.scales[part], self.minimums[part])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` in `dtype`; product and sum are computed and rounded in float32 (float64 if that is `dtype`)."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        n, k = self.shape
        scales, minimums = self.scales.to(compute), self.minimums.to(compute)
        grouped = self.codes.to(compute).view(n, scales.shape[1], -1)
        return grouped.mul_(scales[:, :, None]).add_(minimums[:, :, None]).view(n, k).to(dtype)


@dataclass(frozen=True)
class NestedScales:
    """Scales that are quantised themselves (QLoRA's double quantisation), in blocks of 256 along the flattened `[N, G]`:
    `scale = table[code] * absmax + offset`.

    codes: uint8 `[N * G]`. absmax: float32, one a block. table: float32 `[256]`. offset: of all of them, a float32 number.
    """

    BLOCK = 256

    codes: Tensor
    absmax: Tensor
    table: Tensor
    offset: float

    def scales(self) -> Tensor:
        """float32 `[N * G]`."""
        each = self.absmax.repeat_interleave(self.BLOCK)[: self.codes.numel()]
        return self.table[self.codes.long()] * each + torch.tensor(self.offset, dtype=torch.float32, device=self.codes.device)


@dataclass(frozen=True)
class Nf4Tensor:
    """Codes of the NF4 table (Dettmers et al. 2023, QLoRA): `W ≈ NF4[codes] * scales`.

    codes: uint8 `[N, K]`, 0..15. scales: float32 `[N, G]`, the largest magnitude of each group. nested: what they were computed from,
    where they are quantised too.
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    nested: NestedScales | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, part: slice) -> Nf4Tensor:
        """Some of its output channels, with their scales as numbers."""
        return Nf4Tensor(self.scheme, self.codes[part], self.scales[part])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` in `dtype`, computed in float32 as bitsandbytes does (float64 if that is `dtype`)."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        n, k = self.shape
        table = torch.tensor(NF4, dtype=torch.float32, device=self.codes.device).to(compute)
        values = table[self.codes.view(n, self.scales.shape[1], -1).int()]
        return values.mul_(self.scales.to(compute)[:, :, None]).view(n, k).to(dtype)


AnyTensor: TypeAlias = QuantizedTensor | MinimumTensor | Nf4Tensor

# QLoRA, appendix E: quantiles of a normal distribution, an exact 0 among them, scaled to [-1, 1].
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
