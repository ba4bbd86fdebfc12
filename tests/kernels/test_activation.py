"""silu(gate) · up against the oracle."""

from __future__ import annotations

import pytest
import torch
from quantflow_kernels import reference
from quantflow_kernels.activation import bytes_moved, silu_mul

from tests.helpers.devices import DEVICE, DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (3, 100), (2, 1500)])
def test_against_the_oracle(dtype: torch.dtype, tokens: int, k: int) -> None:
    both = (torch.randn(tokens, 2 * k, generator=torch.Generator().manual_seed(k)) * 4).to(
        DEVICE, dtype
    )
    last_bit = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(
        silu_mul(both), reference.silu_mul(*both.chunk(2, dim=1)), rtol=last_bit, atol=1e-6
    )


def test_extremes_and_strides() -> None:
    wide = torch.full((2, 20), torch.nan, device=DEVICE, dtype=torch.float16)
    wide[:, :8] = torch.tensor([-60000.0, 60000.0, 0.0, -1.0, 1.0, 1.0, 5.0, 0.0])
    found = silu_mul(wide[:, :8])
    expected = torch.tensor([0.0, 60000.0, 0.0, 0.0], device=DEVICE, dtype=torch.float16)
    assert found.equal(expected.expand(2, 4)) and silu_mul(wide[:0, :8]).shape == (0, 4)


def test_roofline() -> None:
    assert bytes_moved(3, 10) == 3 * 10 * 2 * 3
