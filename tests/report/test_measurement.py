"""What makes two measurements comparable."""

from __future__ import annotations

from typing import Any

import pytest

from quantflow.report.measurement import measured_on


def report(
    *,
    weights: str = "w",
    tokens: str = "t",
    engine: bool = False,
    stages: tuple[str, ...] = ("rtn",),
) -> dict[str, Any]:
    return {
        "source": {"weights": weights},
        "evaluation": {"tokens": tokens, "engine": engine},
        "asked": {"stages": list(stages)},
    }


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"weights": "v"}, False),
        ({"tokens": "u"}, False),
        ({"engine": True}, False),
        ({"stages": ("kv_qparams",)}, True),
    ],
)
def test_the_same_original_tokens_and_way(change: dict[str, Any], same: bool) -> None:
    assert (measured_on(report(**change)) == measured_on(report())) is same


def test_nothing_measured() -> None:
    assert measured_on({**report(), "evaluation": None}) is None
