"""LMDeploy's doors for tokens: /generate, a prompt in and what follows it out, and /v1/encode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantflow.engine.request import Finish, Logprob, Output, SamplingParams, Token
from quantflow.serve.answer import Job, Shape, Usage
from quantflow.serve.errors import Refused
from quantflow.serve.requests import EncodeRequest, GenerateRequest
from quantflow.serve.sampling import LEAST_TOP_P, default, finite, temperature
from quantflow.serve.service import Service
from quantflow.serve.wire import Object, encode

GENERATE_RENAMED = {
    "logprobs": "top_logprobs_num",
    "prompt_logprobs": "top_logprobs_num",
    "prompt_logprobs_from": "logprob_start_len",
}


class GenerateShape(Shape):
    """Each event has the characters and tokens that are new, and counts them all. ends: tokens that
    end a text and are none of it, as those of stop_token_ids are; None: they are a part of it.
    scored: whether log-probabilities are told, with `top` alternatives; prompt_from: of which of
    the prompt's tokens on, None: of what follows it."""

    def __init__(
        self,
        ends: frozenset[int] | None,
        prompt: list[int],
        *,
        scored: bool,
        top: int,
        prompt_from: int | None,
    ) -> None:
        self._ends, self._prompt, self._scored, self._top, self._prompt_from = (
            ends,
            prompt,
            scored,
            top,
            prompt_from,
        )
        self._tokens = 0

    def start(self) -> Iterable[Object]:
        return ()

    def more(self, text: int, tokens: list[Token]) -> Iterable[Object]:
        last, ids = tokens[-1], [token.token for token in tokens if token.token is not None]
        scored = [token.logprob for token in tokens if token.logprob]
        before = next((token.prompt_logprobs for token in tokens if token.prompt_logprobs), ())
        yield self._object(
            "".join(token.text for token in tokens), ids, scored, before, last.finish, last.stop
        )

    def end(self, usage: Usage) -> Iterable[Object]:
        return ()

    def whole(self, outputs: list[Output], usage: Usage) -> Object:
        made, before = outputs[0].completions[0], outputs[0].prompt_logprobs
        return self._object(
            made.text, list(made.token_ids), list(made.logprobs), before, made.finish, made.stop
        )

    def _object(
        self,
        text: str,
        ids: list[int],
        scored: list[Logprob],
        before: Sequence[Logprob | None],
        finish: Finish | None,
        stop: str | int | None,
    ) -> Object:
        if (
            self._ends is not None
            and finish == Finish.stop
            and ids
            and (ids[-1] == stop or (stop is None and ids[-1] in self._ends))
        ):
            ids, scored = ids[:-1], scored[: len(ids) - 1]
        self._tokens += len(ids)
        known = (
            None
            if self._prompt_from is None
            else [score for score in before[self._prompt_from :] if score]
        )
        after = scored if self._scored and known is None else None
        meta = {
            "prompt_tokens": len(self._prompt),
            "completion_tokens": self._tokens,
            "finish_reason": None if finish is None else {"type": str(finish)},
            "output_token_logprobs": _own(after),
            "input_token_logprobs": _own(known),
            "output_top_logprobs": _top(after) if self._top else None,
            "input_top_logprobs": _top(known) if self._top else None,
        }
        return {"text": text, "output_ids": ids, "meta_info": meta}


def _own(scored: list[Logprob] | None) -> list[tuple[float, int]] | None:
    return [(finite(s.logprob), s.token) for s in scored] if scored else None


def _top(scored: list[Logprob] | None) -> list[list[tuple[float, int]]] | None:
    return (
        [[(finite(logprob), token) for token, logprob in s.top] for s in scored] if scored else None
    )


def generate_job(service: Service, body: GenerateRequest) -> Job:
    """Takes a while: tokenises. Raises Refused, RequestError."""
    if (body.prompt is None) == (body.input_ids is None):
        raise Refused(
            400,
            "prompt: expected it or input_ids, one of the two",
            param="prompt",
            code="invalid_value",
        )
    scored, top = bool(body.return_logprob), body.top_logprobs_num or 0
    if top and not scored:
        message = "top_logprobs_num: without return_logprob; expected return_logprob: true"
        raise Refused(400, message, param="top_logprobs_num", code="invalid_value")
    of_prompt = body.logprob_start_len >= 0
    if of_prompt and not (scored and body.max_tokens == 0):
        message = (
            "logprob_start_len: what generates; expected return_logprob: true and max_tokens: 0"
        )
        raise Refused(400, message, param="logprob_start_len", code="invalid_value")
    if body.max_tokens == 0 and not of_prompt:
        raise Refused(
            400,
            "max_tokens: 0; expected at least 1, or logprob_start_len",
            param="max_tokens",
            code="invalid_value",
        )
    prompt = (
        body.input_ids if body.input_ids is not None else service.encode([body.prompt or ""])[0]
    )
    begin = body.logprob_start_len + 1  # the first token that something is told of
    if of_prompt and begin >= len(prompt):
        message = (
            f"logprob_start_len: {begin - 1}; expected less than {len(prompt) - 1}: the prompt has"
            f" {len(prompt)} tokens"
        )
        raise Refused(400, message, param="logprob_start_len", code="invalid_value")
    params = SamplingParams(  # LMDeploy's defaults
        max_tokens=body.max_tokens,
        temperature=temperature(default(body.temperature, 0.8)),
        top_p=max(default(body.top_p, 1.0), LEAST_TOP_P),
        top_k=default(body.top_k, 50),
        min_p=body.min_p or 0.0,
        repetition_penalty=default(body.repetition_penalty, 1.0),
        ignore_eos=bool(body.ignore_eos),
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        skip_special_tokens=default(body.skip_special_tokens, True),
        logprobs=top if scored and not of_prompt else None,
        prompt_logprobs=top if of_prompt else None,
        prompt_logprobs_from=begin if of_prompt else 0,
        include_stop=bool(body.include_stop_str_in_output),
    )
    ends = None if body.include_stop_str_in_output else service.llm.engine.end_tokens
    shape = GenerateShape(
        ends, prompt, scored=scored, top=top, prompt_from=begin if of_prompt else None
    )
    return Job([prompt], params, shape, bool(body.stream))


def encoded(service: Service, body: EncodeRequest) -> bytes:
    """The tokens of one text, or of each of several, as JSON. Takes a while. Raises Refused,
    RequestError."""
    bos = body.add_bos is not False
    if body.do_preprocess and not bos:
        message = (
            "add_bos: false with do_preprocess; expected true: a dialogue format has its own first"
            " tokens"
        )
        raise Refused(400, message, param="add_bos", code="unsupported_value")

    prompts = [body.input] if isinstance(body.input, str) else body.input
    if body.do_preprocess:
        result = service.dialogue_tokens([[{"role": "user", "content": text}] for text in prompts])
    else:
        result = service.tokens(prompts, special=bos)
    if isinstance(body.input, str):
        return b'{"input_ids":%b,"length":%d}' % (result.json[1:-1], result.counts[0])
    return b'{"input_ids":%b,"length":%b}' % (result.json, encode(result.counts))
