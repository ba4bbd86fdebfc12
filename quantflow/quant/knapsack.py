"""Which width each part of a model gets, within a budget of bytes: a multiple-choice knapsack
(Kellerer, Pferschy and Pisinger 2004, chapter 11), solved by dynamic programming over the choices
that no other one dominates.

One option of every part is taken; the sum of costs is to be as small as the sum of sizes, at most
the budget, allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# partial choices that are kept; beyond it, sizes are rounded up to multiples of a quantum
MOST_STATES = 200_000


@dataclass(frozen=True)
class Option:
    """size: bytes. cost: what it does harm, such as a KL divergence in nats."""

    size: int
    cost: float


@dataclass(frozen=True)
class Choice:
    """options: the option taken of each part. size, cost: their sums. bound: no choice within the
    budget costs less than this; equal to `cost` where the search was exact."""

    options: tuple[int, ...]
    size: int
    cost: float
    bound: float

    @property
    def gap(self) -> float:
        """How far from the best the choice can be at most."""
        return max(0.0, self.cost - self.bound)


def choose(
    parts: Sequence[Sequence[Option]], budget: int, *, most_states: int = MOST_STATES
) -> Choice | None:
    """The cheapest choice whose size is at most `budget`; None where even the smallest options are
    more.

    Exact as long as at most `most_states` partial choices are neither larger and dearer than
    another: the sizes of a model's linears repeat, so that few sums differ. Else sizes are rounded
    up, the choice still keeps the budget, and `bound` says what it may have lost. Raises ValueError
    for a cost that is not finite.
    """
    if wrong := [
        (at, option)
        for at, part in enumerate(parts)
        for option in part
        if not math.isfinite(option.cost)
    ]:
        raise ValueError(
            f"part {wrong[0][0]} has a cost of {wrong[0][1].cost}, and costs must be finite"
        )
    if sum(min(option.size for option in part) for part in parts) > budget:
        return None
    taken = _search(parts, budget, 1, most_states)
    exact = taken is not None
    quantum = 1
    while taken is None:
        # The smallest options, rounded up, may no longer fit: the finest quantum that keeps few
        # states is tried first.
        quantum = max(quantum * 2, budget // most_states)
        taken = _search(parts, budget, quantum, most_states)
    if not taken:  # rounding took all of the room there was
        taken = tuple(
            min(range(len(part)), key=lambda i, part=part: (part[i].size, part[i].cost))  # type: ignore[misc]
            for part in parts
        )
    cost = sum(part[i].cost for part, i in zip(parts, taken, strict=True))
    size = sum(part[i].size for part, i in zip(parts, taken, strict=True))
    return Choice(taken, size, cost, cost if exact else min(cost, lower_bound(parts, budget)))


def _search(
    parts: Sequence[Sequence[Option]], budget: int, quantum: int, most_states: int
) -> tuple[int, ...] | None:
    """The cheapest choice with sizes in whole quanta; () where none fits, None where there are too
    many states."""
    sizes = [[-(-option.size // quantum) for option in part] for part in parts]
    room = budget // quantum
    rest = [0]  # what the parts from here on take at least
    for row in reversed(sizes):
        rest.append(rest[-1] + min(row))
    rest.reverse()
    size: NDArray[np.int64] = np.zeros(1, np.int64)
    cost: NDArray[np.float64] = np.zeros(1)
    # of each state: the one that it came from, and the option taken
    steps: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    for at, part in enumerate(parts):
        states = len(size)
        size = np.concatenate([size + s for s in sizes[at]])
        cost = np.concatenate([cost + option.cost for option in part])
        order = np.lexsort((cost, size))
        order = order[size[order] <= room - rest[at + 1]]
        best = np.minimum.accumulate(cost[order])
        kept = order[np.concatenate(([True], cost[order][1:] < best[:-1]))] if len(order) else order
        if not len(kept):
            return ()
        if len(kept) > most_states:
            return None
        steps.append(((kept % states).astype(np.int32), (kept // states).astype(np.int16)))
        size, cost = size[kept], cost[kept]
    state, taken = len(cost) - 1, []  # the last one is the largest, and so the cheapest
    for come_from, option in reversed(steps):
        taken.append(int(option[state]))
        state = int(come_from[state])
    return tuple(reversed(taken))


def lower_bound(parts: Sequence[Sequence[Option]], budget: int) -> float:
    """What no choice within the budget costs less than: the best of the Lagrangian relaxation, sum
    of min(cost + price * size) less price * budget, over the price of a byte. It is concave in the
    price, so that thirds of an interval lead to its top."""

    def value(price: float) -> float:
        return sum(min(o.cost + price * o.size for o in part) for part in parts) - price * budget

    dearest = max(o.cost for part in parts for o in part)
    smallest = min(
        (abs(a.size - b.size) for part in parts for a in part for b in part if a.size != b.size),
        default=1,
    )
    # at a higher price, every part takes its smallest option
    low, high = 0.0, max(dearest / smallest, math.ulp(0.0))
    for _ in range(200):
        third = (high - low) / 3
        if value(low + third) < value(high - third):
            low += third
        else:
            high -= third
    return max(value(0.0), value(low))
