"""Products on a CPU with bfloat16 arithmetic (AVX-512 BF16): weights of 2 to 4 bits, and dense
ones, by `cpu_kernels.c`.

Codes less their zero points are small integers, which bfloat16 holds exactly; each group's sum is
taken in float32 and multiplied by the group's scale, so that nothing of the weight is rounded. One
regime serves one token and a thousand: a row's bits never depend on the batch. The floor is the
weight's bytes for few tokens, the processor's bfloat16 rate for many.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from quantflow_kernels import cpu_kernels
from quantflow_kernels.layout import PER_CHANNEL

BLOCK = 16  # output channels of a packed block
STEP = 8  # input channels of a packed word
MOST_ZERO = 16


@dataclass(frozen=True)
class Int4Weight:
    """A weight `[N, K]` of at most 4 bits.

    codes: int16 `[N / 16, K / 8, 32]`, N padded: the four halves of lane 2n + p, low bits first,
    are channel n's codes for inputs p, 2 + p, 4 + p and 6 + p of the word. scales: bfloat16 or
    float32 `[G, N]`. zeros: uint8 `[G, N]`. order: int64 `[K]`, the inputs by their groups, where
    they do not stand in that order (GPTQ's `g_idx`).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    out_features: int
    group_size: int
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.codes.shape[1] * STEP

    @property
    def nbytes(self) -> int:
        """What one product of few tokens reads."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.zeros))


@cache
def available() -> bool:
    """Whether this processor and its compiler have the products."""
    loaded, _ = cpu_kernels.library()
    return loaded is not None and bool(loaded.has_products())


def unsupported(bits: int, group_size: int, in_features: int, dtype: torch.dtype) -> str:
    """Why these products cannot take such a weight; "" where they can."""
    group = in_features if group_size == PER_CHANNEL else group_size
    if bits > 4 or dtype != torch.bfloat16:
        return (
            f"{bits} bits and {str(dtype).removeprefix('torch.')}; the compiled int4 product takes"
            " up to 4 and bfloat16"
        )
    if group % STEP or in_features % group:
        return (
            f"groups of {group} in {in_features} input channels; the compiled int4 product takes"
            f" multiples of {STEP} that fill them"
        )
    return (
        ""
        if available()
        else f"no compiled products here ({cpu_kernels.library()[1] or 'no AVX-512 BF16'})"
    )


def fits(zeros: Tensor, group_index: Tensor | None) -> bool:
    """Whether zero points `[N, G]` and the groups of the input channels are such as the packed
    layout holds."""
    if zeros.numel() and int(zeros.max()) > MOST_ZERO:
        return False
    if group_index is None:
        return True
    groups = zeros.shape[1]
    inside = int(group_index.min()) >= 0 and int(group_index.max()) < groups
    return inside and bool(
        (torch.bincount(group_index, minlength=groups) == len(group_index) // groups).all()
    )


def pack(
    codes: Tensor, scales: Tensor, zeros: Tensor, group_index: Tensor | None = None
) -> Int4Weight:
    """A canonical weight (codes uint8 `[N, K]`, scales and zeros `[N, G]`) for these products.
    `unsupported` has been asked.

    group_index: int32 `[K]`, the group of each input channel. Raises ValueError for groups that are
    not full, or a zero point over 16.
    """
    (n, k), groups = codes.shape, scales.shape[1]
    order = None
    if not fits(zeros, group_index):
        raise ValueError(
            f"groups of unequal size, or a zero point of {int(zeros.max())}: expected full groups,"
            f" and at most {MOST_ZERO}"
        )
    if group_index is not None:
        order = group_index.long().argsort(stable=True)
        codes = codes[:, order]
    packed = torch.empty(-(-n // BLOCK), k // STEP, 2 * BLOCK, dtype=torch.int16)
    # A few blocks at a time: what lies between is four times the weight.
    for start in range(0, n, 64 * BLOCK):
        part = codes[start : start + 64 * BLOCK]
        part = F.pad(part, (0, 0, 0, -len(part) % BLOCK)).view(-1, BLOCK, k // STEP, STEP // 2, 2)
        pairs = (part[..., 0::2, :] | part[..., 1::2, :] << 4).to(torch.int16)
        words = pairs[..., 0, :] | pairs[..., 1, :] << 8  # [blocks, 16, K / 8, 2]
        packed[start // BLOCK : start // BLOCK + len(part)] = words.transpose(1, 2).flatten(2)
    kind = torch.bfloat16 if scales.bfloat16().to(scales.dtype).equal(scales) else torch.float32
    grid, points = (
        F.pad(t.T.to(dtype), (0, -n % BLOCK)).contiguous()
        for t, dtype in ((scales, kind), (zeros, torch.uint8))
    )
    return Int4Weight(packed, grid, points, n, k // groups, order)


def linear(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + bias` `[..., N]` for bfloat16 `x` `[..., K]`. bias: floating `[N]`. Raises ValueError
    for another `x`."""
    flat = _rows(x, weight.shape[1])
    if weight.order is not None:
        flat = flat.index_select(1, weight.order)
    (n, k), blocks = weight.shape, weight.codes.shape[0]
    out = torch.empty(len(flat), n, dtype=x.dtype)
    added = None if bias is None else F.pad(bias.float(), (0, blocks * BLOCK - n))
    cpu_kernels.loaded().int4_matmul(
        flat.data_ptr(),
        flat.stride(0),
        len(flat),
        weight.codes.data_ptr(),
        weight.scales.data_ptr(),
        cpu_kernels.KINDS[weight.scales.dtype],
        weight.zeros.data_ptr(),
        cpu_kernels.at(added),
        n,
        k,
        weight.group_size,
        out.data_ptr(),
    )
    return out.view(*x.shape[:-1], n)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + bias` `[..., N]` for bfloat16 `x` `[..., K]` and a contiguous bfloat16 weight `[N,
    K]`."""
    flat, (n, k) = _rows(x, weight.shape[1]), weight.shape
    if weight.dtype != torch.bfloat16 or not weight.is_contiguous():
        raise ValueError(
            f"weight {weight.dtype} with strides {weight.stride()}: expected bfloat16, contiguous"
        )
    out = torch.empty(len(flat), n, dtype=x.dtype)
    added = None if bias is None else bias.float()
    cpu_kernels.loaded().dense_matmul(
        flat.data_ptr(),
        flat.stride(0),
        len(flat),
        weight.data_ptr(),
        cpu_kernels.at(added),
        n,
        k,
        out.data_ptr(),
    )
    return out.view(*x.shape[:-1], n)


def _rows(x: Tensor, k: int) -> Tensor:
    if x.dtype != torch.bfloat16 or x.shape[-1] != k or x.device.type != "cpu":
        raise ValueError(
            f"x {x.dtype} {list(x.shape)} on {x.device}: expected bfloat16 [..., {k}] on the CPU"
        )
    flat = x.reshape(-1, k)
    return flat if flat.stride(1) == 1 else flat.contiguous()
