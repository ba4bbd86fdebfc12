"""Tokens from logits, against distributions computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.engine.request import Request, SamplingParams, Sequence
from quantflow.engine.sampler import (
    LIKELIEST,
    NotANumber,
    adjusted,
    candidates,
    logprob_of,
    sample,
    uniform,
)


def sequence(
    prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = (), **params: Any
) -> Sequence:
    request = Request("r", prompt, SamplingParams(**params), 100, 0)
    return Sequence(request, 0, [*prompt, *output])


def drawn(logits: list[float], times: int = 4000, **params: Any) -> list[float]:
    """How often each token is drawn."""
    tokens = [
        sample(torch.tensor([logits]), [sequence(**params)], [seed], ())[0] for seed in range(times)
    ]
    return [tokens.count(t) / times for t in range(len(logits))]


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    rows = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 1.0]])
    assert sample(rows, [sequence(), sequence()], [0, 0], ()) == [1, 0]


def test_draws_follow_the_distribution() -> None:
    shares = [0.5, 0.3, 0.15, 0.05]
    logits = [math.log(p) for p in shares]
    # Four deviations of a share of 4000 draws are at most 0.032.
    assert drawn(logits, temperature=1.0) == pytest.approx(shares, abs=0.032)
    flat = [p**0.5 for p in shares]
    assert drawn(logits, temperature=2.0) == pytest.approx([p / sum(flat) for p in flat], abs=0.032)
    assert drawn(logits, temperature=1.0, top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.032)
    assert drawn(logits, temperature=1.0, top_p=0.79) == pytest.approx(
        [0.625, 0.375, 0, 0], abs=0.032
    )
    assert drawn(logits, temperature=1.0, top_p=0.81) == pytest.approx(
        [50 / 95, 30 / 95, 15 / 95, 0], abs=0.032
    )
    assert drawn(logits, temperature=1.0, min_p=0.31) == pytest.approx(
        [0.625, 0.375, 0, 0], abs=0.032
    )


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0, 1, 7, 2000]),
    st.sampled_from([0.1, 0.9, 1.0]),
    st.sampled_from([0.0, 0.2, 0.001]),
)
def test_the_likeliest_first_give_what_a_whole_sort_gives(
    seed: int, top_k: int, top_p: float, min_p: float
) -> None:
    """Against the definitions over a sorted vocabulary that is larger than the number tried
    first."""
    logits = (
        torch.randn(
            3 * LIKELIEST, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        .mul(3)
        .float()
    )
    params = SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    values, tokens = candidates(logits, params)
    order = (logits / 0.7).double().sort(descending=True, stable=True)
    kept = order.values[: top_k or None]
    p = (
        kept.softmax(-1)
        if top_k
        else (logits / 0.7).double().softmax(-1).sort(descending=True).values
    )
    # 1 is off: no sum of so many comes to it exactly
    by_p = int((p.cumsum(-1) - p < top_p).sum()) if top_p < 1 else len(p)
    by_min = int((order.values.softmax(-1) >= min_p * order.values.softmax(-1)[0]).sum())
    expected = max(1, min(len(kept), by_p, by_min))
    # the last of many may lie on the edge
    assert abs(len(tokens) - expected) <= (0 if expected < 50 else 1)
    assert sorted(tokens.tolist()[:20]) == sorted(
        order.indices[: len(tokens)].tolist()[:20]
    ) or len(tokens) == len(logits)
    assert torch.equal(values, (logits / 0.7)[tokens])


def test_penalties_as_their_papers_have_them() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5])
    with_repetition = adjusted(logits, sequence((0, 1), (2,), repetition_penalty=2.0), ())
    assert with_repetition.tolist() == [1.0, -4.0, 0.5, 0.5]  # prompt and output alike
    others = adjusted(
        logits, sequence((0, 1), (2, 2, 3), presence_penalty=0.5, frequency_penalty=0.25), ()
    )
    assert others.tolist() == [2.0, -2.0, 1.0 - 0.5 - 0.5, 0.5 - 0.5 - 0.25]  # the output alone
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.5]


def test_biases_and_tokens_that_may_not_come_yet() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    assert sample(logits, [sequence(logit_bias={2: 10.0})], [0], ()) == [2]
    assert sample(logits, [sequence(min_tokens=1)], [0], (1,)) == [2]
    assert sample(logits, [sequence((0,), (2,), min_tokens=1)], [0], (1,)) == [1]
    assert sample(logits, [sequence(min_tokens=1, stop_token_ids=(1, 2))], [0], ()) == [0]


def test_rows_without_a_number_fail_alone() -> None:
    nothing = [-math.inf] * 3
    rows = torch.tensor(
        [
            [1.0, math.nan, 0.0],
            [0.0, 1.0, 2.0],
            nothing,
            [math.inf, 0.0, 0.0],
            [-math.inf, 1.0, -math.inf],
        ]
    )
    found = sample(rows, [sequence(temperature=t) for t in (0.0, 1e-5, 1.0, 1.0, 1.0)], [0] * 5, ())
    assert [isinstance(f, NotANumber) for f in found] == [True, False, True, True, False]
    assert found[1] == 2 and found[4] == 1
    assert isinstance(
        sample(torch.tensor([[0.0, 1.0]]), [sequence(temperature=1.0, min_tokens=1)], [0], (0, 1))[
            0
        ],
        NotANumber,
    )


def test_a_row_does_not_depend_on_the_others() -> None:
    rows = torch.randn(9, 500, generator=torch.Generator().manual_seed(0))
    sequences = [sequence(temperature=0.8, top_p=0.9, top_k=k) for k in range(9)]
    together = sample(rows, sequences, list(range(9)), ())
    assert together == [sample(rows[i : i + 1], [sequences[i]], [i], ())[0] for i in range(9)]
    assert len(set(together)) > 3


def test_random_numbers_depend_on_seed_text_and_step_alone() -> None:
    found = {
        uniform(seed, index, step)
        for seed in (0, 1, 2**64 - 1)
        for index in (0, 1)
        for step in (0, 1, 2)
    }
    assert len(found) == 18 and all(0 <= u < 1 for u in found)
    assert uniform(7, 3, 2) == uniform(7, 3, 2)


def test_log_probabilities_and_ranks() -> None:
    shares = torch.tensor([0.1, 0.6, 0.3]).double()
    found = logprob_of(shares.log(), 2, 2)
    assert found.logprob == pytest.approx(math.log(0.3)) and found.rank == 2
    assert [(t, pytest.approx(v)) for t, v in found.top] == [(1, math.log(0.6)), (2, math.log(0.3))]
    assert logprob_of(shares.log(), 1, 0).top == ()
