"""`y = x dequant(W)ᵀ` on a CPU, for 4-bit weights and bfloat16 activations; the weight stays in 4
bits.

Few tokens go through torch's int4 product, which reads each weight once for all of them and
computes in float32. Its time grows with every token, so that many take another way: the weight in
bfloat16, a strip of output channels at a time, and a dense product. Strips are unpacked by a
compiled function where there is a C++ compiler, else by plain torch operations, which take about
seven times as long.

The packed layout differs between machines, so it is made at load and never stored; `block_rows`
finds out which one this machine's is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantflow_kernels.layout import PER_CHANNEL

# Output channels of a packed block (with AVX-512 and AVX2): byte t of an input channel holds
# channel t of the block in its low half, and the one half a block further in its high half.
BLOCKS = (64, 32)
STRIP = 2048  # output channels that are unpacked together
FEW_TOKENS = 96  # as many at most go through the int4 product: measured, benchmarks/LOG.md


@dataclass(frozen=True)
class CpuWeight:
    """A 4-bit weight `[N, K]`.

    packed: uint8 `[N, K / 2]`, torch's layout. grid: bfloat16 `[G, N, 2]`, the scale, and the value
    of code 8, rounded. scales: `[G, N]`. zeros: uint8 `[G, N]`.
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


def unsupported(
    bits: int, group_size: int, out_features: int, in_features: int, dtype: torch.dtype
) -> str:
    """Why the int4 product cannot take such a weight; "" where it can."""
    group = in_features if group_size == PER_CHANNEL else group_size
    if bits != 4 or dtype != torch.bfloat16:
        return (
            f"{bits} bits and {str(dtype).removeprefix('torch.')}; torch's int4 product takes 4 and"
            " bfloat16"
        )
    if group not in (32, 64, 128, 256) or in_features % group:
        return (
            f"groups of {group} in {in_features} input channels; torch's int4 product takes 32, 64,"
            " 128 and 256"
        )
    rows = block_rows()
    if not rows:
        return "this machine's layout of packed 4-bit weights is none that is read here"
    return (
        f"{out_features} output channels; torch's int4 product takes multiples of {rows} here"
        if out_features % rows
        else ""
    )


@cache
def block_rows() -> int:
    """Output channels of a packed block on this machine, found by packing a small weight; 0 where
    the layout is an unknown one."""
    n, k = 2 * BLOCKS[0], 64
    codes = torch.randint(
        0, 16, (n, k), dtype=torch.int32, generator=torch.Generator().manual_seed(0)
    )
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (
        RuntimeError
    ):  # a build of torch without that operation; `unsupported` says what it means
        return 0
    if packed.dtype == torch.uint8 and packed.shape == (n, k // 2):
        ones, none = torch.ones(1, n), torch.zeros(1, n, dtype=torch.uint8)
        for rows in BLOCKS:
            if _strip(packed.view(n // rows, k, rows // 2), ones, none).T.int().equal(codes):
                return rows
    return 0


def pack(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> CpuWeight:
    """A canonical weight (codes uint8 `[N, K]`, scales `[N, G]`, zeros uint8 `[N, G]`) for the CPU.
    `unsupported` has been asked.

    torch's product computes `(code - 8) · scale + shift` with a bfloat16 `shift`, so that zero
    points other than 8 are rounded. With zero points anywhere and activations whose mean is three
    deviations the relative error is 0.0022, where rounding the output alone makes 0.0016; with zero
    points of 8 there is none but that. Raises ValueError for scales that bfloat16 does not hold
    exactly.
    """
    group = codes.shape[1] if group_size == PER_CHANNEL else group_size
    scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
    grid = torch.stack((scales.float(), (8 - zeros.float()) * scales.float()), dim=-1).bfloat16()
    if not grid[..., 0].float().equal(scales.float()):
        raise ValueError("a scale that bfloat16 does not hold exactly")
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return CpuWeight(packed, grid, scales, zeros, group)


def _strip(packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """bfloat16 `[K, n]`, the transposed weight of some blocks: packed `[blocks, K, rows / 2]`,
    scales and zeros `[G, n]`."""
    blocks, k, half = packed.shape
    groups, rows = scales.shape[0], 2 * half

    def spread(t: Tensor) -> Tensor:
        return t.view(groups, blocks, 1, rows).transpose(0, 1).float()

    codes = torch.cat([packed & 15, packed >> 4], -1).view(blocks, groups, k // groups, rows)
    values = (codes.float() - spread(zeros)) * spread(scales)
    return values.to(torch.bfloat16).view(blocks, k, rows).transpose(0, 1).reshape(k, blocks * rows)


Unpack = Callable[[Tensor, Tensor, Tensor], Tensor]


@cache
def unpacker() -> tuple[Unpack, str]:
    """What unpacks strips, and its name: `compiled`, or `plain` with the reason. The first call
    compiles, for seconds."""
    compiled = torch.compile(_strip, dynamic=True)

    def unpack(packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        # Sizes of 1 and sizes that happen to be equal are compiled for anew; beyond the limit torch
        # would go on without compiling.
        with torch._dynamo.config.patch(recompile_limit=64):
            return compiled(packed, scales, zeros)

    try:
        unpack(
            torch.zeros(3, 64, 16, dtype=torch.uint8),
            torch.ones(2, 96),
            torch.zeros(2, 96, dtype=torch.uint8),
        )
    # no compiler, no headers, nowhere to write: whatever it is, there is another way, which is said
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logging.getLogger(__name__).warning(
            "4-bit weights are unpacked without a compiler (%s)", reason
        )
        return _strip, f"plain ({reason})"
    return unpack, "compiled"


def linear(x: Tensor, weight: CpuWeight, bias: Tensor | None = None, *, exact: bool) -> Tensor:
    """`x Wᵀ + bias` `[..., N]` for bfloat16 `x` `[..., K]`.

    exact: the int4 product whatever the number of tokens, so that a row's bits do not depend on it.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if exact or len(flat) <= FEW_TOKENS:
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(
            flat, weight.packed, weight.group_size, weight.grid
        )
    else:
        out = _many(flat, weight)
    return (out if bias is None else out + bias.to(out.dtype)).view(*x.shape[:-1], weight.shape[0])


def _many(x: Tensor, weight: CpuWeight) -> Tensor:
    (n, k), rows, (unpack, _) = weight.shape, block_rows(), unpacker()
    blocks = weight.packed.view(n // rows, k, rows // 2)
    out = torch.empty(len(x), n, dtype=x.dtype)
    for start in range(0, n, STRIP):
        part = slice(start, start + STRIP)
        scales, zeros = weight.scales[:, part].contiguous(), weight.zeros[:, part].contiguous()
        out[:, part] = x @ unpack(blocks[start // rows : (start + STRIP) // rows], scales, zeros)
    return out
