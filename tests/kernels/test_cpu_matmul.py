"""The compiled products of a CPU against float64, and their indifference to the batch."""

from __future__ import annotations

import pytest
import torch
from quantflow_kernels import cpu_matmul, reference
from quantflow_kernels.layout import PER_CHANNEL

from tests.helpers.devices import DEVICE
from tests.kernels.test_layout import weight

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu" or not cpu_matmul.available(), reason="no compiled products on this machine"
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [
        (64, 128, 64),
        (16, 8, 8),
        (100, 256, 32),
        (7, 40, PER_CHANNEL),
        (1, 128, 128),
        (257, 384, 128),
    ],
)
@pytest.mark.parametrize("m", [1, 3, 8, 9, 40])
def test_against_the_oracle(bits: int, n: int, k: int, group: int, m: int) -> None:
    """Rounded once, at the end: what float32 sums lose is far below a bfloat16's last bit."""
    codes, scales, zeros = weight(n, k, bits, group)
    x, bias = random(2, m, k, seed=m), random(n, seed=1)
    for kind in (torch.bfloat16, torch.float32):
        grid = scales.to(kind)
        packed = cpu_matmul.pack(codes, grid, zeros)
        assert packed.scales.dtype == kind and packed.shape == (n, k)
        expected = reference.w4a16_matmul(
            x.double(), codes, grid.double(), zeros, group, bias.double()
        )
        found = cpu_matmul.linear(x, packed, bias)
        # what the sums run through
        size = reference.w4a16_matmul(
            x.double().abs(), codes, grid.double().abs(), zeros * 0, group
        )
        assert bool(
            ((found.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * size).all()
        )


def test_every_code_and_zero_point_is_exact() -> None:
    """One input channel at a time: 16 codes times 16 zero points, each against the integer it
    stands for."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(16)[:, None].expand(256, 8).contiguous()
    zeros = torch.arange(16, dtype=torch.uint8).repeat_interleave(16)[:, None].contiguous()
    packed = cpu_matmul.pack(codes, torch.ones(256, 1), zeros)
    found = cpu_matmul.linear(torch.eye(8).bfloat16(), packed)
    assert found.int().equal((codes.int() - zeros.int()).T)


def test_a_group_index() -> None:
    codes, scales, zeros = weight(24, 64, 4, 16)
    index = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(torch.int32) % 4
    dense = (codes.double() - zeros.double()[:, index.long()]) * scales.bfloat16().double()[
        :, index.long()
    ]
    x = random(5, 64)
    found = cpu_matmul.linear(x, cpu_matmul.pack(codes, scales.bfloat16(), zeros, index))
    torch.testing.assert_close(found.double(), x.double() @ dense.T, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(("n", "k"), [(200, 256), (33, 100), (4, 2048)])
def test_dense(n: int, k: int) -> None:
    w, x, bias = random(n, k), random(13, k, seed=1), random(n, seed=2)
    expected = x.double() @ w.double().T + bias.double()
    size = x.double().abs() @ w.double().abs().T
    found = cpu_matmul.dense(x, w, bias)
    assert bool(((found.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * size).all())


def test_a_rows_bits_do_not_depend_on_the_batch() -> None:
    codes, scales, zeros = weight(150, 256, 4, 64)
    packed, w = cpu_matmul.pack(codes, scales, zeros), random(150, 256)
    x = random(45, 256)
    for product in (
        lambda rows: cpu_matmul.linear(rows, packed),
        lambda rows: cpu_matmul.dense(rows, w),
    ):
        whole = product(x)
        for first in range(0, 45, 4):
            for count in (1, 2, 3, 5, 8, 9, 13, 17):
                assert product(x[first : first + count]).equal(whole[first : first + count])


def test_rows_of_a_larger_tensor_and_none_at_all() -> None:
    codes, scales, zeros = weight(32, 64, 4, 32)
    packed, wide = cpu_matmul.pack(codes, scales, zeros), random(6, 200)
    x = wide[:, 70:134]
    assert cpu_matmul.linear(x, packed).equal(cpu_matmul.linear(x.contiguous(), packed))
    assert cpu_matmul.dense(x, random(8, 64)).equal(cpu_matmul.dense(x.contiguous(), random(8, 64)))
    assert cpu_matmul.linear(x[:0], packed).shape == (0, 32)


def test_what_is_not_supported_is_said() -> None:
    assert "8 bits" in cpu_matmul.unsupported(8, 64, 128, torch.bfloat16)
    assert "float32" in cpu_matmul.unsupported(4, 64, 128, torch.float32)
    assert "groups of 12" in cpu_matmul.unsupported(4, 12, 144, torch.bfloat16)
    assert (
        cpu_matmul.unsupported(4, PER_CHANNEL, 40, torch.bfloat16)
        == cpu_matmul.unsupported(2, 8, 16, torch.bfloat16)
        == ""
    )
