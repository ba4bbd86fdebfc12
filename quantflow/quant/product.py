"""Matrix products in float32 at a CPU's full rate.

torch hands a float32 product to MKL, which uses AVX-512 on Intel's processors only; a 1×1
convolution is the same product by oneDNN, which uses it everywhere (on two Zen 5 cores 390 to 410
GFLOP/s against 185).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST_ROWS = 192  # fewer do not pay for laying out a large weight anew
MOST_ELEMENTS = 2**26  # of a weight, whose new layout is a second copy in memory


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + bias` `[..., N]`, for x `[..., K]` and a weight `[N, K]`:
    `torch.nn.functional.linear`."""
    n, k = weight.shape
    rows = x.shape[:-1].numel()
    fits = x.shape[-1] == k and 0 < weight.numel() <= MOST_ELEMENTS and weight.is_contiguous()
    if not fits or not _by_convolution(x, rows):
        return F.linear(x, weight, bias)
    # Channels last, x is an image of one column whose pixels are its rows.
    image = x.reshape(rows, k).contiguous().as_strided((1, k, rows, 1), (rows * k, 1, k, k))
    out = F.conv2d(image, weight.as_strided((n, k, 1, 1), (k, 1, k, k)), bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], n)


def _by_convolution(x: Tensor, rows: int) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and rows >= FEWEST_ROWS
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )
