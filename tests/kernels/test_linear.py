"""The one interface: whichever way a weight is computed, it is the right one, and says what it
is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantflow_kernels import configs, cpu, cpu_matmul, linear, reference
from quantflow_kernels.configs import matmul_config, tuned
from quantflow_kernels.layout import PER_CHANNEL

from tests.helpers.devices import DEVICE
from tests.kernels.test_layout import weight

ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k", "group"), [(64, 128, 64), (24, 86, 43), (5, 33, PER_CHANNEL)])
# twice as many tokens: the last is beyond the crossover to a dense weight
@pytest.mark.parametrize("m", [1, 40, 150])
def test_any_weight(dtype: torch.dtype, bits: int, n: int, k: int, group: int, m: int) -> None:
    codes, scales, zeros = (t.to(DEVICE) for t in weight(n, k, bits, group))
    scales = scales.bfloat16()
    x = torch.randn(2, m, k, generator=torch.Generator().manual_seed(m)).to(DEVICE, dtype)
    expected = reference.w4a16_matmul(x.double(), codes, scales.double(), zeros, group)
    prepared = linear.prepare(codes, scales, zeros, group, bits, dtype)
    for exact in (True, False):
        found = linear.linear(x, prepared, exact=exact)
        assert found.dtype == dtype and found.shape == (2, m, n)
        assert float((found.double() - expected).norm() / expected.norm()) < ROUNDING[dtype]


def test_a_group_index() -> None:
    """Channels that do not lie in the order of their groups: GPTQ's act-order without static
    groups."""
    codes, scales, zeros = (t.to(DEVICE) for t in weight(8, 64, 4, 32))
    index = (
        torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.int32) % 2
    )
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    dense = (codes.float() - zeros.float()[:, index.long()]) * scales[:, index.long()]
    prepared = linear.prepare(codes, scales, zeros, 32, 4, x.dtype, index)
    assert linear.way(prepared) == "plain torch"
    torch.testing.assert_close(
        linear.linear(x, prepared, exact=True), x @ dense.T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k", "group"), [(128, 256, 64), (96, 172, 43)])
def test_in_exact_mode_a_rows_bits_depend_on_that_row_alone(
    dtype: torch.dtype, n: int, k: int, group: int
) -> None:
    codes, scales, zeros = (t.to(DEVICE) for t in weight(n, k, 4, group))
    prepared = linear.prepare(codes, scales.bfloat16(), zeros, group, 4, dtype)
    x = torch.randn(70, k, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    whole = linear.linear(x, prepared, bias, exact=True)
    for m in (0, 1, 2, 15, 16, 17, 64):
        assert linear.linear(x[:m], prepared, bias, exact=True).equal(whole[:m])
        assert linear.linear(x[m:], prepared, bias, exact=True).equal(whole[m:])


@pytest.mark.skipif(DEVICE == "cuda" or not cpu.block_rows(), reason="the ways of a CPU")
def test_ways_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales, zeros = weight(64, 128, 4, 64)
    scales = scales.bfloat16()
    if cpu_matmul.available():
        assert (
            linear.way(linear.prepare(codes, scales, zeros, 64, 4, torch.bfloat16))
            == "compiled C int4"
        )
    monkeypatch.setattr(cpu_matmul, "available", lambda: False)
    monkeypatch.setattr(cpu, "unpacker", lambda: (cpu._strip, "plain (why)"))
    assert (
        linear.way(linear.prepare(codes, scales, zeros, 64, 4, torch.bfloat16))
        == "torch int4; for many tokens, strips: plain (why)"
    )
    assert linear.way(linear.prepare(codes, scales, zeros, 64, 4, torch.float32)) == "plain torch"
    # A float32 scale that bfloat16 would round is left as it is.
    assert (
        linear.way(linear.prepare(codes, scales.float() + 1e-6, zeros, 64, 4, torch.bfloat16))
        == "plain torch"
    )
    monkeypatch.setattr(cpu, "block_rows", lambda: 0)
    assert linear.way(linear.prepare(codes, scales, zeros, 64, 4, torch.bfloat16)) == "plain torch"


def test_codes_of_four_bits_and_fewer_take_half_a_byte() -> None:
    codes, scales, zeros = weight(6, 33, 3, PER_CHANNEL)
    prepared = linear.prepare(
        codes.to(DEVICE), scales.to(DEVICE), zeros.to(DEVICE), PER_CHANNEL, 3, torch.float32
    )
    if isinstance(prepared, linear.PlainWeight):
        assert prepared.packed.shape == (6, 17)


def test_regimes() -> None:
    """Exact has one; fast takes the first that holds the tokens."""
    found = tuned("a device nobody has heard of")
    assert found is configs.DEFAULT
    assert {matmul_config(found, m, exact=True) for m in (1, 16, 17, 5000)} == {found.exact}
    limits = [most for most, _ in found.fast]
    assert limits == sorted(limits)
    for most, config in found.fast:
        assert matmul_config(found, most, exact=False) == config
    assert matmul_config(found, limits[0] + 1, exact=False) == found.fast[1][1]


@pytest.mark.skipif(DEVICE == "cuda", reason="the ways of a CPU")
def test_a_cpu_needs_no_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from quantflow_kernels import cpu_attention, linear
codes = torch.randint(0, 16, (64, 64), dtype=torch.uint8)
zeros = torch.zeros(64, 1, dtype=torch.uint8)
for dtype in (torch.float32, torch.bfloat16):
    weight = linear.prepare(codes, torch.ones(64, 1), zeros, 64, 4, dtype)
    assert linear.linear(torch.ones(1, 64, dtype=dtype), weight, exact=True).isfinite().all()
"""
    path = str(Path(linear.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
