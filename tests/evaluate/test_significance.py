"""Intervals and the paired test against values by hand, exact fractions, other formulas, and what
must hold for all counts."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.evaluate.significance import (
    Paired,
    mcnemar_p,
    paired,
    paired_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("losses", "gains", "expected"),
    [
        (0, 0, 1.0),
        (1, 1, 1.0),
        (3, 3, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (1, 9, 22 / 1024),
    ],
)
def test_mcnemar_by_hand(losses: int, gains: int, expected: float) -> None:
    assert mcnemar_p(losses, gains) == expected


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_mcnemar_is_the_two_sided_binomial_test(losses: int, gains: int) -> None:
    """The probability of all outcomes of n tosses that are no likelier than this one: for a fair
    coin, the doubled tail."""
    n = losses + gains
    own = math.comb(n, losses)
    expected = sum(
        (Fraction(math.comb(n, i), 2**n) for i in range(n + 1) if math.comb(n, i) <= own),
        Fraction(0),
    )
    assert mcnemar_p(losses, gains) == pytest.approx(float(expected), rel=1e-12)
    assert mcnemar_p(losses, gains) == mcnemar_p(gains, losses)


def test_mcnemar_of_many_counts_neither_overflows_nor_vanishes() -> None:
    n = 20_000  # the normal approximation with a continuity correction
    z = (abs(10_300 - 9_700) - 1) / math.sqrt(n)
    assert mcnemar_p(10_300, 9_700) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert 0 < mcnemar_p(600, 0) < 1e-170


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(successes: int, count: int, low: float, high: float) -> None:
    found = wilson_interval(successes, count)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=200, deadline=None)
def test_wilsons_ends_are_where_the_score_test_begins_to_reject(counts: tuple[int, int]) -> None:
    """At each end q, |p - q| = z · sqrt(q(1 - q)/n): the equation that the formula solves."""
    successes, n = counts
    found, p = wilson_interval(successes, n), successes / n
    assert 0 <= found.low <= p <= found.high <= 1
    for q in (found.low, found.high):
        if 0 < q < 1:
            assert abs(p - q) == pytest.approx(
                1.959963984540054 * math.sqrt(q * (1 - q) / n), rel=1e-9
            )
    other = wilson_interval(n - successes, n)
    assert (found.low, found.high) == (
        pytest.approx(1 - other.high, abs=1e-12),
        pytest.approx(1 - other.low, abs=1e-12),
    )


def test_nothing_counted_says_nothing() -> None:
    found = wilson_interval(0, 0)
    assert (found.low, found.high) == (0, 1)


def test_paired_interval_by_hand() -> None:
    # n = 98, 14 losses and 4 gains: a = 5/100, b = 15/100.
    half = 1.959963984540054 * math.sqrt((0.2 - 0.01) / 100)
    found = paired_interval(14, 4, 98)
    assert (found.low, found.high) == (pytest.approx(-0.1 - half), pytest.approx(-0.1 + half))
    # two models that never differ are known to be close, not equal
    alike = paired_interval(0, 0, 398)
    assert alike.high == -alike.low == pytest.approx(1.959963984540054 * math.sqrt(2 / 400 / 400))


def test_the_paired_interval_covers_what_it_promises() -> None:
    """The exact coverage over all outcomes of 60 questions, for models that differ by little and by
    much: near 95%, and more where so few questions differ that no interval can do it exactly."""
    n = 60
    for p_loss, p_gain, most in ((0.02, 0.02, 1.0), (0.1, 0.05, 0.98), (0.3, 0.1, 0.97)):
        covered = 0.0
        for losses in range(n + 1):
            for gains in range(n + 1 - losses):
                interval = paired_interval(losses, gains, n)
                if interval.low <= p_gain - p_loss <= interval.high:
                    ways = math.comb(n, losses) * math.comb(n - losses, gains)
                    covered += (
                        ways
                        * p_loss**losses
                        * p_gain**gains
                        * (1 - p_loss - p_gain) ** (n - losses - gains)
                    )
        assert 0.94 < covered < most, (p_loss, p_gain, covered)


def test_pairs_are_counted() -> None:
    model = [True, True, False, False, False, True]
    reference = [True, False, True, True, False, True]
    found = paired(model, reference)
    assert found == Paired(losses=2, gains=1, count=6) and found.difference == pytest.approx(-1 / 6)
    assert paired(reference, model) == Paired(1, 2, 6)
    assert found + Paired(1, 0, 4) == Paired(3, 1, 10)
    with pytest.raises(ValueError, match="shorter"):
        paired(model, reference[:-1])


@pytest.mark.parametrize(
    ("losses", "gains", "count", "said"),
    [
        (0, 0, 1000, "the same questions right; a loss of more than 0.3 points is excluded at 95%"),
        (
            6,
            4,
            1000,
            "no difference that 1000 questions can show (p = 0.75); a loss of more than 0.9 points",
        ),
        (30, 5, 1000, "worse by 2.5 points"),
        (5, 30, 1000, "better by 2.5 points"),
        (0, 900, 1000, "a loss of more than 0.0 points"),
    ],
)
def test_the_verdict_says_what_the_numbers_allow(
    losses: int, gains: int, count: int, said: str
) -> None:
    assert said in Paired(losses, gains, count).verdict()


@pytest.mark.parametrize(
    "wrong",
    [lambda: mcnemar_p(-1, 2), lambda: wilson_interval(3, 2), lambda: paired_interval(3, 3, 5)],
)
def test_counts_that_cannot_be_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        wrong()  # type: ignore[operator]
