"""The compiled steps of quantisation, in C and in Triton, against float64, column by column as the
papers have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantflow_kernels import cpu_solver, solver
from torch import Tensor

from tests.helpers.devices import DEVICE

in_c = pytest.mark.skipif(
    DEVICE != "cpu" or cpu_solver.library()[0] is None,
    reason=f"the CPU's path: {cpu_solver.library()[1] or 'there is a GPU'}",
)


@pytest.fixture(
    params=[pytest.param(cpu_solver, marks=in_c, id="c"), pytest.param(solver, id="triton")]
)
def steps(request: pytest.FixtureRequest) -> Any:
    return request.param


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, device=DEVICE)


def grids(groups: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    zeros = (
        torch.randint(0, 16, (groups, n), generator=torch.Generator().manual_seed(3))
        .float()
        .to(DEVICE)
    )
    return random(groups, n, seed=4).abs() + 0.05, -zeros, 15 - zeros


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("start", "stop"), [(0, 12), (5, 6), (3, 11)])
@pytest.mark.parametrize("transposed", [False, True])
def test_gptq_columns(steps: Any, n: int, start: int, stop: int, transposed: bool) -> None:
    k, groups = 12, 3
    w, ratios, group_at = (
        random(k, n, seed=1),
        random(k, k, seed=2) / 4,
        torch.randperm(k, generator=torch.Generator().manual_seed(5)).to(DEVICE) // 4,
    )
    if transposed:
        ratios = ratios.T.contiguous().T
    scales, lowest, highest = grids(groups, n)
    codes, errors = poisoned(k, n), poisoned(k, n)
    steps.gptq_columns(
        w.clone(), codes, errors, ratios, scales, lowest, highest, group_at, start, stop
    )
    value, wanted = w.double(), torch.empty(k, n, dtype=torch.float64, device=DEVICE)
    for i in range(start, stop):
        g = group_at[i]
        wanted[i] = (value[i] / scales[g]).round().clamp(lowest[g], highest[g])
        error = wanted[i] * scales[g] - value[i]
        torch.testing.assert_close(errors[i].double(), error, rtol=1e-4, atol=1e-4)
        value[i + 1 : stop] += ratios[i, i + 1 : stop, None].double() * error
    assert codes[start:stop].double().equal(wanted[start:stop])
    assert codes[:start].isnan().all() and codes[stop:].isnan().all()  # and nothing beside them


@pytest.mark.parametrize("n", [1, 64, 130])
@pytest.mark.parametrize(("start", "stop"), [(0, 16), (4, 9)])
def test_refine_columns(steps: Any, n: int, start: int, stop: int) -> None:
    k = 16
    values, slope, x = random(k, n, seed=1), random(k, n, seed=2), random(40, k, seed=3)
    hessian, (scales, lowest, highest) = x.T @ x / 40, grids(1, n)
    codes, changes = poisoned(k, n), poisoned(k, n)
    steps.refine_columns(
        values,
        slope.clone(),
        codes,
        changes,
        hessian,
        scales[0],
        lowest[0],
        highest[0],
        hessian.diagonal().clone(),
        start,
        stop,
    )
    left = slope.double()
    for i in range(start, stop):
        best = (
            ((values[i] + left[i] / hessian[i, i].double()) / scales[0])
            .round()
            .clamp(lowest[0], highest[0])
        )
        assert codes[i].double().equal(best)
        change = best * scales[0] - values[i]
        torch.testing.assert_close(changes[i].double(), change, rtol=1e-4, atol=1e-4)
        left[i + 1 :] -= hessian[i, i + 1 :, None].double() * change
    assert changes[:start].isnan().all() and changes[stop:].isnan().all()


@in_c
@pytest.mark.parametrize("size", [1, 16, 43, 64, 100, 128, 512])
@pytest.mark.parametrize("n", [1, 5, 6, 97, 200])
def test_block_losses(size: int, n: int) -> None:
    groups = 2
    weight, x = random(n, groups, size, seed=1), random(groups, 30, size, seed=2)
    hessian = x.transpose(1, 2) @ x
    scales, lowest, _ = (t.T.contiguous() for t in grids(groups, n))
    found = cpu_solver.block_losses(weight, scales, -lowest, 15, hessian)
    scale, zero = scales[:, :, None].double(), -lowest[:, :, None].double()
    error = ((weight / scale).round().clamp(-zero, 15 - zero) * scale - weight).transpose(0, 1)
    expected = ((error @ hessian.double()) * error).sum(-1).T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_halves_go_to_even_codes(steps: Any) -> None:
    w, ones = torch.tensor([[0.5, 1.5, 2.5, -0.5]], device=DEVICE), torch.ones(1, 4, device=DEVICE)
    codes, errors, group_at = (
        poisoned(1, 4),
        poisoned(1, 4),
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
    )
    steps.gptq_columns(
        w, codes, errors, torch.ones(1, 1, device=DEVICE), ones, -8 * ones, 7 * ones, group_at, 0, 1
    )
    assert codes.tolist() == [[0, 2, 2, 0]] and errors.tolist() == [[-0.5, 0.5, -0.5, 0.5]]


@in_c
def test_tensors_of_other_shapes_are_refused() -> None:
    k, n = 8, 4
    good = (
        random(k, n),
        random(k, n),
        random(k, n),
        random(k, k),
        *grids(2, n),
        torch.zeros(k, dtype=torch.int64),
    )
    for place, wrong in (
        (1, random(k, n + 1)),
        (2, random(n, k).T),
        (3, random(k, k - 1)),
        (4, random(3, n)),
        (5, random(2, n).double()),
    ):
        arguments = [*good[:place], wrong, *good[place + 1 :]]
        with pytest.raises(ValueError, match="expected"):
            cpu_solver.gptq_columns(*arguments, 0, k)
    for start, stop in ((-1, 2), (0, k + 1), (5, 4)):
        with pytest.raises(ValueError, match="expected some of 0 to 8"):
            cpu_solver.gptq_columns(*good, start, stop)
    with pytest.raises(ValueError, match="at most 512"):
        cpu_solver.block_losses(
            random(1, 1, 513), torch.ones(1, 1), torch.ones(1, 1), 15, random(1, 513, 513)
        )


def test_a_channel_that_hardly_curves(steps: Any) -> None:
    """A dead channel's curvature is clamped to something whose inverse float32 does not hold."""
    hessian, ones = 1e-28 * torch.eye(2, device=DEVICE), torch.ones(1, device=DEVICE)
    hessian[1, 1] = 0
    codes, changes, values = (
        poisoned(2, 1),
        poisoned(2, 1),
        torch.tensor([[1.4], [2.6]], device=DEVICE),
    )
    curvature = torch.tensor([1e-28, 1e-40], device=DEVICE)
    steps.refine_columns(
        values,
        torch.zeros(2, 1, device=DEVICE),
        codes,
        changes,
        hessian,
        ones,
        -8 * ones,
        7 * ones,
        curvature,
        0,
        2,
    )
    assert codes.tolist() == [[1.0], [3.0]]
