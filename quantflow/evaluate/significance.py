"""How sure a score is, and whether two models that answered the same questions differ: intervals
and a test for counts.

z is the standard normal quantile 1.959964 of a two-sided interval of 95%.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def wilson_interval(successes: int, count: int, z: float = Z95) -> Interval:
    """The score interval of a proportion (Wilson 1927), within [0, 1]; all of it where nothing was
    counted.

    With p = successes / count: (p + z²/2n ± z·sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n). Raises
    ValueError for counts that cannot be.
    """
    if not 0 <= successes <= count:
        raise ValueError(f"{successes} of {count}")
    if not count:
        return Interval(0.0, 1.0)
    p, part = successes / count, z * z / count
    middle, half = p + part / 2, z * math.sqrt(p * (1 - p) / count + part / (4 * count))
    # At the ends the formula gives 0 and 1 but for rounding.
    low = 0.0 if successes == 0 else (middle - half) / (1 + part)
    return Interval(low, 1.0 if successes == count else (middle + half) / (1 + part))


def mcnemar_p(losses: int, gains: int) -> float:
    """The exact two-sided p of McNemar's test (1947): if the questions that one model alone answers
    rightly were coin tosses, how likely it is that they fall at least as unevenly. 2 · sum of C(n,
    i) / 2ⁿ for i up to the smaller count, n = losses + gains, and at most 1."""
    if min(losses, gains) < 0:
        raise ValueError(f"{losses} and {gains}")
    count, fewer = losses + gains, min(losses, gains)
    term = tail = 1
    for i in range(fewer):  # whole numbers: no rounding until the end
        term = term * (count - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**count)


def paired_interval(losses: int, gains: int, count: int, z: float = Z95) -> Interval:
    """The interval of the difference of two proportions on the same `count` questions, (gains -
    losses) / count, within [-1, 1].

    The adjusted Wald interval of Bonett and Price (2012): with a = (gains + 1)/(n + 2) and b =
    (losses + 1)/(n + 2), a - b ± z·sqrt((a + b - (a - b)²)/(n + 2)). It keeps its coverage for
    small counts, and where the models never differ.
    """
    if min(losses, gains) < 0 or losses + gains > count:
        raise ValueError(f"{losses} and {gains} of {count}")
    a, b = (gains + 1) / (count + 2), (losses + 1) / (count + 2)
    half = z * math.sqrt((a + b - (a - b) ** 2) / (count + 2))
    return Interval(max(-1.0, a - b - half), min(1.0, a - b + half))


@dataclass(frozen=True)
class Paired:
    """Two models on the same `count` questions. losses: right in the reference alone; gains: right
    in the model alone."""

    losses: int
    gains: int
    count: int

    @property
    def difference(self) -> float:
        """The model's accuracy less the reference's."""
        return (self.gains - self.losses) / self.count if self.count else 0.0

    @property
    def interval(self) -> Interval:
        return paired_interval(self.losses, self.gains, self.count)

    @property
    def p(self) -> float:
        return mcnemar_p(self.losses, self.gains)

    def __add__(self, other: Paired) -> Paired:
        return Paired(
            self.losses + other.losses, self.gains + other.gains, self.count + other.count
        )

    def verdict(self) -> str:
        """What the numbers allow to say, in a sentence."""
        points = f"{abs(self.difference) * 100:.1f} points"
        low = max(0.0, -self.interval.low * 100)
        excluded = f"a loss of more than {math.ceil(low * 10) / 10:.1f} points is excluded at 95%"
        if self.p < 0.05:
            return (
                f"{'worse' if self.difference < 0 else 'better'} by {points} (p = {self.p:.2g});"
                f" {excluded}"
            )
        if not self.losses + self.gains:
            return f"the same questions right; {excluded}"
        return f"no difference that {self.count} questions can show (p = {self.p:.2g}); {excluded}"

    def as_dict(self) -> dict[str, object]:
        interval = self.interval
        return {
            "difference": self.difference,
            "interval": [interval.low, interval.high],
            "losses": self.losses,
            "gains": self.gains,
            "p": self.p,
            "verdict": self.verdict(),
        }


def paired(model: list[bool], reference: list[bool]) -> Paired:
    """The counts of two models' answers to the same questions, in the same order. Raises ValueError
    where their numbers differ."""
    pairs = list(zip(model, reference, strict=True))
    return Paired(
        sum(r and not m for m, r in pairs), sum(m and not r for m, r in pairs), len(pairs)
    )
