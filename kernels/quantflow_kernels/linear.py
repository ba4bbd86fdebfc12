"""One interface for quantised linears wherever they run: `prepare` at load, `linear` in the model.

A GPU takes the Triton product, above a measured number of tokens the dense weight and cuBLAS. A CPU
with bfloat16 arithmetic takes the compiled product, another one torch's int4 product. What none has
a place for (odd groups, other floats than bfloat16 on a CPU) is unpacked by plain torch operations;
how a weight will be computed is what `way` says, so that a slow way is never taken in silence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantflow_kernels import cpu, cpu_matmul, layout
from quantflow_kernels.configs import Tuned, matmul_config, tuned


@dataclass(frozen=True)
class PlainWeight:
    """Canonical codes, packed two in a byte where they have 4 bits or fewer: the lower half of a
    row's byte j is channel 2j.

    packed: uint8 `[N, ceil(K / 2)]` or `[N, K]`. scales, zeros: `[N, G]`. index: which group a
    channel belongs to, int64 `[K]`.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    index: Tensor
    bits: int

    def dense(self, dtype: torch.dtype) -> Tensor:
        k = len(self.index)
        codes = (
            self.packed
            if self.bits == 8
            else torch.stack((self.packed & 15, self.packed >> 4), -1).flatten(1)[:, :k]
        )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (
            (codes.to(wide) - self.zeros.to(wide)[:, self.index])
            * self.scales.to(wide)[:, self.index]
        ).to(dtype)


QuantWeight = layout.PackedWeight | cpu_matmul.Int4Weight | cpu.CpuWeight | PlainWeight


def prepare(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
    group_index: Tensor | None = None,
) -> QuantWeight:
    """A canonical weight (codes uint8 `[N, K]`, scales and zeros `[N, G]`, on their device) in the
    layout it will be computed from.

    dtype: of the activations. group_index: int32 `[K]` where channels do not belong to the groups
    they stand in (GPTQ's `g_idx`).
    """
    n, k = codes.shape
    if (
        codes.device.type == "cpu"
        and not cpu_matmul.unsupported(bits, group_size, k, dtype)
        and cpu_matmul.fits(zeros, group_index)
    ):
        return cpu_matmul.pack(codes, scales, zeros, group_index)
    if group_index is None:
        if codes.device.type == "cuda":
            if not layout.unsupported(bits, group_size, k):
                return layout.pack(codes, scales, zeros, group_size, bits)
        elif not cpu.unsupported(bits, group_size, n, k, dtype) and scales.to(dtype).equal(scales):
            return cpu.pack(codes, scales, zeros, group_size)
    index = (
        torch.arange(k, device=codes.device) // (k // scales.shape[1])
        if group_index is None
        else group_index.long()
    )
    packed = codes
    if bits < 8:
        padded = F.pad(codes, (0, k % 2))
        packed = padded[:, ::2] | padded[:, 1::2] << 4
    return PlainWeight(packed, scales, zeros, index, bits)


def way(weight: QuantWeight) -> str:
    """How products with it are computed, in words."""
    if isinstance(weight, layout.PackedWeight):
        return "triton"
    if isinstance(weight, cpu_matmul.Int4Weight):
        return "compiled C int4"
    if isinstance(weight, cpu.CpuWeight):
        return f"torch int4; for many tokens, strips: {cpu.unpacker()[1]}"
    return "plain torch"


# rows of a dense product in exact mode: on a GPU, few of them cost as much as many
TILES = {"cpu": 16, "cuda": 64}
FEW = 16  # rows up to which the compiled dense product is the faster one on a CPU


def in_fixed_tiles(x: Tensor, dense: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, always on as many rows: libraries choose another way of summing for another
    number of them."""
    flat = x.reshape(-1, x.shape[-1])
    rows = TILES.get(x.device.type, TILES["cpu"])
    tiles = F.pad(flat, (0, 0, 0, -len(flat) % rows)).split(rows)
    parts = [F.linear(tile, dense, bias) for tile in tiles if len(tile)]
    out = torch.cat(parts)[: len(flat)] if parts else F.linear(flat, dense, bias)
    return out.view(*x.shape[:-1], len(dense))


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, exact: bool) -> Tensor:
    """`x Wᵀ + bias` `[..., N]` for a weight `[N, K]` in the dtype of `x`."""
    compiled = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.bfloat16
        and weight.is_contiguous()
        and cpu_matmul.available()
    )
    if compiled and (exact or x.numel() // x.shape[-1] <= FEW):
        return cpu_matmul.dense(x, weight, bias)
    return in_fixed_tiles(x, weight, bias) if exact else F.linear(x, weight, bias)


def linear(
    x: Tensor,
    weight: QuantWeight,
    bias: Tensor | None = None,
    *,
    exact: bool,
    tuning: Tuned | None = None,
) -> Tensor:
    """`x Wᵀ + bias` `[..., N]` in the dtype of `x`. exact: a row's bits do not depend on what else
    is in the batch.

    tuning: the tiles to run with on a GPU; by default those of the device at hand.
    """
    if isinstance(weight, cpu_matmul.Int4Weight):
        return cpu_matmul.linear(x, weight, bias)
    if isinstance(weight, cpu.CpuWeight):
        return cpu.linear(x, weight, bias, exact=exact)
    if isinstance(weight, PlainWeight):
        return dense(x, weight.dense(x.dtype), bias, exact=exact)
    # Here, so that a CPU needs no Triton.
    from quantflow_kernels.dequantize import dequantize
    from quantflow_kernels.matmul import matmul

    tuning = tuning or tuned(torch.cuda.get_device_name(x.device))
    tokens = x.numel() // x.shape[-1]
    if x.dtype == torch.float32:  # its tiles would not fit
        return dense(x, dequantize(weight, x.dtype), bias, exact=exact)
    if not exact and tokens >= tuning.dense_from:
        return F.linear(x, dequantize(weight, x.dtype), bias)
    return matmul(x, weight, bias, matmul_config(tuning, tokens, exact=exact))
