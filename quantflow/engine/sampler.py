"""From logits to tokens.

Every sequence is sampled from its own row alone, with its own stream of random numbers, which
depends on its seed and on how many tokens it has: the same whatever else is in the batch, and
whether the sequence was preempted or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantflow.engine.request import Logprob, SamplingParams, Sequence

LIKELIEST = 1024  # candidates that are tried before a whole vocabulary is sorted


class NotANumber(ArithmeticError):
    """The model gave no usable logits: all are minus infinity, or one is NaN or plus infinity."""


@dataclass(frozen=True)
class Drawn:
    """A token for a sequence, not yet a part of it. parent: whose sibling the sequence begins
    as."""

    sequence: Sequence
    parent: Sequence | None
    token: int | NotANumber
    logprob: Logprob | None


def draw(sequences: list[Sequence], logits: Tensor, end_tokens: Collection[int]) -> list[Drawn]:
    """A next token for each sequence, and first ones for the siblings of those whose prompt is
    done. Changes nothing. logits: a row of `[R, V]` for each."""
    rows: list[tuple[Sequence, Sequence | None, int]]
    rows = [(sequence, None, row) for row, sequence in enumerate(sequences)]
    for row, sequence in enumerate(sequences):
        if sequence.forks:  # the same logits for all
            rows += [(sibling, sequence, row) for sibling in _siblings(sequence)]
    if len(rows) > len(sequences):
        logits = logits[torch.tensor([row for _, _, row in rows], device=logits.device)]
    drawing = [sequence for sequence, _, _ in rows]
    seeds = [sequence.request.params.seed or 0 for sequence in drawing]
    tokens = sample(logits, drawing, seeds, end_tokens)
    drawn = []
    for (sequence, parent, _), token, scores in zip(rows, tokens, logits, strict=True):
        count = sequence.request.params.logprobs
        logprob = None
        if count is not None and not isinstance(token, NotANumber):
            logprob = logprob_of(scores, token, count)
        drawn.append(Drawn(sequence, parent, token, logprob))
    return drawn


def _siblings(first: Sequence) -> list[Sequence]:
    """The other sequences of a request, which begin where its prompt ends."""
    request = first.request
    matchers = [first.matcher and first.matcher.copy() for _ in range(1, request.params.n)]
    return [
        Sequence(request, index, list(first.tokens), matcher=matcher)
        for index, matcher in enumerate(matchers, 1)
    ]


def sample(
    logits: Tensor, sequences: list[Sequence], seeds: list[int], end_tokens: Collection[int]
) -> list[int | NotANumber]:
    """A token for each row of `logits` `[R, V]`, or why there is none.

    seeds: of each row, below 2^64. end_tokens: the model's, which may not come before `min_tokens`.
    """
    likeliest = logits.argmax(-1)  # NaN counts as the largest
    finite = logits.gather(1, likeliest[:, None])[:, 0].isfinite()
    best, tops = torch.stack((likeliest, finite.long())).tolist()  # one transfer
    sampled: list[int | NotANumber] = []
    for row, (sequence, seed) in enumerate(zip(sequences, seeds, strict=True)):
        if not tops[row]:
            after = len(sequence.tokens)
            sampled.append(NotANumber(f"the model's logits are not finite after {after} tokens"))
        elif sequence.request.params.plain:
            sampled.append(best[row])
        else:
            changed = adjusted(logits[row].float(), sequence, end_tokens)
            sampled.append(_sample(changed, sequence, seed))
    return sampled


def adjusted(logits: Tensor, sequence: Sequence, end_tokens: Collection[int]) -> Tensor:
    """`logits` `[V]` with biases, penalties and what may not come, in this order, before the
    temperature."""
    params: SamplingParams = sequence.request.params
    out = logits.clone()
    if params.logit_bias:
        out[torch.tensor(list(params.logit_bias), device=out.device)] += torch.tensor(
            list(params.logit_bias.values()), device=out.device
        )
    if sequence.generated < params.min_tokens:
        forbidden = sorted({*end_tokens, *params.stop_token_ids})
        out[torch.tensor(forbidden, dtype=torch.long, device=out.device)] = -torch.inf
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=out.device)
        values = out[seen]
        out[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(sequence.tokens[sequence.prompt_length :])
        if counts:
            tokens = torch.tensor(list(counts), device=out.device)
            times = torch.tensor(list(counts.values()), dtype=out.dtype, device=out.device)
            out[tokens] -= params.presence_penalty + params.frequency_penalty * times
    if sequence.matcher:
        sequence.matcher.forbid_(out)
    return out


def _sample(logits: Tensor, sequence: Sequence, seed: int) -> int | NotANumber:
    params = sequence.request.params
    top = logits.argmax(keepdim=True)
    # one transfer
    likeliest, possible = torch.cat((top, logits.gather(0, top).isfinite().long())).tolist()
    if not possible:
        problem = sequence.matcher.problem if sequence.matcher else ""
        return NotANumber(problem or f"no token is possible after {len(sequence.tokens)} tokens")
    if params.greedy:
        return likeliest
    values, tokens = candidates(logits, params)
    # A uniform number picks the candidate in whose share of the sum it falls.
    cumulative = values.double().softmax(-1).cumsum(-1)
    at = int(
        torch.searchsorted(
            cumulative,
            uniform(seed, sequence.index, sequence.generated) * float(cumulative[-1]),
            right=True,
        )
    )
    return int(tokens[min(at, len(tokens) - 1)])


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens to draw from: (logits over the temperature, token ids). Temperature, then min_p
    (Nguyen et al. 2024), top-k (Fan et al. 2018) and top-p (Holtzman et al. 2020): the smallest set
    of likeliest tokens whose probabilities reach `top_p`."""
    scaled = logits / params.temperature
    if not params.top_k and not params.min_p and params.top_p == 1:
        return scaled, torch.arange(len(scaled), device=scaled.device)
    values, tokens = scaled.topk(min(params.top_k or LIKELIEST, len(scaled)))
    total = (values if params.top_k else scaled).double().logsumexp(-1)
    if not params.top_k and len(tokens) < len(scaled) and not _enough(values, total, params):
        values, tokens = scaled.sort(descending=True, stable=True)
    keep = len(values)
    if params.min_p:
        keep = _min_p(values, params.min_p)
    if params.top_p < 1:
        probabilities = values.double().sub(total).exp()
        before = probabilities.cumsum(-1) - probabilities
        keep = min(keep, int((before < params.top_p).sum()))
    return values[: max(1, keep)], tokens[: max(1, keep)]


def _min_p(values: Tensor, min_p: float) -> int:
    return int((values.double() - values[0].double() >= float(np.log(min_p))).sum())


def _enough(values: Tensor, total: Tensor, params: SamplingParams) -> bool:
    """Whether what `top_p` or `min_p` keep lies among these likeliest."""
    if params.min_p and _min_p(values, params.min_p) < len(values):
        return True
    return params.top_p < 1 and float(values.double().sub(total).exp().sum()) > params.top_p


def uniform(seed: int, index: int, step: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (Philox, Salmon et al. 2011)."""
    generator = np.random.Philox(
        key=np.array([seed & (2**64 - 1), index], dtype=np.uint64), counter=[0, 0, 0, step]
    )
    return float(np.random.Generator(generator).random())


def logprob_of(logits: Tensor, token: int, count: int) -> Logprob:
    """The log-probability of `token` under `logits` `[V]`, and the `count` most likely tokens."""
    values = logits.float().log_softmax(-1)
    own = values[token]
    top, tokens = values.topk(min(count, len(values))) if count else (values[:0], values[:0].long())
    return Logprob(
        token,
        float(own),
        int((values > own).sum()) + 1,
        tuple(zip(tokens.tolist(), top.tolist(), strict=True)),
    )
