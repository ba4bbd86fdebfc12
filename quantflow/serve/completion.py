"""/v1/completions: a text in, what follows it out."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quantflow.engine.request import Completion, Logprob, Output, Token
from quantflow.engine.text import Detokenizer
from quantflow.serve.answer import Job, Shape, Usage
from quantflow.serve.errors import Refused, renaming
from quantflow.serve.grammars import constraint
from quantflow.serve.requests import CompletionRequest
from quantflow.serve.sampling import (
    finite,
    most_tokens,
    prompt_logprobs,
    sampling_params,
    stream_usage,
)
from quantflow.serve.service import Service
from quantflow.serve.wire import Object

DEFAULT_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class Prompt:
    """text: as it is echoed."""

    tokens: list[int]
    text: str


class TextShape(Shape):
    """echo: whether prompts stand before what follows them. per_prompt: texts that are shown of
    each. nothing: what was generated is not shown, since no tokens were asked for. ids: whether
    tokens are told. scores: how many alternatives are told of each token of a prompt; None: nothing
    of them."""

    def __init__(
        self,
        service: Service,
        prompts: list[Prompt],
        per_prompt: int,
        *,
        echo: bool,
        logprobs: int | None,
        usage: bool,
        nothing: bool,
        ids: bool,
        scores: int | None,
    ) -> None:
        self._service, self._prompts, self._per_prompt = service, prompts, per_prompt
        self._echo, self._count, self._with_usage, self._nothing = echo, logprobs, usage, nothing
        self._ids, self._scores = ids, scores
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }
        sequences = len(prompts) * per_prompt
        # characters so far; whether anything was shown
        self._lengths, self._begun = [0] * sequences, [False] * sequences
        self._growing: dict[int, Detokenizer] = {}
        self._scored: list[Sequence[Logprob | None]] = [()] * len(prompts)

    def start(self) -> Iterable[Object]:
        return ()

    def more(self, text: int, tokens: list[Token]) -> Iterable[Object]:
        content = "" if self._nothing else "".join(token.text for token in tokens)
        scored: list[Logprob] = (
            [] if self._nothing else [token.logprob for token in tokens if token.logprob]
        )
        before: Sequence[Logprob | None] = ()
        prompt = text // self._per_prompt
        # they come with the first of its texts
        self._scored[prompt] = tokens[0].prompt_logprobs or self._scored[prompt]
        if self._echo and not self._begun[text]:
            content, before = self._prompts[prompt].text + content, self._scored[prompt]
        ids = (
            []
            if self._nothing or not self._ids
            else [token.token for token in tokens if token.token is not None]
        )
        first: Object = (
            {"prompt_token_ids": self._prompts[prompt].tokens}
            if self._ids and not self._begun[text]
            else {}
        )
        self._begun[text] = True
        if content or before or ids or first or (scored and self._count is not None):
            choice = self._choice(text, content, before, scored, None) | first
            yield self._event(choice | {"token_ids": ids} if self._ids else choice)
        if tokens[-1].finish:  # by itself, as OpenAI's and LMDeploy's
            yield self._event({"index": text, "text": "", "logprobs": None, **_ended(tokens[-1])})

    def end(self, usage: Usage) -> Iterable[Object]:
        if self._with_usage:
            yield {**self._head, "choices": [], "usage": self._usage(usage)}

    def whole(self, outputs: list[Output], usage: Usage) -> Object:
        choices = []
        for number, output in enumerate(outputs):
            best = (
                sorted(output.completions, key=_quality)[: self._per_prompt]
                if len(output.completions) > self._per_prompt
                else None
            )
            for index, completion in enumerate(best or output.completions):
                content = (self._prompts[number].text if self._echo else "") + (
                    "" if self._nothing else completion.text
                )
                scored: Sequence[Logprob] = () if self._nothing else completion.logprobs
                before = output.prompt_logprobs if self._echo else ()
                choice = self._choice(
                    number * self._per_prompt + index, content, before, scored, completion
                )
                if self._ids:
                    choice["token_ids"] = [] if self._nothing else list(completion.token_ids)
                    choice["prompt_token_ids"] = self._prompts[number].tokens
                if self._scores is not None:
                    choice["prompt_logprobs"] = prompt_logprobs(
                        self._service.text, output.prompt_logprobs, self._scores
                    )
                choices.append(choice)
        return {**self._head, "choices": choices, "usage": self._usage(usage)}

    def _usage(self, usage: Usage) -> Object:
        return (Usage(usage.prompt, 0, usage.cached) if self._nothing else usage).body

    def _event(self, choice: Object) -> Object:
        event = {**self._head, "choices": [choice]}
        return {**event, "usage": None} if self._with_usage else event

    def _choice(
        self,
        index: int,
        content: str,
        before: Sequence[Logprob | None],
        after: Sequence[Logprob],
        last: Completion | None,
    ) -> Object:
        """last: what says how it has ended, if it has."""
        logprobs = None if self._count is None else self._logprobs(index, before, after)
        return {"index": index, "text": content, "logprobs": logprobs, **_ended(last)}

    def _logprobs(
        self, index: int, before: Sequence[Logprob | None], after: Sequence[Logprob]
    ) -> Object:
        """before: of the prompt, whose first token has none."""
        text = self._service.text
        logprobs: Object = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }
        scored: list[tuple[int, Logprob | None]] = [
            (score.token if score else -1, score) for score in before
        ]
        if before:
            scored[0] = (self._prompts[index // self._per_prompt].tokens[0], None)
        if index not in self._growing:
            self._growing[index] = Detokenizer(
                text, [] if self._echo else self._prompts[index // self._per_prompt].tokens, ()
            )
        growing = self._growing[index]
        for token, score in [*scored, *((s.token, s) for s in after)]:
            logprobs["text_offset"].append(self._lengths[index])
            logprobs["tokens"].append(text.token_text(token))
            logprobs["token_logprobs"].append(finite(score.logprob) if score else 0.0)
            logprobs["top_logprobs"].append(
                {text.token_text(t): finite(p) for t, p in score.top[: self._count]}
                if score
                else {}
            )
            # of the text: its first word may lose a space, a letter take several tokens
            self._lengths[index] += len(growing.add(token))
        return logprobs


def _ended(last: Token | Completion | None) -> Object:
    return {
        "finish_reason": str(last.finish) if last else None,
        "stop_reason": last.stop if last else None,
    }


def _quality(completion: Completion) -> float:
    """Of several texts the one with the highest mean log-probability goes first."""
    return -sum(p.logprob for p in completion.logprobs) / max(1, len(completion.logprobs))


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    if isinstance(body.prompt, list) and isinstance(body.prompt[0], (str, list)):
        return list(body.prompt)
    return [body.prompt]


def _encoded(
    service: Service, inputs: Sequence[str | list[int]], *, echo: bool, special: bool
) -> list[Prompt]:
    """All prompts at once, and the text of tokens that will be echoed: the engine refuses those
    that are too many."""
    encoded = iter(
        service.encode([text for text in inputs if isinstance(text, str)], special=special)
    )
    prompts = []
    for prompt in inputs:
        if isinstance(prompt, str):
            prompts.append(Prompt(next(encoded), prompt))
        else:
            prompts.append(
                Prompt(
                    prompt,
                    service.text.decode(prompt) if echo and len(prompt) <= service.context else "",
                )
            )
    return prompts


def sequences(body: CompletionRequest) -> int:
    """How many sequences will be generated."""
    return len(_prompts(body)) * max(body.n or 1, body.best_of or 1)


def completion_job(service: Service, body: CompletionRequest) -> Job:
    """Takes a while: tokenises. Raises Refused, RequestError."""
    # What the request may not ask for together.
    service.check_model(body.model)
    shown, made = body.n or 1, body.best_of or body.n or 1
    if made < shown:
        raise Refused(
            400,
            f"best_of: {made}, less than n; expected at least {shown}",
            param="best_of",
            code="invalid_value",
        )
    if made > shown and body.stream:
        raise Refused(
            400,
            "best_of: with stream; expected one of them",
            param="best_of",
            code="unsupported_value",
        )
    most = most_tokens(body)
    nothing = most == 0
    if nothing and not body.echo:
        raise Refused(
            400,
            "max_tokens: 0; expected at least 1, or echo: true",
            param="max_tokens",
            code="invalid_value",
        )
    # The prompts as tokens, and what is scored of them.
    prompts = _encoded(
        service, _prompts(body), echo=bool(body.echo), special=body.add_special_tokens is not False
    )
    # The engine scores a text of at least two tokens; where there is nothing to score, or several
    # are asked for, a token goes unseen.
    asked = [
        n for n in (body.logprobs if body.echo else None, body.prompt_logprobs) if n is not None
    ]
    scores = (
        nothing and made == 1 and bool(asked) and all(len(prompt.tokens) > 1 for prompt in prompts)
    )
    # How to generate.
    wanted = constraint(body)
    with renaming({"grammar": wanted.source}):
        params = sampling_params(
            body,
            n=made,
            max_tokens=(0 if scores else 1)
            if nothing
            else DEFAULT_TOKENS
            if most is None
            else most,
            logprobs=body.logprobs if body.logprobs is not None else 0 if made > shown else None,
            prompt_logprobs=max(asked, default=None),
            grammar=wanted.grammar,
        )
    # How to answer.
    usage = stream_usage(body.stream_options)
    shape = TextShape(
        service,
        prompts,
        shown,
        echo=bool(body.echo),
        logprobs=body.logprobs,
        usage=usage,
        nothing=nothing,
        ids=bool(body.return_token_ids),
        scores=body.prompt_logprobs,
    )
    tokens = [prompt.tokens for prompt in prompts]
    return Job(
        tokens,
        params,
        shape,
        bool(body.stream),
        grammar_from=wanted.source,
        priority=body.priority or 0,
    )
