"""RMSNorm, with the residual addition that comes before it: `r = x + residual`, `y = r /
sqrt(mean(r²) + eps) · weight`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rms_norm_kernel(
    x, residual, weight, out, K, eps, x_stride, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    """Program t: one row, which fits in a block. ADD: `residual` becomes the sum, rounded to its
    dtype before it is normalised."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    known = channel < K
    value = tl.load(x + row * x_stride + channel, mask=known, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * K + channel, mask=known, other=0.0).to(tl.float32)
        value = value.to(residual.dtype.element_ty)
        tl.store(residual + row * K + channel, value, mask=known)
        value = value.to(tl.float32)
    power = tl.sum(value * value) / K
    scale = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    result = value * tl.rsqrt(power + eps) * scale
    tl.store(out + row * K + channel, result.to(out.dtype.element_ty), mask=known)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """The norm of `x` `[T, K]`, or of `x + residual`, which then replaces `residual`, in place."""
    tokens, k = x.shape
    out = torch.empty(tokens, k, dtype=x.dtype, device=x.device)
    if tokens:
        block = triton.next_power_of_2(k)
        rms_norm_kernel[(tokens,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            k,
            eps,
            x.stride(0),
            ADD=residual is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
    return out


def bytes_moved(tokens: int, k: int, added: bool, item: int = 2) -> int:
    """x read and y written; with a residual, that read and written too."""
    return tokens * k * item * (4 if added else 2)
