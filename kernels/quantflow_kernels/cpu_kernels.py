"""The kernels of `cpu_kernels.c`, compiled for this machine when they are first needed: attention, KV store, RMSNorm, SiLU·up on a CPU.

They need a C compiler (`CC`, cc, gcc or clang), once: the library is kept in the user's cache folder, under a name that changes with
the source, the compiler and the processor. Without one, `library` says why, and plain torch operations do the work, some ten times as
slowly. Whether a batch has one row or many, a row's bits are the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from quantflow_kernels.paging import STATIC_CHANNEL, Batch, KVCache

SOURCE = Path(__file__).with_suffix(".c")
# Without -fopenmp at the link: OpenMP's runtime is the one that torch has loaded, or two pools of threads would wait for each other.
COMPILE = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-c")
WIDEST = 256  # head_dim
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "paged_attention": [_P, _P, _I, _L, _P, _P, _P, _P, _P, _I, _I, _I, _P, _I, _P, _P, _I, _I, _I, _I, _F, _I],
    "kv_store": [_P, _P, _P, _I, _L, _L, _L, _P, _P, _P, _P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _I],
    "rms_norm": [_P, _P, _P, _P, _I, _L, _I, _L, _F],
    "silu_mul": [_P, _P, _I, _L, _I],
    "has_products": [],
    "int4_matmul": [_P, _L, _I, _P, _P, _I, _P, _P, _I, _I, _I, _P],
    "dense_matmul": [_P, _L, _I, _P, _P, _I, _I, _P],
}


@cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernels and "", or None and the reason. The first call may compile, for about three seconds."""
    try:
        found = ctypes.CDLL(str(_built()))
        for name, arguments in _ARGUMENTS.items():
            getattr(found, name).argtypes = arguments
    except (OSError, AttributeError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, subprocess.CalledProcessError):
            reason = f"{error.cmd[0]} failed: {(error.stderr or '').strip()[:300]}"
        logging.getLogger(__name__).warning("the CPU's kernels could not be compiled (%s); plain torch operations are used", reason)
        return None, reason
    return found, ""


def supports(dtype: torch.dtype, head_dim: int = 2) -> bool:
    """Whether the kernels are there, and take activations of that dtype and heads of that width."""
    return dtype in (torch.float32, torch.bfloat16) and head_dim <= WIDEST and library()[0] is not None


def _built() -> Path:
    """The library's file, compiled where it is not there yet. Raises OSError and SubprocessError."""
    asked = shlex.split(os.environ.get("CC", ""))
    found = [[path, *asked[1:]] for path in map(shutil.which, asked[:1] or ["cc", "gcc", "clang"]) if path]
    if not found:
        raise OSError(f"no C compiler ({' '.join(asked) or 'cc, gcc, clang'})")
    compiler = found[0]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    cpu = Path("/proc/cpuinfo")
    flags = next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.is_file() else ""
    parts = (SOURCE.read_text(), " ".join(COMPILE), version, platform.machine(), flags)
    name = f"cpu-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantflow"  # RuntimeError: no home
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner = folder.stat()
        if owner.st_uid != os.getuid() or owner.st_mode & 0o022 or not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not this user's own")
    except (OSError, RuntimeError):  # it is compiled for this process alone
        folder = Path(tempfile.mkdtemp(prefix="quantflow-"))
    target = folder / name
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            object_file, shared = Path(scratch) / "kernels.o", Path(scratch) / name
            steps = ((*COMPILE, str(SOURCE), "-o", str(object_file)), ("-shared", str(object_file), "-o", str(shared)))
            for step in steps:
                subprocess.run([*compiler, *step], capture_output=True, text=True, check=True, timeout=300)
            os.replace(shared, target)  # whole, or not there
    return target


def loaded() -> ctypes.CDLL:
    """The kernels. Raises RuntimeError where there are none."""
    found, reason = library()
    if found is None:
        raise RuntimeError(reason)
    return found


def at(tensor: Tensor | None) -> int | None:
    """A tensor's address; None for NULL."""
    return None if tensor is None else tensor.data_ptr()


def paged_attention(q: Tensor, cache: KVCache, batch: Batch, sm_scale: float, *, window: int = 0) -> Tensor:
    """What `attention.paged_attention` computes, for `q` `[T, H, D]` in float32 or bfloat16 on a CPU. Raises MemoryError."""
    tokens, heads, d = q.shape
    if q.stride(2) != 1 or q.stride(1) != d:
        q = q.contiguous()
    out = torch.empty(tokens, heads, d, dtype=q.dtype)
    table = batch.block_table
    failed = loaded().paged_attention(
        q.data_ptr(), out.data_ptr(), KINDS[q.dtype], q.stride(0), cache.k.data_ptr(), cache.v.data_ptr(), at(cache.k_scale),
        at(cache.v_scale), at(cache.v_zero), KINDS[cache.k.dtype], cache.mode, cache.k.shape[2], table.data_ptr(), table.shape[1],
        batch.query_start.data_ptr(), batch.contexts.data_ptr(), len(batch.contexts), heads, cache.k.shape[1], d, sm_scale, window,
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the scratch rows of attention")
    return out


def kv_store(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, slots: Tensor, cache: KVCache) -> None:
    """What `kv_store.kv_store` does, on a CPU; slots int64. Raises ValueError for an odd head_dim, or heads that are not contiguous."""
    tokens, heads, d = q.shape
    if d % 2 or any(t.stride(2) != 1 or t.stride(1) != d for t in (q, k, v)) or slots.dtype != torch.int64:
        raise ValueError(f"q {list(q.shape)} with strides {q.stride()}, slots {slots.dtype}: expected even, contiguous heads and int64")
    if len(slots) != tokens or any(t is not None and (t.shape != (tokens, d // 2) or t.dtype != torch.float32) for t in (cos, sin)):
        raise ValueError(f"{len(slots)} slots, or cos and sin of another shape: expected {tokens}, and float32 [{tokens}, {d // 2}]")
    if (
        cache.mode <= STATIC_CHANNEL
        and cache.k_scale is not None
        and cache.k_zero is not None
        and cache.k_zero.shape != cache.k_scale.shape
    ):
        raise ValueError(f"k_zero {list(cache.k_zero.shape)} and k_scale {list(cache.k_scale.shape)} differ in shape")
    loaded().kv_store(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), KINDS[q.dtype], q.stride(0), k.stride(0), v.stride(0), at(cos), at(sin),
        slots.data_ptr(), cache.k.data_ptr(), cache.v.data_ptr(), at(cache.k_scale), at(cache.v_scale), at(cache.k_zero),
        at(cache.v_zero), KINDS[cache.k.dtype], cache.mode, cache.k.shape[2], tokens, heads, k.shape[1], d,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """The norm of `x` `[T, K]`, or of `x + residual`, which then replaces `residual`, in place. weight: float32 `[K]`."""
    tokens, k = x.shape
    if x.stride(1) != 1 or weight.dtype != torch.float32 or (residual is not None and not residual.is_contiguous()):
        raise ValueError(f"x with strides {x.stride()}, weight {weight.dtype}: expected contiguous rows and float32")
    out = torch.empty(tokens, k, dtype=x.dtype)
    loaded().rms_norm(x.data_ptr(), at(residual), weight.data_ptr(), out.data_ptr(), KINDS[x.dtype], tokens, k, x.stride(0), eps)
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) · up` `[T, K]` from `[T, 2K]`: the gate, then up."""
    if not gate_up.is_contiguous():
        raise ValueError(f"gate and up with strides {gate_up.stride()}: expected contiguous rows")
    tokens, k = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, k, dtype=gate_up.dtype)
    loaded().silu_mul(gate_up.data_ptr(), out.data_ptr(), KINDS[gate_up.dtype], tokens, k)
    return out
