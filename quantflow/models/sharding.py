"""Tensor parallelism (Shoeybi et al. 2019): one rank's part of each tensor.

Which dimension a linear is cut along, its segment says: outputs, with bias, scales and zeros; or inputs, its bias kept whole on
every rank (an engine adds it once). Embeddings, norms, routers and the head are whole on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from quantflow.quant.grid import AnyTensor


def shard_quantized(tensor: AnyTensor, dimension: int, rank: int, tp: int) -> AnyTensor:
    """Rank `rank`'s part; `dimension` 0 cuts the outputs, 1 the inputs (whole groups: the plan has checked). Raises ValueError for scales
    that are quantised themselves, whose blocks know nothing of rows."""
    from quantflow.quant.grid import MinimumTensor, Nf4Tensor, QuantizedTensor

    def part(whole: Tensor) -> Tensor:
        # One group a row is every rank's, if the inputs are cut.
        return whole if dimension == 1 and whole.shape[1] == 1 else whole.chunk(tp, dimension)[rank].contiguous()

    codes, scales = tensor.codes.chunk(tp, dimension)[rank].contiguous(), part(tensor.scales)
    if isinstance(tensor, QuantizedTensor):
        return QuantizedTensor(tensor.scheme, codes, scales, part(tensor.zeros), tensor.group_index)
    if isinstance(tensor, MinimumTensor):
        return MinimumTensor(tensor.scheme, codes, scales, part(tensor.minimums))
    if tensor.nested is not None:
        raise ValueError(f"{tensor.scheme} cannot be cut")
    return Nf4Tensor(tensor.scheme, codes, scales)


def shard_plain(name: str, tensor: Tensor, dimension: int | None, rank: int, tp: int) -> Tensor:
    """Rank `rank`'s part of an unquantised weight or bias; None leaves it whole."""
    if dimension is None or (dimension == 1 and name.endswith(".bias")):
        return tensor
    return tensor.chunk(tp, dimension)[rank].contiguous()


def shard_shape(name: str, shape: tuple[int, ...], dimension: int | None, tp: int) -> tuple[int, ...]:
    """The shape of what `shard_plain` gives."""
    if dimension is None or (dimension == 1 and name.endswith(".bias")):
        return shape
    return tuple(size // tp if axis == dimension else size for axis, size in enumerate(shape))
