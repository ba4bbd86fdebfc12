"""NF4 and its nested scales, by hand, by brute force, and bit for bit as bitsandbytes computes them
on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantflow.quant.numbers.nf4 import (
    NF4,
    NestedScales,
    Nf4Tensor,
    dynamic_table,
    nest_scales,
    quantize_nf4,
)
from quantflow.quant.scheme import Scheme

PLAIN, DOUBLE = Scheme(4, 64, True, "nf4"), Scheme(4, 64, True, "nf4", double=True)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TABLE = torch.tensor(NF4)


@pytest.fixture(scope="module")
def theirs() -> Any:
    """bitsandbytes' functions."""
    return pytest.importorskip("bitsandbytes").functional


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether they are equal, dtype, signs of zeros and NaN included."""
    integer = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def packed(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the high nibble, by a loop."""
    flat = codes.flatten().tolist()
    return torch.tensor(
        [[flat[i] * 16 + flat[i + 1]] for i in range(0, len(flat), 2)], dtype=torch.uint8
    )


# The tables


def test_the_table() -> None:
    assert len(NF4) == 16 and list(NF4) == sorted(set(NF4))
    assert (NF4[0], NF4[7], NF4[15]) == (-1.0, 0.0, 1.0)
    assert TABLE.double().tolist() == list(NF4)  # float32 holds them
    # QLoRA, equation 4: quantiles of the normal distribution, 8 of the negative half and 9 of the
    # positive, which share the zero.
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    positive = normal.icdf(torch.linspace(0.5, offset, 9))
    quantiles = torch.cat([negative, positive])
    torch.testing.assert_close(quantiles / quantiles.max(), TABLE, rtol=0, atol=1e-5)


def test_the_dynamic_table() -> None:
    table = dynamic_table()
    assert table.shape == (256,) and table.dtype == torch.float32
    assert (table[1:] > table[:-1]).all() and float(table[127]) == 0 and float(table[255]) == 1
    assert torch.equal(table[:127], -table[128:255].flip(0))  # all but the 1 have their negative
    # the middle of the last of 64 steps from 0.1 to 1
    assert float(table[254]) == pytest.approx(1 - 0.9 / 128, abs=1e-7)
    # one step of 1e-7..1e-6, the first of two of 1e-6..1e-5
    assert table[128:130].tolist() == pytest.approx([0.55e-6, 0.325e-5])


def test_the_tables_are_bitsandbytes_own(theirs: Any) -> None:
    assert same_bits(dynamic_table(), theirs.create_dynamic_map())
    assert same_bits(TABLE, theirs.get_4bit_type("nf4", device="cpu"))


# By hand, and by brute force


def test_by_hand() -> None:
    # The largest magnitude is 2: shares -1, 0, 0.5, 1 and 0.04, which is nearer to 0.0796 than to
    # 0; 0.03 is not.
    weight = torch.zeros(1, 64)
    weight[0, :6] = torch.tensor([-2.0, 0.0, 1.0, 2.0, 0.08, 0.06])
    tensor = quantize_nf4(weight, PLAIN)
    assert tensor.codes[0, :6].tolist() == [0, 7, 12, 15, 8, 7] and tensor.codes[0, 6:].eq(7).all()
    assert tensor.scales.tolist() == [[2.0]] and tensor.nested is None
    assert tensor.dequantize()[0, :6].tolist() == [-2.0, 0.0, 2 * NF4[12], 2.0, 2 * NF4[8], 0.0]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.floats(-36, 36),
    st.sampled_from((32, 64, 128)),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_codes_are_the_nearest(
    seed: int, magnitude: float, block: int, outlier: bool, dtype: torch.dtype
) -> None:
    weight = random(3, 256, seed=seed) * 10**magnitude
    if outlier:
        weight[1, 5] *= 100
    weight = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    tensor = quantize_nf4(weight, Scheme(4, block, True, "nf4"))
    assert tensor.codes.dtype == torch.uint8 and tensor.scales.dtype == torch.float32
    parts = weight.double().view(3, -1, block)
    assert torch.equal(tensor.scales.double(), parts.abs().amax(-1))
    # of every code
    distance = (TABLE.double() * tensor.scales.double()[..., None, None] - parts[..., None]).abs()
    chosen = distance.gather(-1, tensor.codes.long().view(3, -1, block, 1))[..., 0]
    assert (chosen <= distance.amin(-1) + tensor.scales[..., None].double() * 2**-22).all()
    assert torch.equal(
        tensor.dequantize(torch.float64).view_as(parts),
        TABLE.double()[tensor.codes.long()].view_as(parts) * tensor.scales.double()[..., None],
    )


def test_zeros_stay_zeros() -> None:
    weight = random(4, 256)
    weight[0], weight[:, ::3], weight[2, 64:128] = 0, 0, 0
    for scheme in (PLAIN, DOUBLE):
        tensor = quantize_nf4(weight, scheme)
        assert tensor.dequantize()[weight == 0].eq(0).all() and tensor.codes.max() <= 15
    for scheme in (PLAIN, DOUBLE):
        assert quantize_nf4(torch.zeros(2, 128), scheme).dequantize().eq(0).all()


def test_nested_scales_by_hand() -> None:
    # Mean 1: what is left is -1, 0 and 1 a block of 256, of which the largest magnitude is 1. -1 is
    # not in the table.
    scales = torch.ones(256)
    scales[:2] = torch.tensor([0.0, 2.0])
    nested = nest_scales(scales.view(4, 64))
    assert nested.offset == 1.0 and nested.absmax.tolist() == [1.0]
    assert nested.codes[:3].tolist() == [0, 255, 127] and nested.codes[2:].eq(127).all()
    found = nested.scales()
    assert found[1:].tolist() == scales[1:].tolist() and float(found[0]) == pytest.approx(
        0.9 / 128, abs=1e-7
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 700), st.integers(0, 10**6), st.floats(-20, 20))
def test_nested_codes_are_the_nearest(count: int, seed: int, magnitude: float) -> None:
    scales = random(count, seed=seed).abs() * 10**magnitude
    nested = nest_scales(scales)
    assert (
        nested.codes.shape == (count,)
        and nested.codes.dtype == torch.uint8
        and nested.absmax.shape == (-(-count // 256),)
    )
    assert (
        nested.absmax.dtype == nested.table.dtype == torch.float32 and nested.codes.is_contiguous()
    )
    rest = scales - torch.tensor(nested.offset)
    each = nested.absmax.repeat_interleave(256)[:count].double()
    distance = (nested.table.double() * each[:, None] - rest.double()[:, None]).abs()
    chosen = distance.gather(-1, nested.codes.long()[:, None])[:, 0]
    assert (chosen <= distance.amin(-1) + each * 2**-22).all()
    # half the widest step
    assert (
        nested.scales().double() - scales.double()
    ).abs().max() <= each.max() * 0.008 + scales.max() * 2**-22


def test_one_scale_and_equal_scales_are_kept() -> None:
    """What is left is then 0, and so is its largest magnitude."""
    for scales in (torch.tensor([0.3]), torch.full((600,), 0.7), torch.zeros(5)):
        nested = nest_scales(scales)
        torch.testing.assert_close(nested.scales(), scales, rtol=1e-6, atol=0)


# As bitsandbytes computes it


def weights_of_all_kinds(dtype: torch.dtype, block: int) -> Tensor:
    """`[24, 4 * block]`: ordinary blocks, outliers, zeros, tiny and huge numbers, and ties of every
    two neighbours in the table."""
    weight = random(24, 4 * block, seed=block) * 0.02
    weight[0] = 0
    weight[1, block : 2 * block] = 0
    weight[2, ::7] *= 1000
    weight[3:5] *= 1e-5
    weight[5:7] = random(2, 4 * block, seed=1).sign() * 0.25  # all at the ends
    ties = (TABLE[:-1] + TABLE[1:]) / 2
    weight[7, :15], weight[7, 15], weight[7, 16:31] = (
        ties,
        1.0,
        torch.nextafter(ties, torch.ones(15)),
    )
    info = torch.finfo(dtype)
    weight[8:12] *= info.max / weight[8:12].abs().amax(-1, keepdim=True)
    weight[12] = random(4 * block, seed=2).sign() * info.max
    for row, size in enumerate(
        (info.tiny, info.tiny * info.eps, info.tiny * info.eps * 8, 1e-38, 2e-38, 5e-39), 13
    ):
        weight[row] = random(4 * block, seed=row).double().mul(size).float()
    return weight.to(dtype)


@pytest.mark.parametrize("block", [32, 64, 128, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_weights_are_bitsandbytes_own(
    theirs: Any, dtype: torch.dtype, block: int
) -> None:
    weight = weights_of_all_kinds(dtype, block)
    stored, state = theirs.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    tensor = quantize_nf4(weight, Scheme(4, block, True, "nf4"))
    assert torch.equal(packed(tensor.codes), stored)
    assert same_bits(tensor.scales.flatten(), state.absmax)
    ours, found = tensor.dequantize(dtype), theirs.dequantize_4bit(stored, state)
    # some CPUs' conversion makes them zeros
    subnormal = ours.abs() < (torch.finfo(dtype).tiny if dtype == torch.bfloat16 else 0)
    assert (
        same_bits(ours[~subnormal], found[~subnormal])
        and (found[subnormal].eq(0) | found[subnormal].eq(ours[subnormal])).all()
    )
    state.dtype = torch.float32
    assert same_bits(tensor.dequantize(), theirs.dequantize_4bit(stored, state))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_double_quantisation_is_bitsandbytes_own(
    theirs: Any, dtype: torch.dtype, seed: int
) -> None:
    """Offset, largest magnitudes and what codes stand for are the same bit for bit. Of the codes
    themselves, theirs on the CPU are the nearest of the shares that a table of 2^16 tells apart,
    and ours the nearest."""
    weight = (
        random(64 + 8 * seed, 1024, seed=seed)
        * 0.02
        * 10 ** random(64 + 8 * seed, 1, seed=seed + 9)
    )
    weight[0, 64:256] = 0
    weight = weight.to(dtype)
    stored, state = theirs.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    tensor = quantize_nf4(weight, DOUBLE)
    nested = tensor.nested
    # chosen before the scales were quantised
    assert nested is not None and torch.equal(packed(tensor.codes), stored)
    assert nested.offset == float(state.offset) and same_bits(nested.absmax, state.state2.absmax)
    assert same_bits(nested.table, state.state2.code)

    given_theirs = NestedScales(state.absmax, nested.absmax, nested.table, nested.offset)
    scales = given_theirs.scales().view_as(tensor.scales)
    assert same_bits(
        Nf4Tensor(DOUBLE, tensor.codes, scales, given_theirs).dequantize(dtype),
        theirs.dequantize_4bit(stored, state),
    )
    state.absmax = nested.codes
    assert same_bits(tensor.dequantize(dtype), theirs.dequantize_4bit(stored, state))

    plain = quantize_nf4(weight, PLAIN).scales.flatten()
    shares = (plain - torch.tensor(nested.offset)).double() / nested.absmax.repeat_interleave(256)[
        : len(plain)
    ].double()
    ours, other = (
        (nested.table[codes.long()].double() - shares).abs()
        for codes in (nested.codes, given_theirs.codes)
    )
    assert (ours <= other + 2**-22).all() and (other <= ours + 2 / 65535 + 2**-22).all()
    assert (nested.codes != given_theirs.codes).double().mean() < 0.01


def test_nested_codes_of_a_table_of_shares(theirs: Any) -> None:
    """The rule that bitsandbytes' CPU kernel follows, whole: it is why its codes are not always the
    nearest."""
    rest = random(4096).clamp(-3, 3)
    found, state = theirs.quantize_blockwise(rest, blocksize=256)
    shares = rest.view(-1, 256) * (1 / state.absmax)[:, None]
    places = ((shares.clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5).int().double() * 2 / 65535 - 1
    table = dynamic_table().double()
    distance = (places[..., None] - table).abs()
    chosen = distance.gather(-1, found.view(-1, 256, 1).long())[..., 0]
    assert (chosen <= distance.amin(-1) + 1e-6).all()
