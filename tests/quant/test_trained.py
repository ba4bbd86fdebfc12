"""Rounding that is trained: its gradients by hand, by autograd of the formula and by differences in
float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantflow.quant.grid import GridRules
from quantflow.quant.numbers.integer import quantize_rtn
from quantflow.quant.scheme import Scheme
from quantflow.quant.trained import TrainedGrid, rounded

BOTH = GridRules((torch.bfloat16, torch.float16))


def test_by_hand() -> None:
    """Two bits, a step of 0.5 and a zero point of 1. In steps the weights are 0.52, -2 and 6: the
    first rounds to 1, the others lie below and above."""
    weight = torch.tensor([[0.26, -1.0, 3.0]], requires_grad=True)
    scales = torch.tensor([[0.5]], requires_grad=True)
    zeros = torch.tensor([[1.0]], requires_grad=True)
    value = rounded(weight, scales, zeros, 3)
    assert value.tolist() == [[0.5, -0.5, 1.0]]
    value.backward(torch.tensor([[1.0, 10.0, 100.0]]))
    assert weight.grad is not None and scales.grad is not None and zeros.grad is not None
    assert weight.grad.tolist() == [[1, 0, 0]]
    # 1 - 0.52; below, 0 - z = -1; above, 3 - z = 2
    assert scales.grad.item() == pytest.approx((1 - 0.52) * 1 + -1 * 10 + 2 * 100)
    assert zeros.grad.item() == pytest.approx(-0.5 * 110)


def written_out(weight: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Tensor:
    """The formula, with rounding's gradient taken for 1, for autograd."""

    def through(x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()

    scale = scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    zero = through(zeros).repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    return ((through(weight / scale) + zero).clamp(0, levels) - zero) * scale


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 10_000))
def test_as_autograd_has_it(bits: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, k, levels = 4, 8 * groups, 2**bits - 1
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64)
    scales = torch.rand(n, groups, generator=generator, dtype=torch.float64) / 2**bits + 0.05
    zeros = torch.rand(n, groups, generator=generator, dtype=torch.float64) * levels
    upstream = torch.randn(n, k, generator=generator, dtype=torch.float64)
    gradients = []
    for function in (rounded, written_out):
        inputs = [t.clone().requires_grad_() for t in (weight, scales, zeros)]
        value = function(*inputs, levels)
        gradients.append((value, *torch.autograd.grad(value, inputs, upstream)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_differences_outside_the_range() -> None:
    """There the value is a smooth function of scale and zero point, and differences say its
    slope."""
    weight = torch.tensor([[-9.0, 9.0, 9.0, -9.0]], dtype=torch.float64)
    scales = torch.tensor([[0.3, 0.7]], dtype=torch.float64, requires_grad=True)
    zeros = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[1.0, -2.0, 3.0, 5.0]], dtype=torch.float64)

    def loss(scales: Tensor) -> Tensor:
        return (rounded(weight, scales, zeros, 3) * weights).sum()

    (gradient,) = torch.autograd.grad(loss(scales), [scales])
    for group in range(2):
        nudge = torch.zeros_like(scales)
        nudge[0, group] = 1e-6
        slope = (loss(scales + nudge) - loss(scales - nudge)) / 2e-6
        assert gradient[0, group].item() == pytest.approx(slope.item(), rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_stored_is_what_was_trained(bits: int, symmetric: bool) -> None:
    """To the bit, and on scales that the formats hold."""
    torch.manual_seed(bits)
    weight, scheme = torch.randn(16, 64), Scheme(bits, 32, symmetric)
    grid = TrainedGrid.start(weight, quantize_rtn(weight, scheme, BOTH), BOTH)
    with torch.no_grad():
        grid.weight.add_(torch.randn_like(weight) * 0.05)
        grid.scales.mul_(1 + 0.1 * torch.rand_like(grid.scales))
        if not symmetric:
            grid.zeros.add_(torch.randn_like(grid.zeros))
    tensor = grid.tensor()
    assert not tensor.problems("w")
    assert torch.equal(tensor.dequantize(), grid.value().detach())
    assert torch.equal(tensor.scales.half().float(), tensor.scales.float())


def test_a_zero_point_that_a_format_cannot_hold() -> None:
    rules = GridRules((torch.float16,), min_zero=1)
    weight, scheme = torch.rand(8, 32), Scheme(4, 32, symmetric=False)  # all positive: a zero of 0
    grid = TrainedGrid.start(weight, quantize_rtn(weight, scheme, rules), rules)
    grid.zeros.fill_(-3.0)
    assert int(grid.tensor().zeros.min()) == 1
    assert torch.equal(grid.tensor().dequantize(), grid.value())
