"""Plain-torch oracles: what each kernel must compute, written to be read and not to be fast.

They run on any device, accumulate in at least float32 and round once, at the end: a kernel is
compared with them under the tolerance of its own output's dtype. With float64 inputs they compute
in float64, which is how they are tested themselves.

Shapes: `T` tokens, `N` output channels, `K` input channels, `G` groups a row, `H` heads, `D`
head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantflow_kernels.layout import PER_CHANNEL


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """The weight `[N, K]`, `(code - zero) * scale`, in float32 (float64 where the scales are).

    codes: uint8 `[N, K]`. scales: floating `[N, G]`. zeros: integers `[N, G]`. Input channel `k`
    belongs to group `k // group_size`; `PER_CHANNEL` makes one group of a row. Raises ValueError
    where the groups do not fill the row.
    """
    n, k = codes.shape
    group = k if group_size == PER_CHANNEL else group_size
    if k % group or scales.shape != (n, k // group) or zeros.shape != scales.shape:
        shapes = f"scales {list(scales.shape)} and zeros {list(zeros.shape)}"
        raise ValueError(f"codes [{n}, {k}] in groups of {group} do not go with {shapes}")
    wide = _wide(scales.dtype)
    scales, zeros = (t.to(wide).repeat_interleave(group, dim=1) for t in (scales, zeros))
    return (codes.to(wide) - zeros) * scales


def w4a16_matmul(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """`x Wᵀ + bias` `[..., N]` in the dtype of `x`, for `x` `[..., K]` and a weight as in
    `dequantize`; bias `[N]`.

    The weight is never rounded to the dtype of `x`, and sums are accumulated in float32 (float64
    for float64 `x`).
    """
    wide = _wide(x.dtype)
    weight = dequantize(
        codes, scales.to(torch.promote_types(scales.dtype, wide)), zeros, group_size
    ).to(wide)
    y = x.to(wide) @ weight.T
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)


def _per_head(parameter: Tensor) -> Tensor:
    """A KV parameter, shaped to go with `[T, H, D]`: `[]`, `[H]` and `[H, D]` are static, `[T, H,
    1]` is dynamic."""
    return parameter[:, None] if parameter.ndim == 1 else parameter


def quantize_kv(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, bits: int = 8
) -> Tensor:
    """int8 codes `[T, H, D]` of K or V: `clamp(round((x - zero_point) / scale))`, halves rounded to
    even.

    scale, zero_point: float32 `[]` (one a layer), `[H]` or `[H, D]`; no zero point means 0. The
    clamp is to `-2^(bits-1) .. 2^(bits-1) - 1`: at the very maximum of an asymmetric range, 127.5
    rounds to 128.
    """
    wide = _wide(x.dtype)
    value = x.to(wide)
    if zero_point is not None:
        value = value - _per_head(zero_point).to(wide)
    return (
        (value / _per_head(scale).to(wide))
        .round()
        .clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        .to(torch.int8)
    )


def dequantize_kv(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`code * scale + zero_point` `[T, H, D]` in `dtype`; parameters as in `quantize_kv`, or the
    scale of `quantize_kv_dynamic`."""
    wide = _wide(dtype)
    value = codes.to(wide) * _per_head(scale).to(wide)
    if zero_point is not None:
        value = value + _per_head(zero_point).to(wide)
    return value.to(dtype)


def quantize_kv_dynamic(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """int8 codes `[T, H, D]` and their scale `[T, H, 1]`, float32 (float64 for float64 `x`): each
    token and head by its own absmax.

    Symmetric: `scale = absmax / (2^(bits-1) - 1)`, no zero point. A head that is all zero gets
    scale 1.
    """
    largest = 2 ** (bits - 1) - 1
    absmax = x.to(_wide(x.dtype)).abs().amax(-1, keepdim=True)
    # by a tensor: a GPU multiplies by the reciprocal of a number
    scale = absmax / torch.full_like(absmax, largest)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x.to(scale.dtype) / scale).round().clamp(-largest, largest).to(torch.int8), scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension, in the dtype of `x`; weight
    `[last]`."""
    value = x.to(_wide(x.dtype))
    return (
        value * (value.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(value.dtype)
    ).to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`gate * sigmoid(gate) * up`, elementwise, in the dtype of `gate`."""
    value = gate.to(_wide(gate.dtype))
    return (value * torch.sigmoid(value) * up.to(value.dtype)).to(gate.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `[T, H, D]` rotated by position, in its own dtype; cos and sin `[T, D / 2]`, those of
    each token's position.

    Halves are paired: `(x[i], x[i + D/2])` turns by the angle of frequency `i`, as Hugging Face
    checkpoints have it.
    """
    value = x.to(_wide(x.dtype))
    first, second = value.chunk(2, dim=-1)
    c, s = cos[:, None].to(value.dtype), sin[:, None].to(value.dtype)
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    sm_scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> Tensor:
    """softmax(`sm_scale` q kᵀ) v `[T, H, D]`, in the dtype of `q`, for the queries of one sequence.

    q: `[T, H, D]`; k, v: `[C, KV heads, D]`, the keys at positions `0..C-1`. Query t sees keys up
    to and with `positions[t]`, and no more than `window` of them (0: all). cap: scores become cap ·
    tanh(score / cap) (0: they stay). Query heads that share a
    KV head are neighbours.
    """
    wide, shared = _wide(q.dtype), q.shape[1] // k.shape[1]
    k, v = (t.to(wide).repeat_interleave(shared, dim=1) for t in (k, v))
    scores = torch.einsum("thd,chd->htc", q.to(wide), k) * sm_scale
    if cap:
        scores = cap * (scores / cap).tanh()
    behind = positions[:, None] - torch.arange(k.shape[0], device=q.device)
    visible = (behind >= 0) & (behind < window) if window else behind >= 0
    return torch.einsum("htc,chd->thd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v).to(
        q.dtype
    )


def pages(cache: Tensor, block_table: Tensor, context: int) -> Tensor:
    """The first `context` entries `[C, KV heads, …]` of a sequence, out of cache blocks `[blocks,
    KV heads, B, …]`; block_table: its blocks in order."""
    at = torch.arange(context, device=cache.device)
    size = cache.shape[2]
    return cache[block_table.long()[at // size], :, at % size]
