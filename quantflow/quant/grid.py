"""The canonical form of a quantised weight: unsigned codes and an affine grid.

Shapes: `N` output channels, `K` input channels, `g` group size, `G = K / g` groups a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
PER_CHANNEL = -1  # a group size: one group spans the whole row


@dataclass(frozen=True)
class Scheme:
    """How a linear layer's weight is quantised.

    bits: 2, 3, 4 or 8. group_size: input channels that share a scale, or `PER_CHANNEL`. symmetric: the zero point is the
    middle code, `2^(bits-1)`.
    """

    bits: int
    group_size: int
    symmetric: bool

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

    def __str__(self) -> str:
        group = "channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        return f"W{self.bits} {group} {'symmetric' if self.symmetric else 'asymmetric'}"


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes and grid of one weight: `W ≈ (codes - zeros) * scales`, each scale serving one group of input channels.

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
