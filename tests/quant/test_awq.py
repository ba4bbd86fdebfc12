"""AWQ's mathematics against hand computations and loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.quant.awq import MAX_SCALE, candidates, linear_loss, rounded, weight_profile
from quantflow.quant.grid import GridRules
from quantflow.quant.numbers.integer import quantize_rtn
from quantflow.quant.scheme import PER_CHANNEL, Scheme

RULES = GridRules((torch.float16,))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_candidates_by_hand() -> None:
    found = dict(candidates(torch.tensor([16.0, 1.0, 4.0]), torch.tensor([0.25, 1.0, 0.25]), 2))
    expected = {
        "identity": [1.0, 1.0, 1.0],
        "a^0 w^-1": [2.0, 0.5, 2.0],  # 1/w = 4, 1, 4, over sqrt(4 * 1)
        "a^0.5": [2.0, 0.5, 1.0],  # 4, 1, 2, over 2
        # 4 / 0.5, 1, 2 / 0.5
        "a^0.5 w^-0.5": [8 / math.sqrt(8), 1 / math.sqrt(8), 4 / math.sqrt(8)],
        "a^1": [4.0, 0.25, 1.0],
    }
    assert list(found) == list(expected)
    for name, scale in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(scale))


@pytest.mark.parametrize("grid", [1, 3, 20])
def test_candidates_include_the_ends_and_the_identity_and_none_twice(grid: int) -> None:
    activation, weight = random(16).abs() + 0.01, random(16, seed=1).abs() + 0.01
    found = list(candidates(activation, weight, grid))
    names = [name for name, _ in found]
    assert names[0] == "identity" and found[0][1].eq(1).all()
    assert "a^1" in names and "a^0 w^-1" in names and len(names) == len(set(names)) == 2 * grid + 1
    for i, (_, a) in enumerate(found):
        for _, b in found[:i]:
            assert not torch.allclose(a, b)
    a_one = dict(found)["a^1"]
    torch.testing.assert_close(a_one / a_one[0], activation / activation[0])


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 9999),
    st.sampled_from((0.0, 1e-30, 1e-6, 1.0, 1e4, 1e30)),
    st.lists(st.integers(0, 7), max_size=8),
)
def test_scales_are_always_usable(seed: int, size: float, dead: list[int]) -> None:
    activation, weight = (
        random(8, seed=seed).abs() * torch.tensor([size] * 4 + [1.0] * 4),
        random(8, seed=seed + 1).abs(),
    )
    activation[dead[::2]] = 0
    weight[dead[1::2]] = 0
    for name, scale in candidates(activation, weight, 4):
        assert (
            scale.isfinite().all() and (scale >= 1 / MAX_SCALE).all() and (scale <= MAX_SCALE).all()
        ), name
        assert scale[dead].eq(1).all(), name


def test_only_the_identity_where_all_is_dead() -> None:
    assert [name for name, _ in candidates(torch.zeros(4), torch.ones(4), 20)] == ["identity"]


def test_weight_profile_by_hand() -> None:
    a = torch.tensor([[1.0, -4.0, 0.0, 0.0], [2.0, 2.0, -8.0, 4.0]])
    b = torch.tensor([[-1.0, 0.5, 3.0, 3.0]])
    # Relative to the largest of its pair: [1/4, 1, 0, 0], [1, 1, 1, 1/2], [1, 1/2, 1, 1].
    torch.testing.assert_close(
        weight_profile([a, b], Scheme(4, 2, False)), torch.tensor([2.25, 2.5, 2.0, 1.5]) / 3
    )
    torch.testing.assert_close(
        weight_profile([b], Scheme(4, PER_CHANNEL, False)), torch.tensor([1 / 3, 1 / 6, 1.0, 1.0])
    )
    assert weight_profile([torch.zeros(2, 4)], Scheme(4, 2, False)).tolist() == [0.0] * 4


@pytest.mark.parametrize("scheme", [Scheme(4, 8, False), Scheme(3, PER_CHANNEL, True)], ids=str)
def test_rounded_is_what_a_scaled_linear_computes_with(scheme: Scheme) -> None:
    weight, scale, x = random(6, 16), random(16, seed=1).abs() + 0.1, random(5, 16, seed=2)
    tensor = quantize_rtn(weight * scale, scheme, RULES)
    torch.testing.assert_close(
        x @ rounded(weight, scale, scheme, RULES).T,
        (x / scale) @ tensor.dequantize().T,
        rtol=1e-4,
        atol=1e-5,
    )
    assert torch.equal(
        rounded(weight, torch.ones(16), scheme, RULES),
        quantize_rtn(weight, scheme, RULES).dequantize(),
    )


def test_linear_loss_is_that_of_the_output() -> None:
    weight, approximation, x = random(6, 16), random(6, 16, seed=1), random(9, 16, seed=2)
    expected = float(((weight - approximation).double() @ x.double().T).square().sum())
    assert linear_loss(weight, approximation, hessian=x.T @ x) == pytest.approx(expected, rel=1e-4)
    assert linear_loss(weight, approximation, rows=x) == pytest.approx(expected, rel=1e-4)
    assert linear_loss(weight.bfloat16(), weight.bfloat16().float(), hessian=x.T @ x) == 0.0
    assert (
        linear_loss(
            torch.tensor([[1.0, 2.0]]),
            torch.tensor([[0.0, 1.0]]),
            hessian=torch.tensor([[2.0, 1.0], [1.0, 3.0]]),
        )
        == 7.0
    )
