"""The steps of `cpu_solver.c`: GPTQ's recursion, its refinement and a range search's losses, for
float32 weights on a CPU.

Without a C compiler `available` is false, and the same is done by torch operations, a column at a
time.
Shapes: N output channels, K input channels, G groups; transposed matrices are `[K, N]`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from quantflow_kernels import cpu_library

SOURCE = Path(__file__).with_suffix(".c")
WIDEST_GROUP = 512  # as in the source, and numbers a vector
LANES = 16

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "gptq_columns": [_P, _P, _P, _L, _P, _L, _L, _P, _P, _P, _P, _I, _I],
    "refine_columns": [_P, _P, _P, _P, _L, _P, _L, _P, _P, _P, _P, _I, _I],
    "block_losses": [_P, _P, _P, _P, _P, _L, _L, _L, _L, _F],
}


@cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled steps and "", or None and the reason."""
    return cpu_library.load(SOURCE, _ARGUMENTS)


def available(weight: Tensor) -> bool:
    """Whether the steps take this weight, and are there."""
    return (
        weight.device.type == "cpu" and weight.dtype == torch.float32 and library()[0] is not None
    )


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
    """Rounds columns `[start, stop)`: each takes the corrections of those between `start` and
    itself.

    w, codes, errors: `[K, N]`, w with the corrections of all columns before `start`; ratios: `[K,
    K]`, what a column (2nd) takes of another's error (1st); scales, lowest, highest: `[G, N]`;
    group_at: int64 `[K]`, of numbers below G, which is not checked.
    """
    k, n = w.shape
    groups = len(scales)
    _check({(k, n): (w, codes, errors), (groups, n): (scales, lowest, highest)})
    _check_columns(start, stop, k)
    if (
        ratios.shape != (k, k)
        or ratios.dtype != torch.float32
        or group_at.shape != (k,)
        or group_at.dtype != torch.int64
    ):
        raise ValueError(
            f"ratios {list(ratios.shape)}, group_at {group_at.dtype} {list(group_at.shape)}:"
            f" expected [{k}, {k}] and int64 [{k}]"
        )
    cpu_library.needed(library()).gptq_columns(
        w.data_ptr(),
        codes.data_ptr(),
        errors.data_ptr(),
        n,
        ratios.data_ptr(),
        *ratios.stride(),
        scales.data_ptr(),
        lowest.data_ptr(),
        highest.data_ptr(),
        group_at.contiguous().data_ptr(),
        start,
        stop,
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
    """Sets the codes of columns `[start, stop)`, all of one group, to the best while the others
    stand; changes: what that did to values.

    values, slope, codes, changes: `[K, N]`; hessian: `[K, K]`; scale, lowest, highest: `[N]`;
    curvature: `[K]`.
    """
    k, n = values.shape
    _check(
        {
            (k, n): (values, slope, codes, changes),
            (n,): (scale, lowest, highest),
            (k,): (curvature,),
            (k, k): (hessian,),
        }
    )
    _check_columns(start, stop, k)
    cpu_library.needed(library()).refine_columns(
        values.data_ptr(),
        slope.data_ptr(),
        codes.data_ptr(),
        changes.data_ptr(),
        n,
        hessian.data_ptr(),
        k,
        scale.data_ptr(),
        lowest.data_ptr(),
        highest.data_ptr(),
        curvature.data_ptr(),
        start,
        stop,
    )


def block_losses(
    weight: Tensor, scales: Tensor, zeros: Tensor, levels: int, hessian: Tensor
) -> Tensor:
    """`e Hg eᵀ` `[N, G]` of the errors e that rounding `weight` `[N, G, g]` to its grids `[N, G]`
    of codes 0 to `levels` makes.

    hessian: `[G, g, g]`, symmetric; g at most `WIDEST_GROUP`.
    """
    n, groups, size = weight.shape
    if size > WIDEST_GROUP:
        raise ValueError(f"a group of {size} channels: expected at most {WIDEST_GROUP}")
    _check(
        {
            (n, groups, size): (weight,),
            (n, groups): (scales, zeros),
            (groups, size, size): (hessian,),
        }
    )
    padded = -(-size // LANES) * LANES
    out, blocks = (
        torch.empty(groups, n),
        hessian if padded == size else F.pad(hessian, (0, padded - size)),
    )
    cpu_library.needed(library()).block_losses(
        weight.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        blocks.data_ptr(),
        out.data_ptr(),
        n,
        groups,
        size,
        padded,
        levels,
    )
    return out.T


def _check(expected: Mapping[tuple[int, ...], Iterable[Tensor]]) -> None:
    """Raises ValueError for a tensor that is not as C reads or writes it."""
    for shape, tensors in expected.items():
        for tensor in tensors:
            if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError(
                    f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}: expected"
                    f" contiguous float32 {shape}"
                )


def _check_columns(start: int, stop: int, columns: int) -> None:
    if not 0 <= start <= stop <= columns:
        raise ValueError(f"columns {start} to {stop}: expected some of 0 to {columns}")
