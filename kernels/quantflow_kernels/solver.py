"""GPTQ's recursion and its refinement on a GPU, some columns at a time: what `cpu_solver` does on a
CPU.

By torch operations a column takes five launches, which cost more than its arithmetic. Shapes: N
output channels, K input channels, G groups; matrices are transposed, `[K, N]`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # output channels a program
# 1.5 · 2²³: a float32 of less than 2²² that is added to it is rounded to an integer, halves to even
ROUND = tl.constexpr(12582912.0)


@triton.jit
def _nearest(value, lowest, highest):
    """Clamping before rounding is the same as after it, for bounds that are integers."""
    return (tl.minimum(tl.maximum(value, lowest), highest) + ROUND) - ROUND


@triton.jit(do_not_specialize=["start", "stop"])
def gptq_columns_kernel(
    w,
    codes,
    errors,
    ratios,
    scales,
    lowest,
    highest,
    group_at,
    N,
    down,
    across,
    start,
    stop,
    BLOCK: tl.constexpr,
):
    """Program n: a strip of output channels through columns `[start, stop)`. down, across: strides
    of `ratios`."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < N
    for i in range(start, stop):
        row = tl.cast(i, tl.int64) * N + channel
        x = tl.load(w + row, mask=inside, other=0.0)
        for p in range(start, i):
            ratio = tl.load(ratios + tl.cast(p, tl.int64) * down + tl.cast(i, tl.int64) * across)
            x = tl.fma(
                tl.zeros_like(x) + ratio,
                tl.load(errors + tl.cast(p, tl.int64) * N + channel, mask=inside, other=0.0),
                x,
            )
        grid = tl.load(group_at + i) * N + channel
        scale = tl.load(scales + grid, mask=inside, other=1.0)
        low, high = (
            tl.load(lowest + grid, mask=inside, other=0.0),
            tl.load(highest + grid, mask=inside, other=0.0),
        )
        code = _nearest(tl.div_rn(x, scale), low, high)
        tl.store(codes + row, code, mask=inside)
        tl.store(errors + row, code * scale - x, mask=inside)
        tl.debug_barrier()  # another thread may read them for the next column


@triton.jit(do_not_specialize=["start", "stop"])
def refine_columns_kernel(
    values,
    slope,
    codes,
    changes,
    hessian,
    scale,
    lowest,
    highest,
    curvature,
    N,
    K,
    start,
    stop,
    BLOCK: tl.constexpr,
):
    """Program n: a strip of output channels through columns `[start, stop)` of one group."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < N
    s = tl.load(scale + channel, mask=inside, other=1.0)
    low, high = (
        tl.load(lowest + channel, mask=inside, other=0.0),
        tl.load(highest + channel, mask=inside, other=0.0),
    )
    for i in range(start, stop):
        row = tl.cast(i, tl.int64) * N + channel
        x = tl.load(slope + row, mask=inside, other=0.0)
        for p in range(start, i):
            h = tl.load(hessian + tl.cast(p, tl.int64) * K + i)
            x = tl.fma(
                tl.zeros_like(x) - h,
                tl.load(changes + tl.cast(p, tl.int64) * N + channel, mask=inside, other=0.0),
                x,
            )
        value = tl.load(values + row, mask=inside, other=0.0)
        code = _nearest(
            tl.div_rn(value + tl.div_rn(x, tl.zeros_like(x) + tl.load(curvature + i)), s), low, high
        )
        tl.store(codes + row, code, mask=inside)
        tl.store(changes + row, code * s - value, mask=inside)
        tl.debug_barrier()


def gptq_columns(
    w: Tensor,
    codes: Tensor,
    errors: Tensor,
    ratios: Tensor,
    scales: Tensor,
    lowest: Tensor,
    highest: Tensor,
    group_at: Tensor,
    start: int,
    stop: int,
) -> None:
    """As `cpu_solver.gptq_columns`; all but `ratios` contiguous."""
    n = w.shape[1]
    gptq_columns_kernel[(triton.cdiv(n, BLOCK),)](
        w,
        codes,
        errors,
        ratios,
        scales,
        lowest,
        highest,
        group_at,
        n,
        *ratios.stride(),
        start,
        stop,
        BLOCK=BLOCK,
        num_warps=1,
    )


def refine_columns(
    values: Tensor,
    slope: Tensor,
    codes: Tensor,
    changes: Tensor,
    hessian: Tensor,
    scale: Tensor,
    lowest: Tensor,
    highest: Tensor,
    curvature: Tensor,
    start: int,
    stop: int,
) -> None:
    """As `cpu_solver.refine_columns`; all contiguous."""
    k, n = values.shape
    refine_columns_kernel[(triton.cdiv(n, BLOCK),)](
        values,
        slope,
        codes,
        changes,
        hessian,
        scale,
        lowest,
        highest,
        curvature,
        n,
        k,
        start,
        stop,
        BLOCK=BLOCK,
        num_warps=1,
    )
