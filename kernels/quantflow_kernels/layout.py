"""How a quantised weight lies in memory for the kernels: made once at load, from canonical codes.

Shapes: `N` output channels, `K` input channels, `G` groups a row. A row is taken in blocks, a block
in slices of 64 input channels (32 where groups are that short). Word `i` of a row's block holds
channel `i` of every slice, the first slice in its lowest bits: shifting a tile of words by one code
gives the next slice, its channels side by side, so that a kernel never has to interleave. No slice
lies in two groups. Blocks come first, then rows, then words: a tile of rows is one contiguous piece
of memory, whatever its height. Words have 16 bits: two neighbours in a register turn into two
16-bit floats with one shift and one logical operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 16  # bits
LONGEST_SLICE = 64  # input channels
SHORTEST_SLICE = 32
PER_CHANNEL = -1  # a group size: one group spans the whole row


@dataclass(frozen=True)
class PackedWeight:
    """A weight `[N, K]` in the kernels' layout.

    words: int16 `[blocks, N, slice]`; for 3 bits, the lower two of each code. high: int16 `[blocks,
    N, slice / 2]`, the third bits; None for other widths. scales: `[G, N]` in the dtype given.
    zeros: uint8 `[G, N]`. group_size: input channels a group.
    """

    words: Tensor
    high: Tensor | None
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    in_features: int

    @property
    def out_features(self) -> int:
        return self.words.shape[1]

    @property
    def slice(self) -> int:
        """Input channels that one shift gives."""
        return self.words.shape[2]

    @property
    def nbytes(self) -> int:
        """What one pass over the weight reads."""
        parts = (self.words, self.high, self.scales, self.zeros)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


def lane_bits(bits: int) -> int:
    """Bits that a code takes in `words`: 3-bit codes keep two there."""
    return 2 if bits == 3 else bits


def unsupported(bits: int, group_size: int, in_features: int) -> str:
    """Why the kernels cannot take such a weight; "" where they can."""
    if bits not in (2, 3, 4, 8):
        return f"{bits} bits; the kernels take 2, 3, 4 and 8"
    if group_size in (PER_CHANNEL, in_features):
        return ""
    if group_size < SHORTEST_SLICE or group_size & (group_size - 1):
        return f"group size {group_size}; the kernels take 32, 64, 128, … and one group a row"
    if in_features % group_size:
        return f"{in_features} input channels are no multiple of the group size {group_size}"
    return ""


def pack(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, bits: int) -> PackedWeight:
    """The kernels' layout of a canonical weight: codes uint8 `[N, K]`, scales `[N, G]`, zeros uint8
    `[N, G]`.

    Raises ValueError where the kernels have no place for it (see `unsupported`), or where shapes do
    not fit one another.
    """
    n, k = codes.shape
    group = k if group_size == PER_CHANNEL else group_size
    if reason := unsupported(bits, group, k):
        raise ValueError(reason)
    if scales.shape != (n, k // group) or zeros.shape != scales.shape:
        shapes = f"scales {list(scales.shape)} and zeros {list(zeros.shape)}"
        raise ValueError(f"codes [{n}, {k}] in groups of {group} do not go with {shapes}")
    lane = lane_bits(bits)
    size, slices = SHORTEST_SLICE if group == SHORTEST_SLICE else LONGEST_SLICE, WORD // lane
    # Channels that pad the last block meet activations of zero.
    blocks = F.pad(codes, (0, -k % (size * slices))).view(n, -1, slices, size).transpose(0, 1)
    words = torch.zeros(blocks.shape[0], n, size, dtype=torch.int16, device=codes.device)
    for j in range(slices):
        words |= (blocks[:, :, j] & (2**lane - 1)).to(torch.int16) << (lane * j)
    high = None
    if bits == 3:
        # Word i holds the third bits of channels i and size / 2 + i of slice j at bits 2j and 2j +
        # 1.
        high = torch.zeros(blocks.shape[0], n, size // 2, dtype=torch.int16, device=codes.device)
        for j in range(slices):
            lower, upper = (blocks[:, :, j] >> 2).to(torch.int16).chunk(2, dim=-1)
            high |= (lower << (2 * j)) | (upper << (2 * j + 1))
    return PackedWeight(words, high, scales.T.contiguous(), zeros.T.contiguous(), bits, group, k)


def unpack_codes(weight: PackedWeight) -> Tensor:
    """The canonical codes, uint8 `[N, K]`."""
    lane, slices = lane_bits(weight.bits), []
    words = weight.words.int()
    for j in range(WORD // lane):
        codes = (words >> (lane * j)) & (2**lane - 1)
        if weight.high is not None:
            third = (
                torch.cat((weight.high.int() >> (2 * j), weight.high.int() >> (2 * j + 1)), dim=-1)
                & 1
            )
            codes = codes | third << 2
        slices.append(codes.to(torch.uint8))
    unpacked = torch.stack(slices, dim=2)  # [blocks, N, slices, slice]
    return (
        unpacked.transpose(0, 1)
        .reshape(weight.out_features, -1)[:, : weight.in_features]
        .contiguous()
    )
