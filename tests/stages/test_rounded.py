"""A linear's result and its line of the report."""

from __future__ import annotations

import pytest
import torch

from quantflow.quant.grid import GridRules
from quantflow.quant.scheme import Scheme
from quantflow.stages.rounded import nearest_linear

BOTH = GridRules((torch.bfloat16, torch.float16))


@pytest.mark.parametrize(("times", "clamped"), [(1.0, 0), (1e-9, 8), (1e8, 8)])
def test_scales_that_the_formats_cannot_hold_are_reported(times: float, clamped: int) -> None:
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * times
    found = nearest_linear(weight, Scheme(4, 8, False), BOTH, search=False)
    expected = (
        f"{clamped} of 8 scales clamped to what bfloat16 and float16 hold" if clamped else None
    )
    assert found.report.get("fallback") == expected


def test_a_group_of_zeros_is_not_clamped() -> None:
    assert (
        "fallback"
        not in nearest_linear(torch.zeros(4, 16), Scheme(4, 8, False), BOTH, search=False).report
    )
