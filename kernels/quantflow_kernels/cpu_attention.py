"""Attention over a paged KV cache on a CPU, in float32, by plain torch operations; the cache and
the batch are `paging`'s.

exact: rows (queries × the heads that share a KV head) and keys are taken in tiles of fixed size,
the last ones padded, and keys at absolute positions, so that every product has the same shape
whatever the batch, and a query's bits do not depend on it. Otherwise each sequence is one product
with its keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quantflow_kernels import reference
from quantflow_kernels.paging import DYNAMIC, STATIC_CHANNEL, STATIC_HEAD, Batch, KVCache

ROWS = 16  # at least; a power of two
KEYS = 256


def paged_attention(
    q: Tensor,
    cache: KVCache,
    batch: Batch,
    sm_scale: float,
    window: int = 0,
    cap: float = 0.0,
    *,
    exact: bool,
) -> Tensor:
    """What `attention.paged_attention` computes, for `q` `[T, H, D]` on a CPU."""
    out = torch.empty_like(q)
    starts, contexts = batch.query_start.tolist(), batch.contexts.tolist()
    for s, context in enumerate(contexts):
        part = slice(starts[s], starts[s + 1])
        if part.stop > part.start:
            out[part] = _sequence(
                q[part], cache, batch.block_table[s], context, sm_scale, window, cap, exact
            )
    return out


def _sequence(
    q: Tensor,
    cache: KVCache,
    table: Tensor,
    context: int,
    sm_scale: float,
    window: int,
    cap: float,
    exact: bool,
) -> Tensor:
    length, heads, d = q.shape
    kv_heads = cache.k.shape[1]
    shared = heads // kv_heads
    rows = q.float().view(length, kv_heads, shared, d).transpose(0, 1)  # [G, T, shared, D]
    if cache.mode == STATIC_CHANNEL and cache.k_scale is not None:
        rows = rows * cache.k_scale[:, None, None]
    elif cache.mode == STATIC_HEAD and cache.k_scale is not None:
        rows = rows * cache.k_scale[:, None, None, None]
    rows = rows * sm_scale
    offset = _offset(q.float().view(length, kv_heads, shared, d).transpose(0, 1) * sm_scale, cache)
    first = context - length
    if exact:
        per_tile = max(1, ROWS // shared)
        parts = [
            _tile(
                rows[:, i : i + per_tile],
                offset[:, i : i + per_tile],
                per_tile,
                first + i,
                cache,
                table,
                window,
                cap,
            )
            for i in range(0, length, per_tile)
        ]
        result = torch.cat(parts, dim=1)
    else:
        low = max(0, first - window + 1) if window else 0
        keys = torch.arange(low, context)
        at = torch.arange(first, context)
        scores, v = _scores(rows.flatten(1, 2), offset.flatten(1, 2), cache, table, keys, cap)
        scores = scores.view(kv_heads, length, shared, -1).masked_fill(
            ~_visible(at, keys, window)[:, None], -torch.inf
        )
        weights = _weighted(scores.softmax(-1), cache, table, keys)
        result = (weights.flatten(1, 2) @ v).view(kv_heads, length, shared, d)
    if cache.mode < DYNAMIC and cache.v_scale is not None:
        result = result * cache.v_scale[:, None, None]
        if cache.v_zero is not None:
            result = result + cache.v_zero[:, None, None]
    return result.transpose(0, 1).reshape(length, heads, d).to(q.dtype)


def _offset(rows: Tensor, cache: KVCache) -> Tensor:
    """What the zero point of K adds to the scores of rows `[G, n, shared, D]`, `[G, n, shared, 1]`.
    Only under a cap it matters: else it cancels in the softmax."""
    if cache.mode >= DYNAMIC or cache.k_zero is None:
        return torch.zeros_like(rows[..., :1])
    zero = cache.k_zero if cache.k_zero.ndim == 2 else cache.k_zero[:, None]
    return (rows * zero[:, None, None]).sum(-1, keepdim=True)


def _tile(
    rows: Tensor,
    offset: Tensor,
    per_tile: int,
    first: int,
    cache: KVCache,
    table: Tensor,
    window: int,
    cap: float,
) -> Tensor:
    """`[G, n, shared, D]` for the n queries from position `first` on, padded to `per_tile`, over
    tiles of `KEYS` keys."""
    kv_heads, count, shared, d = rows.shape
    # [G, per_tile * shared, D]
    padded, offset = (
        F.pad(part, (0, 0, 0, 0, 0, per_tile - count)).flatten(1, 2) for part in (rows, offset)
    )
    at = torch.arange(first, first + per_tile).repeat_interleave(shared)
    last = first + count - 1
    peak = torch.full((*padded.shape[:2], 1), -1e30)  # finite: differences of it are numbers
    total, acc = torch.zeros_like(peak), torch.zeros_like(padded)
    low = max(0, first - window + 1) if window else 0
    for start in range(low // KEYS * KEYS, last + 1, KEYS):
        keys = torch.arange(start, start + KEYS)
        there = keys.clamp(low, last)  # what lies outside may have been freed
        scores, v = _scores(padded, offset, cache, table, there, cap)
        scores = scores.masked_fill(~_visible(at, keys, window), -torch.inf)
        top = torch.maximum(peak, scores.amax(-1, keepdim=True))
        weights, shrink = (scores - top).exp(), (peak - top).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        acc = acc * shrink + _weighted(weights, cache, table, there) @ v
        peak = top
    return (acc / total).view(kv_heads, per_tile, shared, d)[:, :count]


def _entries(cache: Tensor, table: Tensor, keys: Tensor) -> Tensor:
    """`[G, C, …]` of the cache at positions `keys`."""
    size = cache.shape[2]
    return cache[table.long()[keys // size], :, keys % size].transpose(0, 1)


def _scores(
    rows: Tensor, offset: Tensor, cache: KVCache, table: Tensor, keys: Tensor, cap: float
) -> tuple[Tensor, Tensor]:
    """Scores `[G, rows, C]` and values `[G, C, D]`, both float32."""
    scores = rows @ _entries(cache.k, table, keys).float().transpose(1, 2)
    if cache.mode == DYNAMIC and cache.k_scale is not None:
        scores = scores * _entries(cache.k_scale, table, keys)[:, None]
    if cap:
        scores = ((scores + offset) / cap).tanh() * cap
    return scores, _entries(cache.v, table, keys).float()


def _weighted(weights: Tensor, cache: KVCache, table: Tensor, keys: Tensor) -> Tensor:
    """Probabilities `[G, …, C]`, times the scale of each token's value where it has one."""
    if cache.mode == DYNAMIC and cache.v_scale is not None:
        scale = _entries(cache.v_scale, table, keys)
        return weights * scale.view(scale.shape[0], *[1] * (weights.ndim - 2), -1)
    return weights


def _visible(at: Tensor, keys: Tensor, window: int) -> Tensor:
    behind = at[:, None] - keys
    return (behind >= 0) & (behind < window) if window else behind >= 0


def kv_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    slots: Tensor,
    cache: KVCache,
) -> None:
    """What `kv_store.kv_store` does, on a CPU."""
    if cos is not None and sin is not None:
        q.copy_(reference.rotary(q, cos, sin))
        k = reference.rotary(k, cos, sin)
    real = slots >= 0
    block, offset = slots[real] // cache.k.shape[2], slots[real] % cache.k.shape[2]
    for value, target, scale, zero in (
        (k[real], cache.k, cache.k_scale, cache.k_zero),
        (v[real], cache.v, cache.v_scale, cache.v_zero),
    ):
        if cache.mode == DYNAMIC and scale is not None:
            codes, scales = reference.quantize_kv_dynamic(value)
            target[block, :, offset], scale[block, :, offset] = codes, scales[..., 0]
        elif cache.mode < DYNAMIC and scale is not None:
            target[block, :, offset] = reference.quantize_kv(value, scale, zero)
        else:
            target[block, :, offset] = value.to(target.dtype)
