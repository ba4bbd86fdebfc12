"""From a request's words to the engine's: sampling parameters; and back: log-probabilities as chat
completions tell them, and a prompt's as vLLM does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantflow.engine.request import LEAST_TEMPERATURE, Logprob, SamplingParams
from quantflow.engine.text import Text
from quantflow.serve.errors import Refused
from quantflow.serve.requests import Sampling, StreamOptions
from quantflow.serve.wire import Object

LEAST_TOP_P = 1e-9  # the likeliest token alone, as 0 is


def default(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def sampling_params(body: Sampling, **more: Any) -> SamplingParams:
    """OpenAI's defaults where the request names none. more: what has another name there. Raises
    Refused, RequestError."""
    arguments: Object = {
        "max_tokens": most_tokens(body),
        "min_tokens": max(body.min_tokens or 0, body.min_new_tokens or 0),
        "temperature": 0.0
        if body.do_sample is False
        else temperature(default(body.temperature, 1.0)),
        "top_k": max(0, body.top_k or 0),  # -1 is off, too
        "top_p": max(default(body.top_p, 1.0), LEAST_TOP_P),
        "min_p": body.min_p or 0.0,
        "repetition_penalty": default(body.repetition_penalty, 1.0),
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "logit_bias": {int(token): bias for token, bias in (body.logit_bias or {}).items()},
        "seed": body.seed,
        "n": default(body.n, 1),
        "stop": tuple(body.stop or ()),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "ignore_eos": bool(body.ignore_eos),
        "skip_special_tokens": default(body.skip_special_tokens, True),
        "include_stop": bool(body.include_stop_str_in_output),
        "prompt_logprobs": body.prompt_logprobs,
    }
    if body.prompt_logprobs is not None and body.stream:
        raise Refused(
            400,
            "prompt_logprobs: with stream; expected one of them",
            param="prompt_logprobs",
            code="unsupported_value",
        )
    return SamplingParams(**{**arguments, **more})


def most_tokens(body: Sampling) -> int | None:
    """Both are limits: the smaller holds. None: there is none."""
    return min(
        (n for n in (body.max_tokens, body.max_completion_tokens) if n is not None), default=None
    )


def temperature(asked: float) -> float:
    """One that is too small to divide by is what it comes near to: greedy."""
    return asked if asked >= LEAST_TEMPERATURE else 0.0


def stream_usage(options: StreamOptions | None) -> bool:
    """Whether the last event tells the usage. What is no stream tells it anyway."""
    return bool(options and options.include_usage)


def chat_logprobs(text: Text, scored: Sequence[Logprob]) -> Object:
    def one(token: int, logprob: float) -> Object:
        data = text.token_bytes(token)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": finite(logprob),
            "bytes": list(data),
        }

    return {
        "content": [
            {**one(s.token, s.logprob), "top_logprobs": [one(t, p) for t, p in s.top]}
            for s in scored
        ],
        "refusal": None,
    }


def prompt_logprobs(
    text: Text, scores: Sequence[Logprob | None], count: int
) -> list[Object | None]:
    """As vLLM tells them: see `PromptLogprobs`. count: of the likeliest."""

    def one(token: int, logprob: float, rank: int) -> Object:
        return {
            str(token): {
                "logprob": finite(logprob),
                "rank": rank,
                "decoded_token": text.token_text(token),
            }
        }

    result: list[Object | None] = []
    for score in scores:
        if score is None:
            result.append(None)
            continue
        entry = one(score.token, score.logprob, score.rank)
        for rank, (token, logprob) in enumerate(score.top[:count], 1):
            entry |= one(token, logprob, rank)
        result.append(entry)
    return result


def finite(logprob: float) -> float:
    """JSON has no infinity: a token that cannot be has -9999, as OpenAI writes it."""
    return max(logprob, -9999.0)
