"""Gates, and what is judged by them."""

from __future__ import annotations

import math

import pytest

from quantflow.evaluate.gates import judge

FIGURES = {
    "perplexity": 11.0,
    "reference_perplexity": 10.0,
    "kl_mean": 0.02,
    "kl_p99": 0.3,
    "top1": 0.9,
    "tokens": 64,
}
NONE = dict.fromkeys(("kl_mean", "kl_p99", "top1", "perplexity_ratio"))


@pytest.mark.parametrize(
    ("gate", "limit", "kept"),
    [
        ("kl_mean", 0.02, True),
        ("kl_mean", 0.019, False),
        ("kl_p99", 0.29, False),
        ("top1", 0.9, True),
        ("top1", 0.91, False),
        ("perplexity_ratio", 1.1, True),
        ("perplexity_ratio", 1.09, False),
    ],
)
def test_limits(gate: str, limit: float, kept: bool) -> None:
    (verdict,) = judge({"weights": FIGURES}, {**NONE, gate: limit})
    assert (verdict.name, verdict.kept) == (gate, kept)


def test_what_will_be_deployed_is_judged() -> None:
    worse = {**FIGURES, "kl_mean": 0.5}
    for quality, kept in (
        ({"weights": FIGURES, "kv": FIGURES, "weights_and_kv": worse}, False),
        ({"kv": worse}, False),
        ({"weights": FIGURES, "kv": worse}, True),
    ):
        assert [v.kept for v in judge(quality, {"kl_mean": 0.1})] == [kept]
    assert judge({}, {"kl_mean": 0.1}) == []


def test_what_is_no_number_keeps_no_gate() -> None:
    """Not even top-1, where rows of NaN agree on nothing."""
    found = judge({"weights": {**FIGURES, "kl_mean": math.nan}}, {"top1": 0.1, "kl_p99": 9.0})
    assert [v.kept for v in found] == [False, False] and found[0].as_dict()["found"] is None
    assert (
        str(judge({"weights": FIGURES}, {"top1": 0.95})[0])
        == "top1 is 0.9, the gate is at least 0.95"
    )
