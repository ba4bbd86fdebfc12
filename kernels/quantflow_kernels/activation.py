"""`silu(gate) · up`, the halves of one product side by side."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def silu_mul_kernel(gate_up, out, K, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = channel < K
    gate = tl.load(gate_up + row * stride + channel, mask=known, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + K + channel, mask=known, other=0.0).to(tl.float32)
    # sigmoid(g) = 1 / (1 + exp(-g)): exp overflows to infinity for very negative g, and the
    # quotient is 0, as it should be.
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * K + channel, result.to(out.dtype.element_ty), mask=known)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`[T, K]` from `[T, 2K]`: the gate, then up."""
    tokens, k = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, k, dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        block = min(1024, triton.next_power_of_2(k))
        silu_mul_kernel[(tokens, triton.cdiv(k, block))](
            gate_up, out, k, gate_up.stride(0), BLOCK=block
        )
    return out


def bytes_moved(tokens: int, k: int, item: int = 2) -> int:
    """Gate and up read, the product written."""
    return 3 * tokens * k * item
