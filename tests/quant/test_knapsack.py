"""The knapsack against every choice there is."""

from __future__ import annotations

import itertools
import random

import pytest

from quantflow.quant.knapsack import Option, choose, lower_bound


def every(parts: list[list[Option]], budget: int) -> float | None:
    """The least cost within the budget, by trying all choices."""
    fitting = (c for c in itertools.product(*parts) if sum(o.size for o in c) <= budget)
    return min((sum(o.cost for o in c) for c in fitting), default=None)


def puzzles(count: int) -> list[tuple[list[list[Option]], int]]:
    chance, found = random.Random(3), []
    for _ in range(count):
        parts = [
            [Option(chance.randint(1, 20), chance.random()) for _ in range(chance.randint(1, 4))]
            for _ in range(chance.randint(1, 6))
        ]
        found.append((parts, chance.randint(1, 100)))
    return found


def test_by_hand() -> None:
    """Ten bytes: the first part's large option saves 5 for 4 bytes, the second's saves 4 for 3;
    both together do not fit."""
    parts = [[Option(3, 6.0), Option(7, 1.0)], [Option(2, 5.0), Option(5, 1.0)]]
    found = choose(parts, 10)
    assert found is not None
    assert (found.options, found.size, found.cost, found.gap) == ((1, 0), 9, 6.0, 0.0)
    assert choose(parts, 12) is not None and choose(parts, 12).options == (1, 1)  # type: ignore[union-attr]
    assert choose(parts, 4) is None, "the smallest options take 5"


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), float("-inf")])
def test_a_cost_that_is_no_number_is_refused(cost: float) -> None:
    with pytest.raises(ValueError, match="part 1 has a cost of"):
        choose([[Option(3, 6.0)], [Option(2, 5.0), Option(5, cost)]], 4)


def test_it_is_the_best_of_all_choices() -> None:
    solved = 0
    for parts, budget in puzzles(300):
        best, found = every(parts, budget), choose(parts, budget)
        assert (found is None) == (best is None)
        if found and best is not None:
            solved += 1
            taken = [part[i] for part, i in zip(parts, found.options, strict=True)]
            assert found.size == sum(
                o.size for o in taken
            ) <= budget and found.cost == pytest.approx(sum(o.cost for o in taken))
            assert found.cost == pytest.approx(best) and found.gap == 0
            assert lower_bound(parts, budget) <= best + 1e-12
    assert solved > 100


def test_with_few_states_it_keeps_the_budget_and_its_bound_holds() -> None:
    worse = 0
    for parts, budget in puzzles(300):
        best, found = every(parts, budget), choose(parts, budget, most_states=3)
        if found and best is not None:
            assert found.size <= budget and found.bound <= best + 1e-12 <= found.cost + 2e-12
            worse += found.cost > best + 1e-9
    assert worse, "some of these lose by rounding, or nothing is tested"


def test_a_model_of_seventy_billion_is_exact() -> None:
    chance, parts = random.Random(0), []
    for _ in range(80):
        for n, k in ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)):
            parts.append(
                [
                    Option(
                        n * k * b // 8 + n * (k // 128) * (16 + b) // 8, chance.random() * 4.0**-b
                    )
                    for b in (2, 3, 4, 8)
                ]
            )
    uniform = sum(part[2].size for part in parts)
    found = choose(parts, uniform)
    assert found is not None and found.gap == 0 and found.size <= uniform
    assert found.cost < sum(part[2].cost for part in parts)
    assert lower_bound(parts, uniform) == pytest.approx(found.cost, rel=1e-3), (
        "two ways to the same number"
    )
