"""Which tokens an expert's statistics are of: a setting of the stages that take them, and what a
report says of how many there were."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any, Literal

Route = Literal["routed", "all"]
ROUTE = (
    "Tokens that experts' statistics are of. routed: those that the router sends to each; all:"
    " every one, so that none starves. What leaves the layer is the router's all the same."
)


def expert_tokens(counts: Mapping[tuple[str, int], int]) -> dict[str, Any]:
    """Of a layer, for its report. counts: of each mixture's each expert."""
    if not counts:
        return {}
    numbers = sorted(counts.values())
    return {
        "experts": {
            "count": len(numbers),
            "min": numbers[0],
            "median": median(numbers),
            "starved": sum(not number for number in numbers),
        }
    }
