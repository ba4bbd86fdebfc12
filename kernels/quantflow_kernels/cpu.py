"""`y = x dequant(W)ᵀ` on a CPU, for 4-bit weights and bfloat16 activations; the weight stays in 4 bits.

Few tokens go through torch's int4 product, which reads each weight once for all of them and computes in float32. Its time grows with
every token, so that many take another way: the weight in bfloat16, a strip of output channels at a time, and a dense product. Strips
are unpacked by a compiled function where there is a C++ compiler, else by plain torch operations, which take about seven times as long.

The packed layout differs between machines, so it is made at load and never stored; `supported` proves that this machine's is the
one that strips are unpacked from.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantflow_kernels.layout import PER_CHANNEL

ROWS = 64  # output channels of a packed block: byte t of an input channel holds channel t in its low half, 32 + t in its high half
STRIP = 16  # blocks that are unpacked together
FEW_TOKENS = 8  # as many at most go through the int4 product


@dataclass(frozen=True)
class CpuWeight:
    """A 4-bit weight `[N, K]`.

    packed: uint8 `[N, K / 2]`, torch's layout. grid: bfloat16 `[G, N, 2]`, the scale, and the value of code 8, rounded. scales:
    `[G, N]`. zeros: uint8 `[G, N]`.
    """

    packed: Tensor
    grid: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.packed.shape[1] * 2

    @property
    def nbytes(self) -> int:
        """What one product of few tokens reads."""
        return sum(t.numel() * t.element_size() for t in (self.packed, self.grid))


def unsupported(bits: int, group_size: int, out_features: int, in_features: int, dtype: torch.dtype) -> str:
    """Why the int4 product cannot take such a weight; "" where it can."""
    group = in_features if group_size == PER_CHANNEL else group_size
    if bits != 4 or dtype != torch.bfloat16:
        return f"{bits} bits and {str(dtype).removeprefix('torch.')}; torch's int4 product takes 4 and bfloat16"
    if group not in (32, 64, 128, 256) or in_features % group:
        return f"groups of {group} in {in_features} input channels; torch's int4 product takes 32, 64, 128 and 256"
    if out_features % ROWS:
        return f"{out_features} output channels; torch's int4 product takes multiples of {ROWS}"
    return "" if layout_known() else "this machine's layout of packed 4-bit weights is not the one that is read here"


@cache
def layout_known() -> bool:
    """Whether this machine packs 4-bit weights as `_strip` reads them, by packing a small weight."""
    codes = torch.randint(0, 16, (2 * ROWS, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (RuntimeError, NotImplementedError):
        return False
    if packed.dtype != torch.uint8 or packed.shape != (2 * ROWS, 32):
        return False
    ones, none = torch.ones(1, 2 * ROWS), torch.zeros(1, 2 * ROWS, dtype=torch.uint8)
    return bool(_strip(packed.view(2, 64, ROWS // 2), ones, none).T.int().equal(codes))


def pack(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> CpuWeight:
    """A canonical weight (codes uint8 `[N, K]`, scales `[N, G]`, zeros uint8 `[N, G]`) for the CPU. `unsupported` has been asked.

    torch's product computes `(code - 8) · scale + shift` with a bfloat16 `shift`, so that zero points other than 8 are rounded. With
    zero points anywhere and activations whose mean is three deviations the relative error is 0.0022, where rounding the output alone
    makes 0.0016; with zero points of 8 there is none but that. Raises ValueError for scales that bfloat16 does not hold exactly.
    """
    group = codes.shape[1] if group_size == PER_CHANNEL else group_size
    scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
    grid = torch.stack((scales.float(), (8 - zeros.float()) * scales.float()), dim=-1).bfloat16()
    if not grid[..., 0].float().equal(scales.float()):
        raise ValueError("a scale that bfloat16 does not hold exactly")
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return CpuWeight(packed, grid, scales, zeros, group)


def _strip(packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """bfloat16 `[K, n]`, the transposed weight of some blocks: packed `[n / 64, K, 32]`, scales and zeros `[G, n]`."""
    blocks, k, _ = packed.shape
    groups = scales.shape[0]

    def spread(t: Tensor) -> Tensor:
        return t.view(groups, blocks, 1, ROWS).transpose(0, 1).float()

    codes = torch.cat([packed & 15, packed >> 4], -1).view(blocks, groups, k // groups, ROWS)
    values = (codes.float() - spread(zeros)) * spread(scales)
    return values.to(torch.bfloat16).view(blocks, k, ROWS).transpose(0, 1).reshape(k, blocks * ROWS)


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_strip, dynamic=True)  # once or twice for all shapes: 2 to 20 s each the first time on a machine


@cache
def compiler() -> bool:
    """Whether there is what it takes to compile `_strip`."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def linear(x: Tensor, weight: CpuWeight, bias: Tensor | None = None, *, exact: bool) -> Tensor:
    """`x Wᵀ + bias` `[..., N]` for bfloat16 `x` `[..., K]`.

    exact: the int4 product whatever the number of tokens, so that a row's bits do not depend on it.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if exact or len(flat) <= FEW_TOKENS:
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, weight.packed, weight.group_size, weight.grid)
    else:
        out = _many(flat, weight)
    return (out if bias is None else out + bias).view(*x.shape[:-1], weight.shape[0])


def _many(x: Tensor, weight: CpuWeight) -> Tensor:
    (n, k), strip = weight.shape, _compiled() if compiler() else _strip
    blocks = weight.packed.view(n // ROWS, k, ROWS // 2)
    out = torch.empty(len(x), n, dtype=x.dtype)
    for start in range(0, len(blocks), STRIP):
        part = slice(start * ROWS, (start + STRIP) * ROWS)
        dense = strip(blocks[start : start + STRIP], weight.scales[:, part], weight.zeros[:, part])
        out[:, part] = x @ dense
    return out
