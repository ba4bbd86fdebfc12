"""A tensor in another dtype: exactly, or rounded and measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from quantflow.errors import FormatError, Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# compared at a time: an embedding is the largest tensor of a model, and float64 makes it four times
# as large
_ELEMENTS = 2**22


def converted(
    name: str, tensor: Tensor, dtype: torch.dtype, *, rounded: bool
) -> tuple[Tensor, float]:
    """`tensor` in `dtype`, and the relative error of that in the Frobenius norm, 0 where every
    number stayed what it was.

    Raises FormatError, naming the tensor, where a number changes and `rounded` is not set, or one
    leaves the dtype's range.
    """
    import torch

    if tensor.dtype == dtype:
        return tensor, 0.0
    kind = str(dtype).removeprefix("torch.")
    result, count, error, size = torch.empty_like(tensor, dtype=dtype), 0, 0.0, 0.0
    rows = max(1, _ELEMENTS * len(tensor) // max(1, tensor.numel()))
    for source, target in zip(tensor.split(rows), result.split(rows), strict=True):
        target.copy_(source)
        if bool((target.isfinite() != source.isfinite()).any()) or bool(source.isnan().any()):
            raise FormatError(
                Problem(name, f"values beyond the range of {kind}", "numbers that it holds")
            )
        off = target.double() - source.double()
        count += int(off.count_nonzero())
        error += float(off.square().sum())
        size += float(source.double().square().sum())
    if count and not rounded:
        hint = "Ask for them to be rounded: export --requantize, or requantize: true in pack"
        raise FormatError(
            Problem(
                name,
                f"{count} of {tensor.numel()} values are not exact in {kind}",
                "exact ones",
                hint,
            )
        )
    return result, math.sqrt(error / size) if count else 0.0
