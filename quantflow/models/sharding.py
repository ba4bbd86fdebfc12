"""Tensor parallelism (Shoeybi et al. 2019): one rank's part of each tensor. A quantised one cuts
itself (`QuantizedTensor.cut`).

Which dimension a linear is cut along, its segment says: outputs, with bias, scales and zeros; or
inputs, its bias kept whole on every rank (an engine adds it once). Embeddings, norms, routers and
the head are whole on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def shard_plain(name: str, tensor: Tensor, dimension: int | None, rank: int, tp: int) -> Tensor:
    """Rank `rank`'s part of an unquantised weight or bias; None leaves it whole."""
    if dimension is None or (dimension == 1 and name.endswith(".bias")):
        return tensor
    return tensor.chunk(tp, dimension)[rank].contiguous()


def shard_shape(
    name: str, shape: tuple[int, ...], dimension: int | None, tp: int
) -> tuple[int, ...]:
    """The shape of what `shard_plain` gives."""
    if dimension is None or (dimension == 1 and name.endswith(".bias")):
        return shape
    return tuple(size // tp if axis == dimension else size for axis, size in enumerate(shape))
