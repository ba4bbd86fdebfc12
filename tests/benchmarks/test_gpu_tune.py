"""The search for tiles, without a GPU: what is kept, and what is left out."""

from __future__ import annotations

import math
import time

import pytest

pytest.importorskip("triton")

from benchmarks.gpu_tune import best, geometric_mean, splits, tiles


def test_the_least_comes_first_and_failures_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def score(x: int) -> float:
        if x == 2:
            raise ArithmeticError("relative error 0.3")
        return abs(x - 3.2)

    assert [x for _, x in best(range(6), score, time.monotonic() + 60)] == [3, 4, 5, 1, 0]
    assert "2: ArithmeticError: relative error 0.3" in capsys.readouterr().out
    assert best(range(6), score, time.monotonic() - 1) == []


def test_candidates_differ() -> None:
    first = tiles(16)
    assert len(set(first)) == len(first) > 36 and all(c.block_m == 16 for c in first)
    assert all(bool(c.programs) == (c.block_n >= 64) for c in first)
    assert not any(c.programs for c in tiles(128))
    assert {c.programs for c in splits(first[0])} >= {0, 264} and len(
        {c.block_n for c in splits(first[0])}
    ) == 1


def test_the_mean() -> None:
    assert math.isclose(geometric_mean([1.0, 4.0]), 2.0)
