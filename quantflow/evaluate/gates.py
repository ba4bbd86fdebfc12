"""Gates: the limits that a recipe sets to what `evaluate` measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quantflow.evaluate.variants import deployed

AT_LEAST = frozenset({"top1"})  # the others are upper limits


@dataclass(frozen=True)
class Verdict:
    """One gate. found is NaN where the divergence is no number, which keeps no gate."""

    name: str
    limit: float
    found: float
    kept: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "found": None if math.isnan(self.found) else self.found,
            "at_least": self.name in AT_LEAST,
        }

    def __str__(self) -> str:
        return (
            f"{self.name} is {self.found:.5g}, the gate is"
            f" {'at least' if self.name in AT_LEAST else 'at most'} {self.limit:g}"
        )


def judge(
    quality: Mapping[str, Mapping[str, float]], gates: Mapping[str, float | None]
) -> list[Verdict]:
    """A verdict for each gate that has a limit, on what will be deployed. quality: variant -> its
    figures."""
    final = deployed(quality)
    if final is None:
        return []
    figures = {**final, "perplexity_ratio": final["perplexity"] / final["reference_perplexity"]}
    # Where the divergence is no number, the likeliest token is none either.
    measured = {name: math.nan if math.isnan(final["kl_mean"]) else figures[name] for name in gates}
    return [
        Verdict(
            name,
            limit,
            measured[name],
            measured[name] >= limit if name in AT_LEAST else measured[name] <= limit,
        )
        for name, limit in gates.items()
        if limit is not None
    ]
