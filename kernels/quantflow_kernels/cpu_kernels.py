"""The kernels of `cpu_kernels.c`, compiled for this machine when they are first needed: attention,
KV store, RMSNorm, SiLU·up on a CPU.

They need a C compiler (see `cpu_library`), once: the library is kept in the user's cache folder,
under a name that changes with the source, the compiler and the processor. Without one, `library`
says why, and plain torch operations do the work, some ten times as slowly. Whether a batch has one
row or many, a row's bits are the same.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from quantflow_kernels import cpu_library
from quantflow_kernels.cpu_library import at
from quantflow_kernels.paging import STATIC_CHANNEL, Batch, KVCache

SOURCE = Path(__file__).with_suffix(".c")
WIDEST = 256  # head_dim
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "paged_attention": [
        _P,
        _P,
        _I,
        _L,
        _P,
        _P,
        _P,
        _P,
        _P,
        _I,
        _I,
        _I,
        _P,
        _I,
        _P,
        _P,
        _I,
        _I,
        _I,
        _I,
        _F,
        _I,
        _F,
        _P,
    ],
    "kv_store": [
        _P,
        _P,
        _P,
        _I,
        _L,
        _L,
        _L,
        _P,
        _P,
        _P,
        _P,
        _P,
        _P,
        _P,
        _P,
        _P,
        _I,
        _I,
        _I,
        _I,
        _I,
        _I,
        _I,
    ],
    "rms_norm": [_P, _P, _P, _P, _I, _L, _I, _L, _F],
    "silu_mul": [_P, _P, _L, _P, _I, _L, _I],
    "has_products": [],
    "int4_matmul": [_P, _L, _I, _P, _P, _I, _P, _P, _I, _I, _I, _P],
    "dense_matmul": [_P, _L, _I, _P, _P, _I, _I, _P],
}


@cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernels and "", or None and the reason. The first call may compile, for about
    three seconds."""
    return cpu_library.load(SOURCE, _ARGUMENTS)


def supports(dtype: torch.dtype, head_dim: int = 2) -> bool:
    """Whether the kernels are there, and take activations of that dtype and heads of that width."""
    return (
        dtype in (torch.float32, torch.bfloat16) and head_dim <= WIDEST and library()[0] is not None
    )


def loaded() -> ctypes.CDLL:
    """The kernels. Raises RuntimeError where there are none."""
    return cpu_library.needed(library())


def paged_attention(
    q: Tensor, cache: KVCache, batch: Batch, sm_scale: float, window: int = 0, cap: float = 0.0
) -> Tensor:
    """What `attention.paged_attention` computes, for `q` `[T, H, D]` in float32 or bfloat16 on a
    CPU. Raises MemoryError."""
    tokens, heads, d = q.shape
    if q.stride(2) != 1 or q.stride(1) != d:
        q = q.contiguous()
    out = torch.empty(tokens, heads, d, dtype=q.dtype)
    table = batch.block_table
    failed = loaded().paged_attention(
        q.data_ptr(),
        out.data_ptr(),
        KINDS[q.dtype],
        q.stride(0),
        cache.k.data_ptr(),
        cache.v.data_ptr(),
        at(cache.k_scale),
        at(cache.v_scale),
        at(cache.v_zero),
        KINDS[cache.k.dtype],
        cache.mode,
        cache.k.shape[2],
        table.data_ptr(),
        table.shape[1],
        batch.query_start.data_ptr(),
        batch.contexts.data_ptr(),
        len(batch.contexts),
        heads,
        cache.k.shape[1],
        d,
        sm_scale,
        window,
        cap,
        at(cache.k_zero),
    )
    if failed:
        raise MemoryError("no memory for the scratch rows of attention")
    return out


def kv_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    slots: Tensor,
    cache: KVCache,
) -> None:
    """What `kv_store.kv_store` does, on a CPU; slots int64. Raises ValueError for an odd head_dim,
    or heads that are not contiguous."""
    tokens, heads, d = q.shape
    # The C code trusts shapes, strides and dtypes.
    if (
        d % 2
        or any(t.stride(2) != 1 or t.stride(1) != d for t in (q, k, v))
        or slots.dtype != torch.int64
    ):
        raise ValueError(
            f"q {list(q.shape)} with strides {q.stride()}, slots {slots.dtype}: expected even,"
            " contiguous heads and int64"
        )
    if len(slots) != tokens or any(
        t is not None and (t.shape != (tokens, d // 2) or t.dtype != torch.float32)
        for t in (cos, sin)
    ):
        raise ValueError(
            f"{len(slots)} slots, or cos and sin of another shape: expected {tokens}, and float32"
            f" [{tokens}, {d // 2}]"
        )
    if (
        cache.mode <= STATIC_CHANNEL
        and cache.k_scale is not None
        and cache.k_zero is not None
        and cache.k_zero.shape != cache.k_scale.shape
    ):
        raise ValueError(
            f"k_zero {list(cache.k_zero.shape)} and k_scale {list(cache.k_scale.shape)} differ in"
            " shape"
        )
    loaded().kv_store(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        KINDS[q.dtype],
        q.stride(0),
        k.stride(0),
        v.stride(0),
        at(cos),
        at(sin),
        slots.data_ptr(),
        cache.k.data_ptr(),
        cache.v.data_ptr(),
        at(cache.k_scale),
        at(cache.v_scale),
        at(cache.k_zero),
        at(cache.v_zero),
        KINDS[cache.k.dtype],
        cache.mode,
        cache.k.shape[2],
        tokens,
        heads,
        k.shape[1],
        d,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """The norm of `x` `[T, K]`, or of `x + residual`, which then replaces `residual`, in place.
    weight: float32 `[K]`."""
    tokens, k = x.shape
    if (
        x.stride(1) != 1
        or weight.dtype != torch.float32
        or weight.shape != (k,)
        or not weight.is_contiguous()
    ):
        raise ValueError(
            f"x with strides {x.stride()}, weight {weight.dtype} {list(weight.shape)}: expected"
            f" contiguous rows, float32 [{k}]"
        )
    if residual is not None and (
        residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous()
    ):
        raise ValueError(
            f"residual {residual.dtype} {list(residual.shape)}: expected {x.dtype} {list(x.shape)},"
            " contiguous"
        )
    out = torch.empty(tokens, k, dtype=x.dtype)
    loaded().rms_norm(
        x.data_ptr(),
        at(residual),
        weight.data_ptr(),
        out.data_ptr(),
        KINDS[x.dtype],
        tokens,
        k,
        x.stride(0),
        eps,
    )
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) · up` `[T, K]`, of rows that may be parts of longer ones."""
    if (
        gate.shape != up.shape
        or gate.dtype != up.dtype
        or gate.stride() != up.stride()
        or gate.stride(1) != 1
    ):
        raise ValueError(
            f"gate {list(gate.shape)} and up {list(up.shape)} with strides {gate.stride()},"
            f" {up.stride()}: expected alike rows"
        )
    tokens, k = gate.shape
    out = torch.empty(tokens, k, dtype=gate.dtype)
    loaded().silu_mul(
        gate.data_ptr(), up.data_ptr(), gate.stride(0), out.data_ptr(), KINDS[gate.dtype], tokens, k
    )
    return out
