"""The kernels' layout: a round trip, its documented order, its size, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from quantflow_kernels import layout
from quantflow_kernels.layout import PER_CHANNEL, pack, unpack_codes


def weight(
    n: int, k: int, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(bits * 1000 + k)
    groups = 1 if group == PER_CHANNEL else k // group
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    return (
        codes,
        torch.rand(n, groups, generator=generator),
        torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator),
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(1, 32, 32), (5, 96, 32), (3, 64, 64), (7, 640, 128), (2, 100, PER_CHANNEL), (4, 2048, 1024)],
)
def test_round_trip(bits: int, n: int, k: int, group: int) -> None:
    codes, scales, zeros = weight(n, k, bits, group)
    packed = pack(codes, scales, zeros, group, bits)
    assert unpack_codes(packed).equal(codes)
    assert packed.scales.equal(scales.T) and packed.zeros.equal(zeros.T)
    assert (packed.out_features, packed.in_features, packed.group_size) == (
        n,
        k,
        k if group == PER_CHANNEL else group,
    )


def test_order_of_four_bits() -> None:
    """Word i of a row holds channels i, 64 + i, 128 + i and 192 + i, the first in its lowest
    bits."""
    codes = (torch.arange(256) % 13).to(torch.uint8)[None]
    packed = pack(codes, torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.uint8), 128, 4)
    assert packed.words.shape == (1, 1, 64)
    for i in (0, 1, 63):
        expected = sum(int(codes[0, 64 * j + i]) << (4 * j) for j in range(4))
        assert int(packed.words[0, 0, i]) & 0xFFFF == expected


@pytest.mark.parametrize(("bits", "words_bytes"), [(2, 2 / 8), (3, 3 / 8), (4, 4 / 8), (8, 1)])
def test_no_bit_is_wasted(bits: int, words_bytes: float) -> None:
    codes, scales, zeros = weight(16, 1024, bits, 128)
    assert pack(codes, scales, zeros, 128, bits).nbytes == 16 * 1024 * words_bytes + 16 * 8 * (
        4 + 1
    )


@pytest.mark.parametrize(
    ("bits", "group", "k", "said"),
    [
        (5, 32, 64, "5 bits"),
        (4, 16, 64, "group size 16"),
        (4, 48, 96, "group size 48"),
        (4, 64, 96, "no multiple"),
        (4, 43, 172, "group size 43"),
    ],
)
def test_refused(bits: int, group: int, k: int, said: str) -> None:
    assert said in layout.unsupported(bits, group, k)
    codes = torch.zeros(2, k, dtype=torch.uint8)
    with pytest.raises(ValueError, match=said):
        pack(codes, torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.uint8), group, bits)


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not go with"):
        pack(
            torch.zeros(2, 64, dtype=torch.uint8),
            torch.ones(2, 1),
            torch.zeros(2, 1, dtype=torch.uint8),
            32,
            4,
        )
