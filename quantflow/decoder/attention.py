"""Causal attention over whole windows, as calibration and evaluation need it: no cache, no
padding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from quantflow_kernels import cpu_causal
from torch import Tensor

QUERY_BLOCK = 128  # queries of one head that go together
SCORES_AT_ONCE = 2**20  # scores that are in memory at a time, about a core's cache


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """softmax(`scale` q kᵀ) v, each query seeing itself and what precedes it, at most `window`
    keys.

    q: `[B, heads, L, D]`; k, v: `[B, kv_heads, L, D]`; the result has the shape and dtype of `q`.
    scale: None: 1 / √D. cap: scores become cap · tanh(score / cap) before the softmax.
    """
    length = q.shape[2]
    if window is not None and window >= length:
        window = None
    if cap is None and all(map(cpu_causal.supports, (q, k, v))):
        return cpu_causal.causal_attention(q, k, v, window=window or 0, scale=scale)
    trained = torch.is_grad_enabled() and q.requires_grad
    if cap is not None or (q.device.type == "cpu" and q.dtype == torch.bfloat16 and not trained):
        return _in_blocks(q, k, v, window, scale, cap)
    grouped = q.shape[1] != k.shape[1]
    if window is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
    at = torch.arange(length, device=q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=_visible(at, at, window), scale=scale, enable_gqa=grouped
    )


def _visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees, `[queries, keys]`, from their positions."""
    behind = queries[:, None] - keys[None, :]
    return (behind >= 0) & (behind < window) if window is not None else behind >= 0


def _in_blocks(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, cap: float | None
) -> Tensor:
    """The same by two batched products and a softmax a block of queries, scores rounded to bfloat16
    as eager attention does: torch's own kernel for CPUs takes 1.4 to 2.3 times as long in
    bfloat16."""
    b, heads, length, d = q.shape
    # the query heads that share a KV head are rows of one product
    pairs, shared = b * k.shape[1], heads // k.shape[1]
    q, k, v = (
        (q * (d**-0.5 if scale is None else scale)).reshape(pairs, shared, length, d),
        k.reshape(pairs, length, d).transpose(1, 2),
        v.reshape(pairs, length, d),
    )
    out, at = torch.empty_like(q), torch.arange(length, device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)  # of capped scores
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        size, keys = stop - start, stop - first
        lead = keys - size if window is None else 0  # keys that all of the block's queries see
        hidden = ~_visible(at[start:stop], at[first + lead : stop], window)
        together = max(1, SCORES_AT_ONCE // (shared * size * keys))
        for pair in range(0, pairs, together):
            part = slice(pair, pair + together)
            scores = q[part, :, start:stop].reshape(-1, shared * size, d) @ k[part, :, first:stop]
            if cap is not None:
                scores = (scores.to(wide) / cap).tanh_() * cap
            scores.view(-1, shared, size, keys)[..., lead:].masked_fill_(hidden, -math.inf)
            out[part, :, start:stop] = (scores.softmax(-1).to(v.dtype) @ v[part, first:stop]).view(
                -1, shared, size, d
            )
    return out.view(b, heads, length, d)
