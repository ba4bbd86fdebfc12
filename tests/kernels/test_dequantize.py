"""The dense weight against the oracle, bit for bit: one product in float32, rounded once."""

from __future__ import annotations

import pytest
import torch
from quantflow_kernels import reference
from quantflow_kernels.dequantize import bytes_moved, dequantize
from quantflow_kernels.layout import PER_CHANNEL, pack

from tests.helpers.devices import DEVICE, DTYPES
from tests.kernels.test_layout import weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [
        (1, 32, 32),
        (17, 96, 32),
        (33, 100, PER_CHANNEL),
        (5, 640, 64),
        (18, 512, 128),
        (3, 2048, 1024),
    ],
)
def test_against_the_oracle(dtype: torch.dtype, bits: int, n: int, k: int, group: int) -> None:
    codes, scales, zeros = (t.to(DEVICE) for t in weight(n, k, bits, group))
    found = dequantize(pack(codes, scales, zeros, group, bits), dtype)
    assert found.equal(reference.dequantize(codes, scales, zeros, group).to(dtype))


def test_roofline() -> None:
    codes, scales, zeros = weight(16, 256, 4, 64)
    packed = pack(codes, scales, zeros, 64, 4)
    assert bytes_moved(packed) == packed.nbytes + 16 * 256 * 2
