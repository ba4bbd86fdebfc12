"""Grids and round-to-nearest, against literals, brute force over all codes, and properties."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.quant.grid import Grid, GridRules, decode, encode, find_grid, group_loss, grouped
from quantflow.quant.numbers.integer import IntegerTensor, quantize_rtn
from quantflow.quant.scheme import PER_CHANNEL, Scheme

FLOAT32 = GridRules()
HALF = GridRules((torch.float16,))
BRAIN = GridRules((torch.bfloat16,))
BOTH = GridRules((torch.float16, torch.bfloat16))
OTHER_BOTH = GridRules((torch.bfloat16, torch.float16))
RULES = (FLOAT32, HALF, BRAIN, BOTH, OTHER_BOTH)
V1 = GridRules((torch.float16,), min_zero=1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_valid(tensor: IntegerTensor, rules: GridRules) -> None:
    """What every format relies on, whatever the weight was."""
    scheme, (n, k) = tensor.scheme, tensor.shape
    groups = k // (k if scheme.group_size == PER_CHANNEL else scheme.group_size)
    assert (
        tensor.codes.dtype == torch.uint8
        and tensor.zeros.dtype == torch.uint8
        and tensor.scales.dtype == rules.scale_dtypes[0]
    )
    assert tensor.scales.shape == tensor.zeros.shape == (n, groups)
    assert int(tensor.codes.max()) <= 2**scheme.bits - 1
    assert (
        int(tensor.zeros.min()) >= rules.min_zero and int(tensor.zeros.max()) <= 2**scheme.bits - 1
    )
    if scheme.symmetric:
        assert tensor.zeros.eq(2 ** (scheme.bits - 1)).all()
    assert tensor.scales.isfinite().all() and (tensor.scales > 0).all()
    for dtype in rules.scale_dtypes:
        assert torch.equal(tensor.scales.to(dtype).double(), tensor.scales.double()), (
            f"a scale is not exact in {dtype}"
        )
    assert tensor.dequantize().isfinite().all()


def assert_nearest(tensor: IntegerTensor, weight: torch.Tensor) -> None:
    """Every code is as near as any other code of its grid, by trying them all in float64."""
    group = weight.shape[1] // tensor.scales.shape[1]
    scales, zeros = (
        t.double().repeat_interleave(group, 1)[..., None] for t in (tensor.scales, tensor.zeros)
    )
    choices = (torch.arange(2**tensor.scheme.bits).double() - zeros) * scales  # [N, K, codes]
    distance = (choices - weight.double()[..., None]).abs()
    chosen = distance.gather(-1, tensor.codes.long()[..., None])
    # Ties, and values that float32 cannot tell from one.
    assert (chosen[..., 0] <= distance.amin(-1) + scales[..., 0] * 2**-14).all()


def test_asymmetric_by_hand() -> None:
    # Range -3 .. 4.5: scale 7.5 / 15 = 0.5, zero point 6. Halves go to even: 0.25 / 0.5 + 6 = 6.5
    # is code 6, 0.75 is 7.5 is code 8.
    weight = torch.tensor([[-3.0, 4.5, 0.0, 1.0, 0.25, 0.75, -0.2, 4.4]])
    tensor = quantize_rtn(weight, Scheme(4, 8, False), FLOAT32)
    assert (tensor.scales.tolist(), tensor.zeros.tolist()) == ([[0.5]], [[6]])
    assert tensor.codes.tolist() == [[0, 15, 6, 8, 6, 8, 6, 15]]
    assert tensor.dequantize().tolist() == [[-3.0, 4.5, 0.0, 1.0, 0.0, 1.0, 0.0, 4.5]]


def test_symmetric_by_hand() -> None:
    # absmax 7.5: scale 2 * 7.5 / 15 = 1, zero point 8; +7.5 rounds to 8 + 8 = 16 and is clamped to
    # 15.
    weight = torch.tensor([[-7.5, 7.5, 0.0, 1.2, -1.2, 2.5, -3.5, 6.9]])
    tensor = quantize_rtn(weight, Scheme(4, 8, True), FLOAT32)
    assert (tensor.scales.tolist(), tensor.zeros.tolist()) == ([[1.0]], [[8]])
    assert tensor.codes.tolist() == [[0, 15, 8, 9, 7, 10, 4, 15]]


@pytest.mark.parametrize(
    ("bits", "scale", "zero", "codes"),
    [(2, 1.0, 1, [0, 3, 1, 2]), (3, 3 / 7, 2, [0, 7, 2, 4]), (8, 3 / 255, 85, [0, 255, 85, 170])],
)
def test_other_widths_by_hand(bits: int, scale: float, zero: int, codes: list[int]) -> None:
    tensor = quantize_rtn(torch.tensor([[-1.0, 2.0, 0.0, 1.0]]), Scheme(bits, 4, False), FLOAT32)
    assert tensor.zeros.tolist() == [[zero]] and tensor.codes.tolist() == [codes]
    torch.testing.assert_close(tensor.scales, torch.tensor([[scale]]))


def test_groups_and_rows_have_their_own_grids() -> None:
    weight = torch.tensor([[0.0, 15.0, -15.0, 0.0], [0.0, 30.0, -7.5, 7.5]])
    tensor = quantize_rtn(weight, Scheme(4, 2, False), FLOAT32)
    assert tensor.scales.tolist() == [[1.0, 1.0], [2.0, 1.0]]
    assert tensor.zeros.tolist() == [[0, 15], [0, 8]]  # 7.5 goes to even
    assert tensor.codes.tolist() == [[0, 15, 0, 15], [0, 15, 0, 15]]
    channel = quantize_rtn(weight, Scheme(4, PER_CHANNEL, False), FLOAT32)
    assert channel.scales.tolist() == [[2.0], [2.5]] and channel.zeros.tolist() == [[8], [3]]


schemes = st.builds(
    Scheme, st.sampled_from((2, 3, 4, 8)), st.sampled_from((PER_CHANNEL, 4, 8)), st.booleans()
)


@settings(deadline=None, max_examples=80)
@given(
    schemes, st.sampled_from((*RULES, V1)), st.integers(0, 10**6), st.floats(-6, 3), st.booleans()
)
def test_codes_are_the_nearest_of_a_valid_grid(
    scheme: Scheme, rules: GridRules, seed: int, magnitude: float, search: bool
) -> None:
    weight = random(3, 16, seed=seed) * 10**magnitude
    weight[0, :8] = 0
    weight[1, 8:] = weight[1, 8:].abs()
    tensor = quantize_rtn(weight, scheme, rules, search=search)
    assert_valid(tensor, rules)
    assert_nearest(tensor, weight)
    assert tensor.dequantize()[0, :8].eq(0).all()


@settings(deadline=None, max_examples=50)
@given(schemes, st.sampled_from(RULES), st.integers(0, 10**6))
def test_the_grid_spans_the_weight(scheme: Scheme, rules: GridRules, seed: int) -> None:
    weight = random(4, 16, seed=seed)
    tensor = quantize_rtn(weight, scheme, rules)
    error = (tensor.dequantize() - weight).abs()
    half = tensor.scales.float().repeat_interleave(16 // tensor.scales.shape[1], 1) / 2
    coarse = max(torch.finfo(d).eps for d in rules.scale_dtypes)
    # Ends that may be cut off: symmetric, the positive one is half a step short; asymmetric, the
    # zero point is rounded and moves both by up to half a step. A scale that was rounded down cuts
    # off a little more.
    slack = half * (1 + 2**scheme.bits * coarse)
    assert (error <= half + slack).all()
    inside = (tensor.codes > 0) & (tensor.codes < scheme.levels)
    assert (error <= half * (1 + 1e-4))[inside].all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_is_exact(bits: int, symmetric: bool) -> None:
    weight = random(8, 64) + 5
    weight[:, ::3] = 0
    for rules in (*RULES, V1):
        for search in (True, False):
            tensor = quantize_rtn(weight, Scheme(bits, 16, symmetric), rules, search=search)
            assert tensor.dequantize()[:, ::3].eq(0).all()


@pytest.mark.parametrize(
    "value",
    [0.0, 1.0, -1.0, 0.37, -2.5e-8, 3e-8, 6e-8, 1e-10, 1e-38, 1e-45, 7e4, -1e6, 1e30, 3e38, -3e38],
)
@pytest.mark.parametrize("rules", [*RULES, V1], ids=str)
def test_degenerate_groups(value: float, rules: GridRules) -> None:
    """A constant group, next to one of mixed signs, one with a single outlier and an empty one, at
    every magnitude."""
    constant = torch.full((8,), value)
    outlier = torch.zeros(8)
    outlier[3] = value
    weight = torch.stack(
        [constant, constant * torch.tensor([1.0, -1.0] * 4), outlier, torch.zeros(8)]
    )
    within = max(float(torch.finfo(d).tiny) for d in rules.scale_dtypes) * 1e3 <= abs(value) <= 6e4
    for bits, symmetric, search in product((2, 4, 8), (True, False), (True, False)):
        tensor = quantize_rtn(weight, Scheme(bits, 8, symmetric), rules, search=search)
        assert_valid(tensor, rules)
        assert tensor.dequantize()[3].eq(0).all()
        if within and not symmetric:
            torch.testing.assert_close(tensor.dequantize()[0], constant, rtol=0.01, atol=0)


def test_float16_scales_do_not_flush_to_zero() -> None:
    # The scale would be 1.3e-9: float16's smallest number is 6e-8.
    weight = torch.linspace(-1e-8, 1e-8, 16)[None]
    tensor = quantize_rtn(weight, Scheme(4, 16, False), HALF)
    assert float(tensor.scales) == 2.0**-24
    assert tensor.dequantize().eq(0).all()


def test_float16_scales_do_not_overflow() -> None:
    tensor = quantize_rtn(torch.tensor([[-4e6, 4e6, 0.0, 1.0]]), Scheme(4, 4, False), HALF)
    assert float(tensor.scales) == 65504.0 and tensor.dequantize()[0, 2:].tolist() == [0.0, 0.0]


def test_no_zero_point_of_zero_for_gptq_v1() -> None:
    weight = torch.tensor(
        [[0.0, 1.0, 7.0, 14.0], [1.0, 2.0, 3.0, 14.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 14.0]]
    )
    tensor = quantize_rtn(weight, Scheme(4, 4, False), V1)
    assert tensor.zeros.tolist() == [[1], [1], [1], [1]] and tensor.scales.tolist() == [
        [1.0],
        [1.0],
        [1.0],
        [1.0],
    ]
    assert torch.equal(tensor.dequantize(), weight)  # the lost code costs range, not correctness
    assert quantize_rtn(weight, Scheme(4, 4, False), HALF).zeros.tolist() == [[0], [0], [0], [1]]


@settings(deadline=None, max_examples=300)
@given(
    st.floats(0, 2.0**127) | st.floats(1e-8, 1e-4) | st.floats(6e4, 7e4) | st.floats(1e-42, 1e-36),
    st.sampled_from((*RULES, GridRules((torch.float32, torch.float16, torch.bfloat16)))),
)
def test_rounded_scales_are_exact_positive_and_stay(scale: float, rules: GridRules) -> None:
    rounded = rules.round_scale(torch.tensor([scale]))
    assert rounded.dtype == torch.float32 and rounded.isfinite().all() and (rounded > 0).all()
    for dtype in rules.scale_dtypes:
        assert torch.equal(rounded.to(dtype).float(), rounded), (
            f"{float(rounded)} is not exact in {dtype}"
        )
    assert torch.equal(rules.round_scale(rounded), rounded)
    if 1e-4 < scale < 6e4:
        assert abs(float(rounded) - scale) <= scale * max(
            torch.finfo(d).eps for d in rules.scale_dtypes
        )


def test_round_scale_by_hand() -> None:
    # 1 + 2^-8 lies between the bfloat16 numbers 1 and 1 + 2^-7, and goes to even.
    assert float(BRAIN.round_scale(torch.tensor(1 + 2.0**-8))) == 1.0
    assert float(HALF.round_scale(torch.tensor(1 + 2.0**-8))) == 1 + 2.0**-8
    # In float16 below 2^-14 numbers are multiples of 2^-24.
    assert float(BOTH.round_scale(torch.tensor(2.6 * 2.0**-24))) == 3 * 2.0**-24
    # The largest number that both hold is 255 * 2^8.
    assert float(BOTH.round_scale(torch.tensor(1e6))) == 65280.0


@settings(deadline=None, max_examples=40)
@given(
    schemes,
    st.sampled_from((*RULES, V1)),
    st.integers(0, 10**6),
    st.sampled_from(("squares", "channels", "blocks")),
    st.booleans(),
)
def test_a_search_is_never_worse_in_its_own_loss(
    scheme: Scheme, rules: GridRules, seed: int, kind: str, outlier: bool
) -> None:
    weight = random(3, 16, seed=seed)
    if outlier:
        weight[:, 5] *= 20
    group = scheme.group_of(16)
    importance = None
    if kind == "channels":
        importance = random(16 // group, group, seed=seed + 1).square()
    elif kind == "blocks":
        x = random(16 // group, 32, group, seed=seed + 1)
        importance = x.transpose(1, 2) @ x

    def loss(grid: Grid) -> torch.Tensor:
        # The ends of a symmetric range lie halfway between two codes: which one, only float32 says.
        codes = encode(weight.view(3, -1, group), grid, scheme).double()
        scales, zeros = grid.scales.double()[..., None], grid.zeros.double()[..., None]
        error = (codes - zeros) * scales - weight.double().view(3, -1, group)
        if importance is None:
            return error.square().sum(-1)
        if kind == "channels":
            return (error.square() * importance.double()).sum(-1)
        return torch.einsum("ngi,gij,ngj->ng", error, importance.double(), error)

    plain = loss(find_grid(weight, scheme, rules))
    found = loss(find_grid(weight, scheme, rules, search=True, importance=importance))
    assert (found <= plain * (1 + 1e-3) + 1e-9).all()


def test_a_search_cuts_off_an_outlier() -> None:
    weight = random(16, 256)
    weight[:, 0] = 6
    for symmetric in (True, False):
        scheme = Scheme(3, 256, symmetric)
        plain, found = (
            float(
                (quantize_rtn(weight, scheme, HALF, search=s).dequantize() - weight).square().sum()
            )
            for s in (False, True)
        )
        assert found < 0.8 * plain
    # And keeps it where that channel matters.
    importance = torch.ones(1, 256)
    importance[0, 0] = 1e4
    kept = quantize_rtn(
        weight, Scheme(3, 256, False), HALF, search=True, importance=importance
    ).dequantize()
    assert (kept[:, 0] - 6).abs().max() < 0.3


def test_a_search_survives_a_loss_that_is_not_finite() -> None:
    weight = random(2, 8)
    for bad in (float("nan"), float("inf")):
        tensor = quantize_rtn(
            weight, Scheme(4, 4, False), HALF, search=True, importance=torch.full((2, 4, 4), bad)
        )
        assert_valid(tensor, HALF)
        assert_nearest(tensor, weight)


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("scheme", [Scheme(4, 8, False), Scheme(4, PER_CHANNEL, True)], ids=str)
def test_rows_are_independent(scheme: Scheme, search: bool) -> None:
    weight = random(11, 24)
    x = random(24 // scheme.group_of(24), 40, scheme.group_of(24), seed=1)
    importance = x.transpose(1, 2) @ x
    whole = quantize_rtn(weight, scheme, HALF, search=search, importance=importance, rows=11)
    for rows in (1, 2, 5, 100, 0):
        part = quantize_rtn(weight, scheme, HALF, search=search, importance=importance, rows=rows)
        assert (
            torch.equal(part.zeros, whole.zeros)
            and torch.equal(part.scales, whole.scales)
            and torch.equal(part.codes, whole.codes)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_are_rounded_in_float32(dtype: torch.dtype) -> None:
    weight = random(6, 32).to(dtype)
    a, b = (
        quantize_rtn(w, Scheme(4, 8, False), HALF, search=True) for w in (weight, weight.float())
    )
    assert (
        torch.equal(a.codes, b.codes)
        and torch.equal(a.scales, b.scales)
        and torch.equal(a.zeros, b.zeros)
    )


@settings(deadline=None, max_examples=40)
@given(schemes, st.integers(0, 10**6))
def test_what_was_quantised_once_stays(scheme: Scheme, seed: int) -> None:
    # The same codes on the same grid; find_grid may choose another, whose range the used codes
    # span.
    tensor = quantize_rtn(random(3, 16, seed=seed), scheme, HALF)
    grid = Grid(tensor.scales.float(), tensor.zeros.float())
    again = encode(grouped(tensor.dequantize(), scheme), grid, scheme)
    assert torch.equal(again.view(3, 16).to(torch.uint8), tensor.codes)
    assert torch.equal(decode(again.clone(), grid).view(3, 16), tensor.dequantize())


def test_group_loss_by_hand() -> None:
    error = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    assert group_loss(error, None).tolist() == [[5.0, 10.0]]
    assert group_loss(error, torch.tensor([[2.0, 1.0], [1.0, 3.0]])).tolist() == [[6.0, 12.0]]
    blocks = torch.tensor([[[2.0, 1.0], [1.0, 3.0]], [[1.0, 0.5], [0.5, 1.0]]])
    assert group_loss(error, blocks).tolist() == [[2 + 2 * 2 + 3 * 4.0, 9 - 2 * 0.5 * 3 + 1.0]]
