"""The orders in which a TurboMind workspace (LMDeploy v0.1) stores weights: pure permutations, each
with its exact inverse.

Shapes: `K` input channels, `M` output channels, `G` groups along K; *words* are int32 that hold
eight 4-bit codes, `[K, M/8]` in the nibble order of AWQ. The views of words as bytes assume a
little-endian machine, as safetensors does. Dimensions that do not fit are for the caller to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# A zero point z is stored as the fp16 number 64 + z: TurboMind's kernel unpacks a code q to the
# number 64 + q, and computes ((64 + q) - zero) * scale. Older QuantFlows wrote the plain z; the two
# ranges have no number in common, so that a reader tells them.
ZERO_OFFSET = 64

_BLOCK_WORDS = 1 << 18


# Rotary order. Hugging Face pairs channel j of a head with j + head_dim/2; TurboMind wants the two
# side by side.


def to_interleaved(x: Tensor, head_dim: int) -> Tensor:
    """`[..., M]` with the channels of each head from half-split to interleaved rotary order."""
    return x.unflatten(-1, (-1, 2, head_dim // 2)).transpose(-1, -2).flatten(-3)


def from_interleaved(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim // 2, 2)).transpose(-1, -2).flatten(-3)


_ROTARY_ORDER = (0, 1, 3, 5, 2, 6, 4)


def _rotary_view(words: Tensor, head_dim: int) -> tuple[int, ...]:
    k, m = words.shape[0], words.shape[1] * 8
    return (k, m // head_dim, 2, head_dim // 16, 2, 2, 2)


def to_interleaved_words(words: Tensor, head_dim: int) -> Tensor:
    """The same of words `[K, M/8]`; 16 divides `head_dim`."""
    return _by_rows(
        lambda rows: _permute_nibbles(rows, _rotary_view(rows, head_dim), _ROTARY_ORDER).view(
            rows.shape
        ),
        words,
    )


def from_interleaved_words(words: Tensor, head_dim: int) -> Tensor:
    return _by_rows(
        lambda rows: _restore_nibbles(rows, _rotary_view(rows, head_dim), _ROTARY_ORDER).view(
            rows.shape
        ),
        words,
    )


# gate and up, channel by channel.


def fuse_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """`[G, 2M]` from two `[G, M]`: channel m of gate, then channel m of up."""
    import torch

    return torch.stack((gate, up), -1).flatten(-2)


def split_gate_up(fused: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = fused.unflatten(-1, (-1, 2)).unbind(-1)
    return gate, up


_FUSE_ORDER = (1, 2, 4, 0, 5, 3)


def fuse_gate_up_words(gate: Tensor, up: Tensor) -> Tensor:
    """The same of words: `[K, 2M/8]` from two `[K, M/8]`."""
    import torch

    def fuse(gate: Tensor, up: Tensor) -> Tensor:
        k, m8 = gate.shape
        return _permute_nibbles(torch.stack((gate, up)), (2, k, m8, 2, 2, 2), _FUSE_ORDER).view(
            k, 2 * m8
        )

    return _by_rows(fuse, gate, up)


def split_gate_up_words(fused: Tensor) -> tuple[Tensor, Tensor]:
    def split(rows: Tensor) -> Tensor:
        k, m8 = rows.shape[0], rows.shape[1] // 2
        return (
            _restore_nibbles(rows, (2, k, m8, 2, 2, 2), _FUSE_ORDER).view(2, k, m8).transpose(0, 1)
        )

    gate, up = _by_rows(split, fused).unbind(1)
    return gate.clone(), up.clone()  # each its own memory


# The 32 x 32 tiles of TurboMind's int4 kernel.

_TILE_ORDER = (0, 5, 9, 8, 3, 1, 6, 4, 2, 7)


def _tile_view(words: Tensor) -> tuple[int, ...]:
    k, m = words.shape[0], words.shape[1] * 8
    return (k // 32, 2, 2, 4, 2, m // 32, 2, 2, 2, 4)


def to_tiles(words: Tensor) -> Tensor:
    """Words `[K, M/8]` in the kernel's order: tile by tile, 128 words each, along M and then along
    K. 32 divides K and M."""
    return _by_rows(
        lambda rows: _permute_nibbles(rows, _tile_view(rows), _TILE_ORDER).view(rows.shape), words
    )


def from_tiles(words: Tensor) -> Tensor:
    return _by_rows(
        lambda rows: _restore_nibbles(rows, _tile_view(rows), _TILE_ORDER).view(rows.shape), words
    )


def cut_tiles(words: Tensor, tp: int) -> list[Tensor]:
    """Each rank's `[K/32, M/(32 tp), 128]` of tiles `[K, M/8]` that are cut along M."""
    return [
        rank.squeeze(-1)
        for rank in words.view(words.shape[0] // 32, tp, -1, 128).permute(0, 2, 3, 1).chunk(tp, -1)
    ]


def join_tiles(ranks: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.stack(list(ranks), 1).view(ranks[0].shape[0] * 32, -1)


# The grid.


def to_scales_zeros(qzeros: Tensor, scales: Tensor) -> Tensor:
    """int32 `[G, M]` from words of zero points `[G, M/8]` and fp16 scales `[G, M]`: zero as fp16 in
    the low half, scale in the high."""
    import torch

    from quantflow.quant.packing import unpack_awq

    zeros = (unpack_awq(qzeros).t() + ZERO_OFFSET).to(torch.float16)
    return torch.stack((zeros, scales), -1).view(torch.int32).squeeze(-1)


def from_scales_zeros(words: Tensor) -> tuple[Tensor, Tensor]:
    """qzeros words and scales. Takes plain zeros too, where all are; raises ValueError for a zero
    point that is none of 0..15."""
    import torch

    from quantflow.quant.packing import pack_awq

    zeros, scales = words.contiguous().view(torch.float16).unflatten(-1, (-1, 2)).unbind(-1)
    if zeros.numel() and not has_plain_zeros(zeros):
        zeros = zeros - ZERO_OFFSET
    codes = zeros.nan_to_num(nan=16.0).clamp(0, 16).to(torch.uint8)
    if not bool(((codes == zeros) & (codes <= 15)).all()):
        raise ValueError(
            f"zero points that are not all of {ZERO_OFFSET} to {ZERO_OFFSET + 15}, or all of 0"
            " to 15"
        )
    return pack_awq(codes.t()), scales.clone()


def has_plain_zeros(zeros: Tensor) -> bool:
    """Whether stored zero points begin as QuantFlow once wrote them, without the offset; of a
    mixture, neither reading is right."""
    return bool(zeros.reshape(-1)[0] < ZERO_OFFSET)


# Tensor parallelism.


def join_per_rank(parts: Sequence[Tensor], tp: int) -> Tensor:
    """`[..., M]` from parts `[..., m]`: rank 0's share of each part, then rank 1's, so that one cut
    gives every rank `q | k | v`."""
    import torch

    return torch.cat([part.chunk(tp, -1)[rank] for rank in range(tp) for part in parts], -1)


def split_per_rank(fused: Tensor, widths: Sequence[int], tp: int) -> list[Tensor]:
    import torch

    pieces = fused.split([width // tp for width in widths] * tp, -1)
    return [torch.cat(pieces[part :: len(widths)], -1) for part in range(len(widths))]


# Nibbles. The low one of a byte, and so of a word, comes first.


def _by_rows(change: Callable[..., Tensor], *words: Tensor) -> Tensor:
    """`change` of words `[K, ...]`, some rows at a time: nibbles take a byte each while they are
    apart, and several passes do."""
    import torch

    step = max(1, _BLOCK_WORDS // max(1, words[0].shape[1]) // 32) * 32  # no tile is cut
    return torch.cat(
        [
            change(*(part[start : start + step] for part in words))
            for start in range(0, words[0].shape[0], step)
        ]
    )


def _permute_nibbles(words: Tensor, view: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """Words `[n]` whose nibbles are those of `words`, viewed, transposed, and read in their new
    order."""
    return _from_nibbles(_nibbles(words).view(view).permute(order))


def _restore_nibbles(words: Tensor, view: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """The inverse of `_permute_nibbles` with the same view and order."""
    inverse = sorted(range(len(order)), key=lambda axis: order[axis])
    return _from_nibbles(_nibbles(words).view([view[axis] for axis in order]).permute(inverse))


def _nibbles(words: Tensor) -> Tensor:
    import torch

    packed = words.contiguous().view(-1).view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), -1)


def _from_nibbles(nibbles: Tensor) -> Tensor:
    import torch

    pairs = nibbles.reshape(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).view(torch.int32)
