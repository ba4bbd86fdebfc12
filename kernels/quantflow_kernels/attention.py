"""Attention of new queries over a paged KV cache in 16 bits or int8, prefill and decode by one
kernel.

Shapes: `T` queries of `S` sequences one after the other, `H` heads, `G` KV heads, `D` head_dim, `B`
tokens a cache block.

int8 codes are cast to the dtype of the queries, which holds them exactly, just before each product;
they are never dequantised one by one. A K scale of the head acts on its scores, one a channel is
folded into q, one a token on that token's scores; a static zero point of K adds the same to all
scores of a query and cancels in the softmax, but under a cap, before which it is added. A static
scale and zero point of V act once, after the sum; a scale a token on that token's probabilities.

Batch invariance: keys are taken in tiles, and tiles in splits, that begin at absolute positions; a
split's result does not depend on what else is in the batch, a tile that a query may not see changes
none of its bits, and splits are merged in their order by the same operations, whether one program
does all of them (prefill) or a second kernel (decode).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantflow_kernels.configs import AttentionConfig
from quantflow_kernels.paging import DYNAMIC, Batch, KVCache, power_of_two, queries_a_tile

LOG2E = 1.4426950408889634
NO_SCORE = tl.constexpr(-1e30)  # finite: differences of it are numbers
# Probabilities times a token's scale may be smaller than float16 holds; the interpreter computes
# bfloat16 wrongly.
SCALED = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit
def _capped(scores, cap):
    """cap · tanh(score / cap), of scores that are exponents of 2, as what comes back is."""
    e = tl.exp2(-2 * tl.abs(scores) / cap)  # e to the -2 |x|, of whose tanh this is
    value = cap * 1.4426950408889634 * (1 - e) / (1 + e)
    return tl.where(scores < 0, -value, value)


@triton.jit
def _merge(m, total, acc, other_m, other_l, other_acc):
    """Two partial softmax sums (maximum, denominator, numerator) as one."""
    top = tl.maximum(m, other_m)
    a, b = tl.exp2(m - top), tl.exp2(other_m - top)
    return top, tl.fma(total, a, other_l * b), tl.fma(acc, a[:, None], other_acc * b[:, None])


@triton.jit
def _finish(
    total, acc, v_scale, v_zero, kv_head, channels, D, MODE: tl.constexpr, V_ZERO: tl.constexpr
):
    """What attention puts out, from the merged sums."""
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    if MODE < 2:
        place, known = kv_head * D + channels, channels < D
        out *= tl.load(v_scale + place, mask=known, other=0.0)[None, :]
        if V_ZERO:
            out += tl.load(v_zero + place, mask=known, other=0.0)[None, :]
    return out


@triton.jit(
    do_not_specialize=["window", "queries", "max_blocks"],
    do_not_specialize_on_alignment=[
        "block_table",
        "tile_sequence",
        "tile_start",
        "query_start",
        "contexts",
    ],
)
def attention_kernel(
    q,
    k_cache,
    v_cache,
    out,
    part_out,
    part_ml,
    block_table,
    tile_sequence,
    tile_start,
    query_start,
    contexts,
    k_scale,
    k_zero,
    v_scale,
    v_zero,
    sm_scale,
    cap,
    window,
    queries,
    max_blocks,
    q_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    MODE: tl.constexpr,
    V_ZERO: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    K_ZERO: tl.constexpr,
    SPLIT_PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SHARED: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (i, h, s): query tile i with the heads that read KV head h, over split s, or over all
    where not SPLIT_PARTS.

    SHARED: query heads a KV head, padded to a power of two. part_out `[splits, T, H, D]`, part_ml
    `[splits, 2, T, H]`.
    """
    # Which queries this program computes, and where they stand in their sequence.
    pid, kv_head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(tile_sequence + pid)
    begin = tl.load(query_start + sequence)
    length = tl.load(query_start + sequence + 1) - begin
    context = tl.load(contexts + sequence)
    row = tl.arange(0, BLOCK_Q)
    group: tl.constexpr = HEADS // KV_HEADS
    index = tl.load(tile_start + pid) + row // SHARED  # of the query in its sequence
    real = (index < length) & (row % SHARED < group)
    at = context - length + index  # its absolute position
    head = kv_head * group + row % SHARED
    place = (begin + index).to(tl.int64) * HEADS + head
    channels = tl.arange(0, BLOCK_D)
    known = channels < D
    # The queries, with the scale of K folded in where it is one for a head or a channel.
    source = q + (begin + index).to(tl.int64) * q_stride + head * D
    queries_here = tl.load(
        source[:, None] + channels[None, :], mask=real[:, None] & known[None, :], other=0.0
    )
    offset = tl.zeros((BLOCK_Q,), tl.float32)
    if CAP and K_ZERO:
        if MODE == 0:
            shift = tl.load(k_zero + kv_head) + channels * 0.0
        else:
            shift = tl.load(k_zero + kv_head * D + channels, mask=known, other=0.0)
        offset = tl.sum(queries_here.to(tl.float32) * shift[None, :], 1) * sm_scale
    factor = sm_scale
    if MODE == 0:
        factor = sm_scale * tl.load(k_scale + kv_head)
    if MODE == 1:
        fold = tl.load(k_scale + kv_head * D + channels, mask=known, other=0.0)
        queries_here = (queries_here.to(tl.float32) * fold[None, :]).to(queries_here.dtype)
    # The splits of keys that any of these queries may see.
    first_at = tl.min(tl.where(real, at, context))
    last_at = tl.max(tl.where(real, at, 0))
    first_split, last_split = 0, last_at // SPLIT
    if WINDOW:
        first_split = tl.maximum(first_at - window + 1, 0) // SPLIT
    if SPLIT_PARTS:
        first_split = tl.maximum(first_split, tl.program_id(2))
        last_split = tl.minimum(last_split, tl.program_id(2))
    # The online softmax: running maximum, sum and weighted values.
    m = tl.full((BLOCK_Q,), NO_SCORE, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for split in range(first_split, last_split + 1):
        low, high = split * SPLIT, tl.minimum(split * SPLIT + SPLIT, last_at + 1)
        if WINDOW:
            low = tl.maximum(low, tl.maximum(first_at - window + 1, 0) // TILE * TILE)
        split_m = tl.full((BLOCK_Q,), NO_SCORE, tl.float32)
        split_l = tl.zeros((BLOCK_Q,), tl.float32)
        split_acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        # One split: tile after tile of keys and values.
        for start in tl.range(low, high, TILE, num_stages=STAGES):
            key = start + tl.arange(0, TILE)
            present = key <= last_at
            if WINDOW:  # what lies before may have been freed
                present = present & (key > first_at - window)
            page = tl.load(
                block_table + sequence * max_blocks + key // PAGE, mask=present, other=0
            ).to(tl.int64)
            slot = (page * KV_HEADS + kv_head) * PAGE + key % PAGE
            k = tl.load(
                k_cache + slot[None, :] * D + channels[:, None],
                mask=present[None, :] & known[:, None],
                other=0,
            )
            scores = tl.dot(queries_here, k.to(queries_here.dtype), input_precision="ieee") * factor
            if MODE == 2:
                scores *= tl.load(k_scale + slot, mask=present, other=0.0)[None, :]
            if CAP:
                scores = _capped(scores + offset[:, None], cap)
            visible = key[None, :] <= at[:, None]
            if WINDOW:
                visible = visible & (key[None, :] > at[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
            top = tl.maximum(split_m, tl.max(scores, 1))
            weight, shrink = tl.exp2(scores - top[:, None]), tl.exp2(split_m - top)
            split_l = tl.fma(split_l, shrink, tl.sum(weight, 1))
            if MODE == 2:
                weight *= tl.load(v_scale + slot, mask=present, other=0.0)[None, :]
            v = tl.load(
                v_cache + slot[:, None] * D + channels[None, :],
                mask=present[:, None] & known[None, :],
                other=0,
            )
            kind: tl.constexpr = SCALED if MODE == 2 else q.dtype.element_ty
            split_acc = tl.dot(
                weight.to(kind), v.to(kind), split_acc * shrink[:, None], input_precision="ieee"
            )
            split_m = top
        # Splits are merged here, in order, or by merge_splits_kernel.
        if SPLIT_PARTS:
            m, total, acc = split_m, split_l, split_acc
        else:
            m, total, acc = _merge(m, total, acc, split_m, split_l, split_acc)
    # The result, or this split's part of it.
    stored = real[:, None] & known[None, :]
    if SPLIT_PARTS:
        part = tl.program_id(2).to(tl.int64)
        tl.store(
            part_out + (part * queries * HEADS + place)[:, None] * D + channels[None, :],
            acc,
            mask=stored,
        )
        tl.store(part_ml + 2 * part * queries * HEADS + place, m, mask=real)
        tl.store(part_ml + (2 * part + 1) * queries * HEADS + place, total, mask=real)
    else:
        result = _finish(total, acc, v_scale, v_zero, kv_head, channels, D, MODE, V_ZERO)
        tl.store(
            out + place[:, None] * D + channels[None, :],
            result.to(out.dtype.element_ty),
            mask=stored,
        )


@triton.jit(do_not_specialize=["queries"], do_not_specialize_on_alignment=["query_last"])
def merge_splits_kernel(
    part_out,
    part_ml,
    out,
    v_scale,
    v_zero,
    query_last,
    queries,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MODE: tl.constexpr,
    V_ZERO: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Program (t, h): the splits of query t and head h, in their order. query_last: each query's
    position."""
    token, head = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, BLOCK_D)
    known = channels < D
    splits = tl.load(query_last + token) // SPLIT + 1
    place = token.to(tl.int64) * HEADS + head + tl.zeros((1,), tl.int64)
    m = tl.full((1,), NO_SCORE, tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, BLOCK_D), tl.float32)
    for split in tl.range(0, splits, num_stages=4):
        part = tl.cast(split, tl.int64)
        other = tl.load(
            part_out + (part * queries * HEADS + place)[:, None] * D + channels[None, :],
            mask=known[None, :],
            other=0.0,
        )
        other_m = tl.load(part_ml + 2 * part * queries * HEADS + place)
        other_l = tl.load(part_ml + (2 * part + 1) * queries * HEADS + place)
        m, total, acc = _merge(m, total, acc, other_m, other_l, other)
    result = _finish(
        total, acc, v_scale, v_zero, head // (HEADS // KV_HEADS), channels, D, MODE, V_ZERO
    )
    tl.store(
        out + place[:, None] * D + channels[None, :],
        result.to(out.dtype.element_ty),
        mask=known[None, :],
    )


def paged_attention(
    q: Tensor,
    cache: KVCache,
    batch: Batch,
    sm_scale: float,
    config: AttentionConfig,
    window: int = 0,
    cap: float = 0.0,
    *,
    parts: bool | None = None,
) -> Tensor:
    """Attention of `q` `[T, H, D]`, each query over its sequence's keys up to itself, at most
    `window` of them (0: all). cap: scores become cap · tanh(score / cap) (0: they stay).

    Keys and values of the queries themselves are in the cache already; `batch` was made for these
    heads and this `config`. parts: whether splits run in programs of their own, the default in a
    decode over more than one; the result's bits are the same.
    """
    # Shapes, and what the kernel takes for granted.
    tokens, heads, d = q.shape
    kv_heads, page = cache.k.shape[1], cache.k.shape[2]
    block_q, shared = queries_a_tile(heads, kv_heads, config)
    parts = batch.decode and batch.splits > 1 if parts is None else parts
    if (
        q.stride(2) != 1
        or q.stride(1) != d
        or not (cache.k.is_contiguous() and cache.v.is_contiguous())
    ):
        raise ValueError(
            f"q {list(q.shape)} with strides {q.stride()}, or a cache, whose last dimensions are"
            " not contiguous"
        )
    out = torch.empty(tokens, heads, d, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    # Where splits run in programs of their own, room for their parts.
    splits = batch.splits if parts else 1
    part_out = torch.empty(
        splits if parts else 0, tokens, heads, d, dtype=torch.float32, device=q.device
    )
    part_ml = torch.empty(
        splits if parts else 0, 2, tokens, heads, dtype=torch.float32, device=q.device
    )
    # None: not read
    k_scale, k_zero, v_scale, v_zero = (
        part_ml if t is None else t
        for t in (cache.k_scale, cache.k_zero, cache.v_scale, cache.v_zero)
    )
    constants = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "D": d,
        "BLOCK_D": max(16, power_of_two(d)),
        "MODE": cache.mode,
        "V_ZERO": cache.v_zero is not None,
        "SPLIT": config.split,
    }
    attention_kernel[(len(batch.tile_start), kv_heads, splits)](
        q,
        cache.k,
        cache.v,
        out,
        part_out,
        part_ml,
        batch.block_table,
        batch.tile_sequence,
        batch.tile_start,
        batch.query_start,
        batch.contexts,
        k_scale,
        k_zero,
        v_scale,
        v_zero,
        sm_scale * LOG2E,
        cap,
        window,
        tokens,
        batch.block_table.shape[1],
        q.stride(0),
        PAGE=page,
        WINDOW=window > 0,
        CAP=cap > 0,
        K_ZERO=cache.mode < DYNAMIC and cache.k_zero is not None,
        SPLIT_PARTS=parts,
        BLOCK_Q=block_q,
        SHARED=shared,
        TILE=config.tile,
        STAGES=config.stages,
        num_warps=config.warps,
        **constants,
    )
    # And the parts into one.
    if parts:
        merge_splits_kernel[(tokens, heads)](
            part_out,
            part_ml,
            out,
            v_scale,
            v_zero,
            batch.query_last,
            tokens,
            **constants,
            num_warps=1,
        )
    return out


def bytes_moved(cache: KVCache, contexts: list[int], heads: int, tokens: int) -> int:
    """What one call has to move at least: the keys and values of all contexts, q and the output."""
    kv_heads, d, item = cache.k.shape[1], cache.k.shape[3], cache.k.element_size()
    scales = 8 if cache.mode == DYNAMIC else 0  # two float32 a token and head
    return sum(contexts) * kv_heads * (2 * d * item + scales) + 2 * tokens * heads * d * 2
