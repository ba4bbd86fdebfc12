"""RMSNorm against the oracle."""

from __future__ import annotations

import pytest
import torch
from quantflow_kernels import reference
from quantflow_kernels.norm import bytes_moved, rms_norm

from tests.helpers.devices import DEVICE, DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (3, 100), (5, 4096), (2, 6000)])
@pytest.mark.parametrize("added", [False, True])
def test_against_the_oracle(dtype: torch.dtype, tokens: int, k: int, added: bool) -> None:
    generator = torch.Generator().manual_seed(k)
    x, r = (torch.randn(tokens, k, generator=generator).to(DEVICE, dtype) * 3 for _ in range(2))
    weight = torch.rand(k, generator=generator).to(DEVICE, dtype)
    total = x + r if added else x
    residual = r.clone() if added else None
    found = rms_norm(x, weight, 1e-5, residual)
    if residual is not None:
        assert residual.equal(total)
    last_bit = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(
        found, reference.rms_norm(total, weight, 1e-5), rtol=last_bit, atol=1e-6
    )


def test_zeros_and_strides() -> None:
    wide = torch.full((4, 64), torch.nan, device=DEVICE, dtype=torch.float16)
    wide[:, :32] = 0
    found = rms_norm(wide[:, :32], torch.ones(32, device=DEVICE, dtype=torch.float16), 1e-6)
    assert found.equal(torch.zeros(4, 32, device=DEVICE, dtype=torch.float16))
    assert rms_norm(wide[:0, :32], wide[0, :32], 1e-6).shape == (0, 32)


def test_roofline() -> None:
    assert bytes_moved(3, 10, True) == 2 * bytes_moved(3, 10, False) == 3 * 10 * 2 * 4
