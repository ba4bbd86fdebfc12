"""The log-probabilities of a prompt's own tokens, as its pieces go through the model."""

from __future__ import annotations

import torch
from torch import Tensor

from quantflow.engine.model_runner import ModelRunner, States
from quantflow.engine.request import Sequence
from quantflow.engine.sampler import logprob_of
from quantflow.engine.scheduler import Work


def score_prompts(runner: ModelRunner, step: list[Work], states: States) -> None:
    """Notes, in their sequences, those of the tokens that follow the ones of `step`, whose
    `states` are."""
    # whose token, its place in the prompt, what the head reads for it
    rows: list[tuple[Sequence, int, Tensor]] = []
    for i, work in enumerate(step):
        sequence, params = work.sequence, work.sequence.request.params
        if params.prompt_logprobs is None or sequence.index:
            continue
        h = states.of(i)
        first = work.start + work.count - len(h) + 1  # the token that the first row predicts
        places = range(
            max(first, params.prompt_logprobs_from), min(first + len(h), sequence.prompt_length)
        )
        rows += [(sequence, place, h[place - first]) for place in places]
    most = runner.prompt_chunks(len(rows))
    for start in range(0, len(rows), most):
        part = rows[start : start + most]
        logits = runner.logits(torch.stack([h for _, _, h in part]))
        for (sequence, place, _), row in zip(part, logits, strict=True):
            request = sequence.request
            sequence.prompt_logprobs[place] = logprob_of(
                row, request.prompt[place], request.params.prompt_logprobs or 0
            )
