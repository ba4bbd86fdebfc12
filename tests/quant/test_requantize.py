"""Weights put on another grid: exact wherever the source's steps can be kept, never worse than
rounding afresh, never NaN."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantflow.quant.grid import GridRules
from quantflow.quant.numbers import QuantizedTensor
from quantflow.quant.numbers.integer import IntegerTensor, quantize_rtn
from quantflow.quant.numbers.minimum import MinimumTensor
from quantflow.quant.numbers.nf4 import quantize_nf4
from quantflow.quant.requantize import relative_error, requantize
from quantflow.quant.scheme import PER_CHANNEL, Scheme
from tests.formats.helpers import random_tensor

HALF, SINGLE, V1 = GridRules((torch.float16,)), GridRules(), GridRules((torch.float16,), min_zero=1)
NF4, MINIMUM = Scheme(4, 64, True, "nf4"), Scheme(4, 32, False, "minimum")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(tensor: QuantizedTensor, weight: Tensor) -> float:
    """The relative error, in float64."""
    assert tensor.problems("it") == []
    return float((tensor.dequantize().double() - weight.double()).norm() / weight.double().norm())


def moved(
    source: QuantizedTensor, scheme: Scheme, rules: GridRules = HALF
) -> tuple[QuantizedTensor, float]:
    found = requantize(source.dequantize(), source, scheme, rules)
    assert found.scheme == scheme
    return found, error(found, source.dequantize())


# What is exact


@pytest.mark.parametrize(
    ("source", "target", "rules"),
    [
        (Scheme(3, 32, True), Scheme(4, 32, True), HALF),
        (Scheme(2, 32, True), Scheme(3, 32, True), HALF),
        (Scheme(4, 32, False), Scheme(8, 32, True), HALF),  # codes less zeros are within 15 of zero
        (Scheme(4, 128, False), Scheme(4, 32, False), HALF),
        (Scheme(4, PER_CHANNEL, False), Scheme(4, 64, False), HALF),
        # one group a row, as wide as that
        (Scheme(4, 128, True), Scheme(8, PER_CHANNEL, True), HALF),
        (Scheme(3, 128, False), Scheme(4, 32, False), HALF),
        (Scheme(4, 32, True), Scheme(4, 32, False), V1),  # its zero point is 8
        # -8 * scale is an exact float16
        (Scheme(4, 32, True), Scheme(4, 32, True, "minimum"), HALF),
        (Scheme(4, 32, False), Scheme(4, 32, False, "minimum"), SINGLE),
    ],
    ids=lambda value: f"{value}" if isinstance(value, Scheme) else "",
)
def test_steps_that_can_be_kept_are(source: Scheme, target: Scheme, rules: GridRules) -> None:
    for seed in range(5):
        tensor = random_tensor(8, 128, source, seed=seed)
        found, changed = moved(tensor, target, rules)
        assert changed == 0 and torch.equal(found.dequantize(), tensor.dequantize())
        assert relative_error(found, tensor.dequantize()) == 0
        assert found.scales.dtype == rules.scale_dtype


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from((2, 3, 4)),
    st.sampled_from((32, 64, 128, PER_CHANNEL)),
    st.sampled_from((16, 32)),
    st.integers(0, 10**6),
)
def test_symmetric_grids_always_fit_into_wider_and_finer_ones(
    bits: int, group: int, finer: int, seed: int
) -> None:
    tensor = random_tensor(4, 128, Scheme(bits, group, True), seed=seed)
    for wider in (b for b in (2, 3, 4, 8) if b >= bits):
        assert moved(tensor, Scheme(wider, finer, True))[1] == 0


def test_minimums_are_rounded_and_nothing_else() -> None:
    tensor = random_tensor(16, 128, Scheme(4, 32, False), seed=1)
    found, changed = moved(tensor, MINIMUM)
    assert isinstance(found, MinimumTensor)
    exact = -tensor.zeros.float() * tensor.scales.float()
    assert torch.equal(found.scales, tensor.scales) and torch.equal(found.codes, tensor.codes)
    assert torch.equal(found.minimums, exact.half()) and not torch.equal(
        found.minimums.float(), exact
    )
    each = (found.dequantize() - tensor.dequantize()).abs().view(16, 4, 32)
    assert (
        0 < changed < 2**-11
        and (
            each <= (found.minimums.float() - exact).abs()[..., None] + exact.abs().max() * 2**-22
        ).all()
    )


def test_minimums_that_are_zero_points_become_so_again() -> None:
    """There and back: what was rounded are the minimums, which does not move a zero point."""
    tensor = random_tensor(16, 128, Scheme(4, 32, False), seed=2)
    there, _ = moved(tensor, MINIMUM)
    back, changed = moved(there, Scheme(4, 32, False))
    assert isinstance(back, IntegerTensor) and changed < 2**-11
    assert (
        torch.equal(back.codes, tensor.codes)
        and torch.equal(back.zeros, tensor.zeros)
        and torch.equal(back.scales, tensor.scales)
    )


# What is not


schemes = st.builds(
    Scheme, st.sampled_from((2, 3, 4, 8)), st.sampled_from((16, 32, 64)), st.booleans()
)


@settings(deadline=None, max_examples=60)
@given(schemes, schemes, st.integers(0, 10**6), st.booleans(), st.sampled_from((HALF, SINGLE, V1)))
def test_never_worse_than_rounding_afresh(
    source: Scheme, target: Scheme, seed: int, index: bool, rules: GridRules
) -> None:
    """A group index can be kept nowhere: the weight is then rounded as a plain one."""
    tensor = random_tensor(6, 64, source, seed=seed, index=index)
    weight = tensor.dequantize()
    found = requantize(weight, tensor, target, rules)
    afresh = quantize_rtn(weight, target, rules, search=True)
    assert (
        isinstance(found, IntegerTensor)
        and found.group_index is None
        and int(found.zeros.min()) >= rules.min_zero
    )
    assert error(found, weight) <= error(afresh, weight) * (1 + 1e-9)
    if index and source.groups(64) > 1:
        assert torch.equal(found.dequantize(), afresh.dequantize())


def test_a_plain_weight_is_rounded_with_a_range_search() -> None:
    weight = random(8, 128)
    for scheme in (Scheme(4, 32, True), Scheme(3, 64, False)):
        found, expected = (
            requantize(weight, None, scheme, HALF),
            quantize_rtn(weight, scheme, HALF, search=True),
        )
        assert isinstance(found, IntegerTensor)
        assert torch.equal(found.codes, expected.codes) and torch.equal(
            found.scales, expected.scales
        )
    found = requantize(weight, None, MINIMUM, HALF)
    assert isinstance(found, MinimumTensor) and 0.05 < error(found, weight) < 0.1
    nf4 = requantize(weight, None, NF4, HALF)
    assert torch.equal(nf4.dequantize(), quantize_nf4(weight, NF4).dequantize())


def test_groups_that_cross_are_not_kept() -> None:
    """Four scales cannot become one; the eight bits that are there make up for it."""
    tensor = random_tensor(8, 128, Scheme(4, 32, False), seed=4)
    assert 0 < moved(tensor, Scheme(8, 128, False))[1] < 0.02
    assert 0 < moved(random_tensor(8, 96, Scheme(4, 48, False)), Scheme(4, 32, False))[1] < 0.2


def test_nf4_and_four_bits() -> None:
    """About as far apart as either is from the weight: 4 bits of a normal distribution have a
    relative error near 0.09."""
    weight = random(32, 256)
    nf4 = quantize_nf4(weight, NF4)
    for scheme in (Scheme(4, 64, True), Scheme(4, 32, False), replace(MINIMUM, group_size=32)):
        assert 0.02 < moved(nf4, scheme)[1] < 0.12
    assert moved(nf4, Scheme(8, 64, True))[1] < 0.01
    assert moved(quantize_rtn(weight, Scheme(4, 64, True), HALF), NF4)[1] < 0.12
    # NF4 of what is NF4 already keeps every code.
    assert torch.equal(requantize(nf4.dequantize(), nf4, NF4, HALF).dequantize(), nf4.dequantize())


def test_scales_beyond_float16() -> None:
    """The steps are then the nearest that there are: too coarse for what is tiny, too fine for what
    is huge, and always numbers."""
    base = random_tensor(8, 64, Scheme(4, 32, False), seed=5)
    for factor, rules in product((2.0**-40, 2.0**-20, 2.0**30, 2.0**100), (HALF, V1)):
        tensor = replace(base, scales=base.scales.float() * factor)
        for scheme in (Scheme(4, 32, False), Scheme(4, 32, True), Scheme(8, 64, True), MINIMUM):
            found, changed = moved(tensor, scheme, rules)
            assert found.scales.dtype == torch.float16 and changed <= 1.0 + 1e-6, (factor, scheme)
    assert (
        moved(replace(base, scales=base.scales.float() * 2.0**-40), Scheme(4, 32, False), SINGLE)[1]
        == 0
    )


@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 1e-45, -1e-30, 6e-8, 7e4, -1e6, 1e30, 1e38])
def test_degenerate_weights(value: float) -> None:
    """A constant row, one of mixed signs, one with a single outlier and an empty one: valid
    tensors, and zeros that stay zeros."""
    constant, outlier = torch.full((64,), value), torch.zeros(64)
    outlier[3] = value
    weight = torch.stack(
        [constant, constant * torch.tensor([1.0, -1.0] * 32), outlier, torch.zeros(64)]
    )
    sources = [None, quantize_rtn(weight, Scheme(4, 32, False), SINGLE), quantize_nf4(weight, NF4)]
    targets = (
        Scheme(4, 32, False),
        Scheme(4, 32, True),
        Scheme(2, 64, True),
        MINIMUM,
        NF4,
        replace(NF4, double=True),
    )
    for source, target, rules in product(sources, targets, (HALF, SINGLE)):
        found = requantize(weight, source, target, rules)
        assert found.problems("it") == []
        assert found.dequantize().isfinite().all() and found.dequantize()[3].eq(0).all()
        # steps no finer than float16's
        assert relative_error(found, weight) <= 1.0 + 1e-6 or abs(value) < 1e-4


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32, False), Scheme(8, 32, True), MINIMUM, NF4], ids=str
)
def test_zeros(scheme: Scheme) -> None:
    weight = torch.zeros(4, 64)
    source = quantize_rtn(weight, Scheme(4, 64, True), HALF)
    for found in (requantize(weight, None, scheme, HALF), requantize(weight, source, scheme, HALF)):
        assert found.problems("it") == []
        assert found.dequantize().eq(0).all() and relative_error(found, weight) == 0
