"""The weight in 16 bits, out of the kernels' layout: for products with so many tokens that a dense
one is faster."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantflow_kernels.layout import PackedWeight

BLOCK_N = 16


@triton.jit
def dequantize_kernel(
    words,
    high,
    scales,
    zeros,
    out,
    N,
    K,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (i, b): rows `i·BLOCK_N …` of block b. GROUP: input channels a group; 0 where one
    group spans the row."""
    LANE: tl.constexpr = 2 if BITS == 3 else BITS
    SLICES: tl.constexpr = 16 // LANE
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    lane = tl.arange(0, SLICE)
    inside = rows < N
    first = (block.to(tl.int64) * N + rows)[:, None]
    packed = tl.load(words + first * SLICE + lane[None, :], mask=inside[:, None], other=0).to(
        tl.uint16, bitcast=True
    )
    if BITS == 3:
        place = first * (SLICE // 2) + (lane % (SLICE // 2))[None, :]
        third = tl.load(high + place, mask=inside[:, None], other=0).to(tl.uint16, bitcast=True)
    for j in tl.static_range(SLICES):
        codes = (packed >> (LANE * j)) & (2**LANE - 1)
        if BITS == 3:
            codes += ((third >> (2 * j + lane // (SLICE // 2))[None, :].to(tl.uint16)) & 1) * 4
        k = block * (SLICE * SLICES) + j * SLICE
        known = inside & (k + tl.zeros_like(rows) < K)
        group = rows if GROUP == 0 else (k // GROUP) * N + rows
        zero = tl.load(zeros + group, mask=known, other=0).to(tl.float32)
        scale = tl.load(scales + group, mask=known, other=0.0).to(tl.float32)
        value = (codes.to(tl.float32) - zero[:, None]) * scale[:, None]
        mask = known[:, None] & (k + lane < K)[None, :]
        tl.store(
            out + rows[:, None].to(tl.int64) * K + (k + lane)[None, :],
            value.to(out.dtype.element_ty),
            mask=mask,
        )


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` in `dtype`: `(code - zero) · scale`, computed in float32 and rounded
    once."""
    n, k = weight.out_features, weight.in_features
    out = torch.empty(n, k, dtype=dtype, device=weight.words.device)
    dequantize_kernel[(triton.cdiv(n, BLOCK_N), weight.words.shape[0])](
        weight.words,
        weight.words if weight.high is None else weight.high,
        weight.scales,
        weight.zeros,
        out,
        n,
        k,
        BITS=weight.bits,
        GROUP=0 if weight.group_size == k else weight.group_size,
        SLICE=weight.slice,
        BLOCK_N=BLOCK_N,
    )
    return out


def bytes_moved(weight: PackedWeight, item: int = 2) -> int:
    """The packed weight read, the dense one written."""
    return weight.nbytes + weight.out_features * weight.in_features * item
