"""Parameters of an 8-bit (or narrower) KV cache: `q = clamp(round((f - zp) / scale))`, `f ≈ q *
scale + zp`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVParameters:
    """scale and zero_point in float32: `[]` (one a layer), `[kv_heads]`, or `[kv_heads, D]`; bits
    of the signed codes."""

    bits: int
    scale: Tensor
    zero_point: Tensor

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the largest code."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


def kv_parameters(
    low: Tensor,
    high: Tensor,
    *,
    bits: int = 8,
    symmetric: bool = False,
    granularity: str = "tensor",
) -> KVParameters:
    """Parameters from the extremes `[kv_heads, D]` of K or V.

    Asymmetric, as LMDeploy: `zp = (min + max) / 2`, `scale = (max - min) / (2^bits - 1)`.
    Symmetric: `scale = absmax / (2^(bits-1) - 1)`, `zp = 0`. A constant channel would have scale 0:
    it gets 1, and its zero point is exact.
    """
    axes = {"tensor": (0, 1), "head": (1,), "channel": ()}[granularity]
    low, high = low.float(), high.float()
    if axes:
        low, high = low.amin(axes), high.amax(axes)
    if symmetric:
        zero = torch.zeros_like(low)
        scale = torch.maximum(low.abs(), high.abs()) / (2 ** (bits - 1) - 1)
    else:
        zero = (low + high) / 2
        scale = (high - low) / (2**bits - 1)
    return KVParameters(bits, torch.where(scale > 0, scale, torch.ones_like(scale)), zero)


def round_kv(x: Tensor, parameters: KVParameters) -> Tensor:
    """`x` `[B, kv_heads, L, D]` as it comes back from the cache, in its own dtype."""
    scale, zero = parameters.scale.to(x.device), parameters.zero_point.to(x.device)
    if scale.ndim:
        scale, zero = (p.view(1, p.shape[0], 1, -1) for p in (scale, zero))
    least, largest = parameters.bounds
    # Rounding gives 2^(bits-1) at the very maximum: clamp, or it wraps.
    codes = ((x.float() - zero) / scale).round_().clamp_(least, largest)
    return (codes * scale + zero).to(x.dtype)
