"""NF4: 4-bit codes of a normal distribution's quantiles, scaled by the largest magnitude of each block (Dettmers et al. 2023, QLoRA:
arXiv 2305.14314, equations 3 to 6). What people know as `load_in_4bit`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantflow.quant.grid import NF4, NestedScales, Nf4Tensor, Scheme


def quantize_nf4(weight: Tensor, scheme: Scheme) -> Nf4Tensor:
    """`weight` `[N, K]` in the nearest codes, computed as bitsandbytes does, so that the codes are the same as its own.

    A block of zeros has scale 0, which stands for zeros whatever its codes. With `scheme.double` the scales are quantised after the
    codes were chosen, as in QLoRA.
    """
    n, k = weight.shape
    blocks = weight.float().view(n, scheme.groups(k), -1)
    scales = blocks.abs().amax(-1)
    table = torch.tensor(NF4, dtype=torch.float32, device=weight.device)
    borders = (table[:-1] + table[1:]) / 2
    shares = (blocks * (1.0 / scales.clamp(min=1e-38))[:, :, None]).clamp_(-1, 1)
    codes = torch.bucketize(shares, borders, out_int32=True).to(torch.uint8).view(n, k)
    if not scheme.double:
        return Nf4Tensor(scheme, codes, scales)
    nested = nest_scales(scales)
    return Nf4Tensor(scheme, codes, nested.scales().view_as(scales), nested)


def nest_scales(scales: Tensor) -> NestedScales:
    """The scales in 8 bits: their mean is taken off, and what is left is rounded to the dynamic table, in blocks of 256.

    The codes are the nearest, as bitsandbytes' GPU kernels choose them. Its CPU kernel rounds each share to a multiple of 2 / 65535
    before it looks the code up, and so takes a neighbour of the nearest where two are about equally near.
    """
    flat = scales.reshape(-1)
    offset = flat.mean()
    rest = flat - offset
    block = NestedScales.BLOCK
    padded = torch.nn.functional.pad(rest, (0, -rest.numel() % block)).view(-1, block)
    absmax = padded.abs().amax(-1)
    table = dynamic_table().to(scales.device)
    shares = padded * (1.0 / absmax.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(shares, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    return NestedScales(codes.view(-1)[: rest.numel()].contiguous(), absmax, table, float(offset))


def dynamic_table() -> Tensor:
    """float32 `[256]`, sorted: bitsandbytes' signed dynamic data type (Dettmers 2016, arXiv 1511.04561): the exponent -6..0 of ten is
    written in unary, and the bits that are left count linearly, `2^i` steps for exponent `i - 6`."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)
