"""Rotary embedding of new queries and keys, and new keys and values into their slots of the cache,
quantised where that is int8.

Shapes as in `attention`: `T` tokens, `H` heads, `G` KV heads, `D` head_dim, `B` tokens a cache
block.

Keys are rotated in float32 and rounded to the dtype of the activations before they are quantised,
as they would be in two steps.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quantflow_kernels.paging import DYNAMIC, KVCache

# 1.5 · 2²³: a float32 of less than 2²² that is added to it is rounded to an integer, halves to even
ROUND = tl.constexpr(12582912.0)


@triton.jit
def _code(value, zero, scale, lowest):
    """int8 codes; clamping before rounding is the same as after it, for bounds that are
    integers."""
    code = tl.minimum(tl.maximum(tl.div_rn(value - zero, scale), lowest), 127.0)
    return ((code + ROUND) - ROUND).to(tl.int8)


@triton.jit
def _absmax(first, second):
    return tl.maximum(tl.max(tl.abs(first)), tl.max(tl.abs(second)))


@triton.jit
def kv_store_kernel(
    q,
    k,
    v,
    cos,
    sin,
    slots,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    k_zero,
    v_zero,
    q_stride,
    k_stride,
    v_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    MODE: tl.constexpr,
    ROTATE: tl.constexpr,
    K_ZERO: tl.constexpr,
    V_ZERO: tl.constexpr,
):
    """Program (t, i): head i of token t: a query's, then a key's, then a value's. q is rotated in
    place. HALF: D / 2, padded."""
    # Which head of which token.
    token, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    is_query, is_value = i < HEADS, i >= HEADS + KV_HEADS
    head = tl.where(is_query, i, tl.where(is_value, i - HEADS - KV_HEADS, i - HEADS))
    lane = tl.arange(0, HALF)
    known = lane < D // 2
    slot = tl.load(slots + token).to(tl.int64)
    # Its two halves, which rotate into each other.
    if is_query:
        source = q + token * q_stride + head * D
    elif is_value:
        source = v + token * v_stride + head * D
    else:
        source = k + token * k_stride + head * D
    first = tl.load(source + lane, mask=known, other=0.0).to(tl.float32)
    second = tl.load(source + D // 2 + lane, mask=known, other=0.0).to(tl.float32)
    if ROTATE:  # noqa: SIM102 - the compiler's branch, then the program's
        if not is_value:
            c = tl.load(cos + token * (D // 2) + lane, mask=known, other=0.0)
            s = tl.load(sin + token * (D // 2) + lane, mask=known, other=0.0)
            turned = first * c - second * s
            second = (second * c + first * s).to(q.dtype.element_ty).to(tl.float32)
            first = turned.to(q.dtype.element_ty).to(tl.float32)
    # A query goes back where it was; a key or a value goes to its slot.
    if is_query:
        if ROTATE:
            tl.store(source + lane, first.to(q.dtype.element_ty), mask=known)
            tl.store(source + D // 2 + lane, second.to(q.dtype.element_ty), mask=known)
    elif slot >= 0:
        place = (slot // PAGE * KV_HEADS + head) * PAGE + slot % PAGE
        target, scales, zeros = k_cache, k_scale, k_zero
        if is_value:
            target, scales, zeros = v_cache, v_scale, v_zero
        target += place * D
        # By mode: as it is (3), with a scale of its own (2), with scales that are given (0, 1).
        if MODE == 3:
            tl.store(target + lane, first.to(target.dtype.element_ty), mask=known)
            tl.store(target + D // 2 + lane, second.to(target.dtype.element_ty), mask=known)
        elif MODE == 2:
            scale = tl.div_rn(_absmax(first, second), 127.0)
            scale = tl.where(scale > 0, scale, 1.0)
            tl.store(scales + place, scale)
            tl.store(target + lane, _code(first, 0.0, scale, -127.0), mask=known)
            tl.store(target + D // 2 + lane, _code(second, 0.0, scale, -127.0), mask=known)
        else:
            # A K scale of the whole head is read once a channel all the same.
            at = head * D + lane
            beyond = D // 2
            if MODE == 0:  # noqa: SIM102
                if not is_value:
                    at = head + lane * 0
                    beyond = 0
            shifts = tl.where(is_value, 1 if V_ZERO else 0, 1 if K_ZERO else 0)
            shifted = known & (lane * 0 + shifts > 0)
            scale = tl.load(scales + at, mask=known, other=1.0)
            zero = tl.load(zeros + at, mask=shifted, other=0.0)
            tl.store(target + lane, _code(first, zero, scale, -128.0), mask=known)
            scale = tl.load(scales + at + beyond, mask=known, other=1.0)
            zero = tl.load(zeros + at + beyond, mask=shifted, other=0.0)
            tl.store(target + D // 2 + lane, _code(second, zero, scale, -128.0), mask=known)


def kv_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    slots: Tensor,
    cache: KVCache,
) -> None:
    """Rotates q `[T, H, D]` in place, and stores k and v `[T, G, D]`, k rotated, at `slots`
    (integers `[T]`: block · B + offset; less than 0: nowhere).

    cos, sin: float32 `[T, D / 2]`, of each token's position; None: no rotary embedding. The last
    two dimensions of q, k and v are contiguous. Raises ValueError for an odd head_dim.
    """
    tokens, heads, d = q.shape
    if d % 2:
        raise ValueError(f"head_dim {d} is odd: its halves cannot be paired")
    if not tokens:
        return
    # what is None is not read
    kv_heads, nothing = k.shape[1], q if cache.k_scale is None else cache.k_scale
    k_scale, v_scale, k_zero, v_zero = (
        nothing if t is None else t
        for t in (cache.k_scale, cache.v_scale, cache.k_zero, cache.v_zero)
    )
    kv_store_kernel[(tokens, heads + 2 * kv_heads)](
        q,
        k,
        v,
        nothing if cos is None else cos,
        nothing if sin is None else sin,
        slots,
        cache.k,
        cache.v,
        k_scale,
        v_scale,
        k_zero,
        v_zero,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=d,
        HALF=triton.next_power_of_2(d // 2),
        PAGE=cache.k.shape[2],
        MODE=cache.mode,
        ROTATE=cos is not None,
        K_ZERO=cache.k_zero is not None,
        V_ZERO=cache.v_zero is not None,
        num_warps=1,
    )


def bytes_moved(cache: KVCache, tokens: int, heads: int, item: int = 2) -> int:
    """What one call moves: q read and written, k and v read, their codes and dynamic scales
    written. item: bytes of an activation."""
    kv_heads, d = cache.k.shape[1], cache.k.shape[3]
    scales = 8 if cache.mode == DYNAMIC else 0
    return tokens * (
        2 * heads * d * item + kv_heads * (2 * d * (item + cache.k.element_size()) + scales)
    )
