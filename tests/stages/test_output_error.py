"""The output error of linears that were rounded without a Hessian."""

from __future__ import annotations

import pytest
import torch

from quantflow.stages.output_error import ROWS, OutputErrors


def test_it_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, error, x = (
        torch.randn(*shape, generator=generator) for shape in ((6, 8), (6, 8), (3, 5, 8))
    )
    tap = OutputErrors(lambda name: (weight, error * 0.1) if name == "q" else None)
    tap("q", x, x @ weight.T)
    tap("router", x, x)
    tap("q", x * 0, x)  # the first rows are enough
    expected = float(
        (x @ (error * 0.1).T).double().square().sum() / (x @ weight.T).double().square().sum()
    )
    assert list(tap.of_linears) == ["q"] and tap.of_linears["q"]["tokens"] == 15
    assert tap.of_linears["q"]["error"] == pytest.approx(expected, rel=1e-3)


def test_few_rows_of_many_and_none() -> None:
    weight = torch.eye(4)
    tap = OutputErrors(lambda name: (weight, weight * 0.5))
    tap("expert", torch.zeros(0, 4), torch.zeros(0, 4))
    assert tap.of_linears == {}  # no token reached it
    tap("many", torch.ones(ROWS * 3 + 1, 4), torch.ones(ROWS * 3 + 1, 4))
    assert tap.of_linears["many"] == {"error": 0.25, "tokens": ROWS}
    tap("silent", torch.zeros(2, 4), torch.zeros(2, 4))
    assert tap.of_linears["silent"]["error"] == 0.0
