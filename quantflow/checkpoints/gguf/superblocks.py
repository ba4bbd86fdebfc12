"""GGUF's superblocks Q4_K, Q5_K and Q6_K: 256 weights in blocks whose scales are small integers,
times one fp16 for all.

They are read, never written: no grid here has such scales, and most files that llama.cpp quantised
hold some.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SUPERBLOCK = 256  # weights
# ggml's number of a type -> its name, and the bytes of a superblock
SUPERBLOCK_TYPES = {12: ("Q4_K", 144), 13: ("Q5_K", 176), 14: ("Q6_K", 210)}


def dequantize_superblocks(kind: int, raw: Tensor) -> Tensor:
    """float32, 256 times as many as there are superblocks in `raw` (uint8); products are rounded
    where llama.cpp's reference rounds."""
    import torch

    name, size = SUPERBLOCK_TYPES[kind]
    blocks = raw.view(-1, size)
    if name == "Q6_K":
        low, high, scales, d = blocks.split((128, 64, 16, 2), -1)
        steps = (
            d.contiguous().view(torch.float16).float()
            * scales.contiguous().view(torch.int8).float()
        )
        codes = _fields(low, 64, 4) | _fields(high, 32, 2) << 4
        return (steps[..., None] * (codes.view(-1, 16, 16).float() - 32)).view(-1)
    d, packed, high, low = blocks.split((4, 12, size - 144, 128), -1)
    factors = d.contiguous().view(torch.float16).float()
    scales, minimums = _six_bits(packed)
    codes = _fields(low, 32, 4)
    if name == "Q5_K":
        codes |= _fields(high, 32, 1) << 4
    steps, lowest = factors[:, :1] * scales.float(), factors[:, 1:] * minimums.float()
    return (steps[..., None] * codes.view(-1, 8, 32).float() - lowest[..., None]).view(-1)


def _fields(packed: Tensor, run: int, bits: int) -> Tensor:
    """uint8 `[S, 256]`: of every `run` bytes first all lowest fields of `bits` bits, then all next
    ones."""
    import torch

    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return (packed.reshape(len(packed), -1, 1, run) >> shifts & (1 << bits) - 1).view(
        len(packed), -1
    )


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 `[S, 8]` scales and `[S, 8]` minimums from 12 bytes: four of each whole, with the
    highest bits of four more above them."""
    import torch

    first, second, rest = packed.split(4, -1)
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), -1)
    minimums = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), -1)
    return scales, minimums
