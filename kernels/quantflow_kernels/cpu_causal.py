"""Rotary embedding and causal attention over whole windows in bfloat16, by `cpu_causal.c`: what
calibration spends its time on beside matrix products.

It needs a C compiler and a processor with AVX-512 BF16; elsewhere `supports` is false and torch
operations do the same. Shapes: W windows of L tokens, H query heads, G KV heads, D head_dim.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from quantflow_kernels import cpu_library

SOURCE = Path(__file__).with_suffix(".c")
WIDEST = 256  # head_dim

_P, _L, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "has_causal": [],
    "rotate": [_P, _P, _L, _L, _L, _L, _L, _L, _L, _P, _P],
    "causal_attention": [_P, _P, _P, _P, _L, _L, _L, _L, _L, _P, _P, _P, _F, _L],
}


@cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled functions and "", or None and the reason."""
    return cpu_library.load(SOURCE, _ARGUMENTS)


@cache
def _there() -> bool:
    functions, _ = library()
    return functions is not None and bool(functions.has_causal())


def supports(x: Tensor) -> bool:
    """Whether heads `[..., D]` like these are taken."""
    d = x.shape[-1]
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and not (x.requires_grad and torch.is_grad_enabled())
        and d % 16 == 0
        and d <= WIDEST
        and x.stride(-1) == 1
        and _there()
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `[W, H, L, D]` turned by its positions' angles, rounded once; laid out as `[W, L, H, D]`.
    cos, sin: float32 `[L, D/2]`."""
    windows, heads, length, d = x.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    if not supports(x):
        raise ValueError(
            f"{x.dtype} {list(x.shape)}: expected bfloat16 heads of a multiple of 16 channels, side"
            " by side"
        )
    if any(t.shape != (length, d // 2) or t.dtype != torch.float32 for t in (cos, sin)):
        raise ValueError(
            f"cos {cos.dtype} {list(cos.shape)}, sin {sin.dtype} {list(sin.shape)}: expected"
            f" float32 [{length}, {d // 2}]"
        )
    out = torch.empty(windows, length, heads, d, dtype=x.dtype)
    cpu_library.needed(library()).rotate(
        x.data_ptr(),
        out.data_ptr(),
        windows,
        length,
        heads,
        d,
        x.stride(0),
        x.stride(2),
        x.stride(1),
        cos.data_ptr(),
        sin.data_ptr(),
    )
    return out.transpose(1, 2)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int = 0, scale: float | None = None
) -> Tensor:
    """softmax(`scale` q kᵀ) v (None: 1 / √D), each query seeing itself and what precedes it, at
    most `window` keys (0: all).

    q: `[W, H, L, D]`; k, v: `[W, G, L, D]`. The result is laid out as `[W, L, H, D]`. Sums are
    taken in float32; the weights of the values are rounded to bfloat16. Raises MemoryError.
    """
    windows, heads, length, d = q.shape
    kv_heads = k.shape[1]
    if window < 0:
        raise ValueError(f"a window of {window} keys: expected at least 1, or 0 for all")
    if (
        k.shape != v.shape
        or k.shape != (windows, kv_heads, length, d)
        or heads % kv_heads
        or not all(map(supports, (q, k, v)))
    ):
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: expected bfloat16 [W, H, L,"
            " D], [W, G, L, D] twice"
        )
    out = torch.empty(windows, length, heads, d, dtype=q.dtype)
    strides = [(ctypes.c_int64 * 3)(t.stride(0), t.stride(2), t.stride(1)) for t in (q, k, v)]
    failed = cpu_library.needed(library()).causal_attention(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        windows,
        length,
        heads,
        kv_heads,
        d,
        *strides,
        d**-0.5 if scale is None else scale,
        window,
    )
    if failed:
        raise MemoryError("no memory for the packed keys and values of attention")
    return out.transpose(1, 2)
