"""What encoders and decoders do with tensors: take them by name, and hold them
to what is expected. Shapes: `N` output
channels, `K` input channels, `G` groups a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantflow.errors import FormatError, Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantflow.quant.numbers import QuantizedTensor
    from quantflow.quant.numbers.integer import IntegerTensor


def take(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | None = None, dims: int = 2
) -> Tensor:
    """The tensor called `name`. Raises FormatError if it is absent, or has another dtype (None: any
    floating one) or rank."""
    if name not in tensors:
        raise FormatError(Problem(name, "missing from the checkpoint"))
    tensor = tensors[name]
    if tensor.dim() != dims or (
        tensor.dtype != dtype if dtype is not None else not tensor.is_floating_point()
    ):
        expected = f"{dims} dimensions of {dtype or 'a floating dtype'}"
        raise FormatError(Problem(name, f"{tensor.dtype} {list(tensor.shape)}", expected))
    return tensor


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises FormatError unless `tensor` has `shape`."""
    if tuple(tensor.shape) != shape:
        raise FormatError(Problem(name, f"shape {list(tensor.shape)}", f"{list(shape)}"))


def integer_grid(module: str, tensor: QuantizedTensor) -> IntegerTensor:
    """The tensor itself. Raises FormatError where its numbers are of another kind."""
    from quantflow.quant.numbers.integer import IntegerTensor

    if not isinstance(tensor, IntegerTensor):
        raise FormatError(Problem(module, f"{tensor.scheme}", f"a grid {IntegerTensor.grid}"))
    return tensor


def exact_scales(name: str, scales: Tensor, dtype: torch.dtype, part: str = "scales") -> Tensor:
    """`scales` in `dtype`. Raises FormatError, with an example, if any value changes."""
    import torch

    stored = scales.to(dtype)
    # float64 holds all of these dtypes; a value that overflowed has become infinite and so differs.
    if stored.dtype != scales.dtype and not torch.equal(stored.double(), scales.double()):
        changed = stored.double() != scales.double()
        example = float(scales[changed][0])
        raise FormatError(
            Problem(
                name,
                f"{int(changed.sum())} of {scales.numel()} {part} are no exact"
                f" {str(dtype).removeprefix('torch.')} (one is {example:.9g})",
                f"{part} rounded to {str(dtype).removeprefix('torch.')} before the weights are"
                " quantised",
                "A weight is not quantised again unless asked for: export --requantize, or"
                " requantize: true in pack",
            )
        )
    return stored


def group_index(name: str, index: Tensor, groups: int) -> Tensor | None:
    """A stored group index, None where it says nothing. Raises FormatError for groups that are not
    full."""
    import torch

    from quantflow.quant.numbers.integer import groups_are_full

    k = index.numel()
    if torch.equal(index, plain_index(k, k // groups).to(index.device)):
        return None
    if not groups_are_full(index, groups):
        raise FormatError(
            Problem(name, "groups of unequal size", f"{groups} groups of {k // groups} channels")
        )
    return index


def plain_index(k: int, group: int) -> Tensor:
    """int32 `[K]`: the group of each channel where nothing was reordered."""
    import torch

    return torch.arange(k, dtype=torch.int32) // group
