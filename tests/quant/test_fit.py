"""What a report says of a quantised weight."""

from __future__ import annotations

import math

import pytest
import torch

from quantflow.quant.fit import ROWS, fit, shown
from quantflow.quant.grid import GridRules
from quantflow.quant.numbers.integer import IntegerTensor, quantize_rtn
from quantflow.quant.numbers.nf4 import quantize_nf4
from quantflow.quant.scheme import Scheme

RULES = GridRules()


def test_by_hand() -> None:
    """Two groups of two: steps of 1 from zero point 1, so that codes 0..3 say -1..2; the second
    reaches half of what it should."""
    weight = torch.tensor([[-1.0, 2.0, 0.0, 6.0]])
    tensor = IntegerTensor(
        Scheme(2, 2, False),
        torch.tensor([[0, 3, 0, 3]], dtype=torch.uint8),
        torch.tensor([[1.0, 1.0]]),
        torch.tensor([[1, 0]], dtype=torch.uint8),
    )
    found = fit(weight, tensor)
    assert found.error == pytest.approx(9 / 41)  # 6 became 3
    assert (found.low, found.high) == (-1.0, 6.0)
    assert found.clip == pytest.approx((1.0 + 0.5) / 2) and found.least_clip == pytest.approx(0.5)
    assert found.as_dict() == {
        "weight_error": 0.2195,
        "weight_range": [-1.0, 6.0],
        "clip": {"mean": 0.75, "least": 0.5},
    }


def test_a_grid_over_the_whole_range_clips_nothing_and_a_searched_one_does() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weight[:, ::32] *= 8  # an outlier a group
    for symmetric in (False, True):
        plain, searched = (
            fit(weight, quantize_rtn(weight, Scheme(3, 32, symmetric), RULES, search=s))
            for s in (False, True)
        )
        assert plain.clip == pytest.approx(1.0) and plain.least_clip == pytest.approx(1.0)
        assert searched.clip is not None and 0.4 < searched.clip < 0.95
        assert searched.error < plain.error


def test_groups_in_another_order() -> None:
    """Channels of a group need not be neighbours (GPTQ's g_idx)."""
    weight, index = (
        torch.tensor([[1.0, 10.0, -1.0, -10.0]]),
        torch.tensor([0, 1, 0, 1], dtype=torch.int32),
    )
    tensor = IntegerTensor(
        Scheme(4, 2, False),
        torch.tensor([[15, 15, 0, 0]], dtype=torch.uint8),
        torch.tensor([[2 / 15, 20 / 15]]),
        torch.tensor([[8, 8]], dtype=torch.uint8),
        index,
    )
    found = fit(weight, tensor)
    assert found.clip == pytest.approx(1.0) and found.least_clip == pytest.approx(1.0)


def test_zeros_nf4_and_what_is_no_number() -> None:
    zeros = fit(torch.zeros(2, 8), quantize_rtn(torch.zeros(2, 8), Scheme(4, 8, False), RULES))
    assert (zeros.error, zeros.clip) == (0.0, None) and "clip" not in zeros.as_dict()
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    tensor = quantize_nf4(weight, Scheme(4, 64, True, "nf4"))
    found = fit(weight, tensor)
    assert found.clip is None
    assert found.error == pytest.approx(
        float((tensor.dequantize() - weight).square().sum() / weight.square().sum())
    )
    assert (shown(math.nan), shown(math.inf), shown(1.23456)) == (None, None, 1.235)


def test_a_sample_of_rows_is_near_the_whole() -> None:
    weight = torch.randn(ROWS * 5 + 3, 64, generator=torch.Generator().manual_seed(2))
    tensor = quantize_rtn(weight, Scheme(4, 32, False), RULES)
    whole = float((tensor.dequantize() - weight).square().sum() / weight.square().sum())
    found = fit(weight, tensor)
    assert found.error == pytest.approx(whole, rel=0.02)
    assert (found.low, found.high) == (float(weight.min()), float(weight.max()))  # of all rows
