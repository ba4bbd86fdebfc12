"""How likely an engine's model finds a text after another, and what it goes on with: many at once,
in the order that they came.

Text becomes tokens as lm-evaluation-harness does it, so that its scores and ours are of the same
numbers (api/model.py, `_encode_pair`; models/huggingface.py, `_loglikelihood_tokens`; version
0.4.13).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from quantflow.engine.engine import Engine
from quantflow.engine.llm import Collector
from quantflow.engine.request import Output, SamplingParams
from quantflow.errors import DataError, ModelError, Problem, ResourceError


@dataclass(frozen=True)
class Pair:
    """Token ids of a context, at least one, and of what is scored after it. where: what a message
    calls it."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    where: str = ""


@dataclass(frozen=True)
class Score:
    """logprob: the sum over the continuation's tokens, in nats. greedy: whether each of them is the
    most likely one. tokens: scored.
    cut: tokens of the context that were left out, since the engine has no room for them."""

    logprob: float
    greedy: bool
    tokens: int
    cut: int = 0


@dataclass(frozen=True)
class Prompt:
    """Token ids and what to make of them. begins: how many of them others may begin with, too.
    where: what a message calls it."""

    tokens: tuple[int, ...]
    params: SamplingParams
    begins: int = 0
    where: str = ""


class Encoder:
    """Text as tokens. Raises RequestError for a model without a tokenizer, ModelError for one
    without a token to begin with."""

    def __init__(self, engine: Engine) -> None:
        self._text = engine.tokenizer
        names = [self._text.roles.get(role, "") for role in ("bos_token", "eos_token")]
        known = [
            token
            for token in map(self._text.tokenizer.token_to_id, filter(None, names))
            if token is not None
        ]
        known += sorted(engine.end_tokens)
        if not known:
            raise ModelError(
                Problem(
                    str(engine.path),
                    "a tokenizer with neither BOS nor EOS",
                    "one, to stand before a text without a context",
                )
            )
        self.prefix: int = known[0]
        self._prefix_name = str(self._text.tokenizer.id_to_token(self.prefix))

    def encode(self, text: str, *, special: bool | None = None) -> list[int]:
        """special: with the tokens that open every text; None: unless the text begins with the name
        of one."""
        return self._text.encode(
            text, special=not text.startswith(self._prefix_name) if special is None else special
        )

    def pair(self, context: str, continuation: str, where: str = "") -> Pair:
        """The whole is encoded and cut where the encoded context ends. White space at the context's
        end belongs to the continuation, since most vocabularies keep it with the word that follows.
        An empty context is the token that opens a text. Raises DataError."""
        if context:
            kept = context.rstrip()
            before, whole = self.encode(kept), self.encode(context + continuation)
            after = whole[len(before) :]
        else:
            before, after = [], self.encode(continuation, special=False)
            if after[:1] == [self.prefix]:
                before, after = after[:1], after[1:]
        if not after:
            raise DataError(
                Problem(
                    where or "continuation",
                    f"{continuation[:40]!r} makes no token of its own",
                    "text to score",
                )
            )
        return Pair(tuple(before or [self.prefix]), tuple(after), where)


def loglikelihoods(engine: Engine, pairs: Iterable[Pair], batch: int) -> Iterator[Score]:
    """A score for each pair, in their order, `batch` of them at a time.

    Where both together are longer than the engine's room by more than the last token, which need
    not go through the model, the context loses its beginning. Raises DataError for a continuation
    that does not fit by itself, ModelError for logits that are not finite.
    """
    room, taken = engine.room + 1, deque[Pair]()

    def prompts() -> Iterator[Prompt]:
        for pair in pairs:
            if len(pair.continuation) >= room:
                problem = f"a continuation of {len(pair.continuation)} tokens"
                raise DataError(
                    Problem(
                        pair.where or "continuation",
                        problem,
                        f"at most {engine.room_is}, {engine.room}",
                    )
                )
            taken.append(pair)
            tokens = (*pair.context, *pair.continuation)[-room:]
            begins = len(tokens) - len(pair.continuation)
            yield Prompt(
                tokens,
                SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=begins),
                begins,
                pair.where,
            )

    for output in generate(engine, prompts(), batch):
        pair = taken.popleft()
        scored = [p for p in output.prompt_logprobs[-len(pair.continuation) :] if p is not None]
        total = math.fsum(p.logprob for p in scored)
        if math.isnan(total):
            raise ModelError(
                Problem(pair.where or "log-probability", "the model's logits are not finite")
            )
        cut = len(pair.context) + len(pair.continuation) - len(output.prompt)
        yield Score(total, all(p.rank == 1 for p in scored), len(scored), cut)


@dataclass(eq=False)
class _Job:
    """A prompt on its way. followers: those that wait for what it leaves in the prefix cache."""

    prompt: Prompt
    output: Output | None = None
    followers: list[_Job] = field(default_factory=list)

    def goes_before(self, prompt: Prompt, block: int) -> bool:
        """Whether the cache will hold at least a block of `prompt` for it, and does not yet."""
        shared = prompt.begins
        return (
            self.output is None
            and shared > block
            and self.prompt.tokens[:shared] == prompt.tokens[:shared]
        )


def generate(engine: Engine, prompts: Iterable[Prompt], batch: int) -> Iterator[Output]:
    """What comes of each prompt, in their order.

    Prompts are taken as there is room: no more than `batch` are run or wait for a neighbour that
    begins alike, whose part of the prefix cache they then share. Nothing else may use the engine
    meanwhile. Raises ResourceError where one could not be finished.
    """
    remaining, jobs, running = iter(prompts), deque[_Job](), dict[str, tuple[_Job, Collector]]()
    leader: _Job | None = None
    more, open_jobs = True, 0

    def submit(job: _Job) -> None:
        request = engine.submit(list(job.prompt.tokens), job.prompt.params)
        running[request.id] = (job, Collector(request))

    try:
        while more or jobs:
            # the second: while a long one at the head runs
            while more and open_jobs < batch and len(jobs) < 8 * batch:
                prompt = next(remaining, None)
                if prompt is None:
                    more = False
                    break
                job = _Job(prompt)
                jobs.append(job)
                open_jobs += 1
                if leader is not None and leader.goes_before(prompt, engine.blocks.size):
                    leader.followers.append(job)
                else:
                    leader = job
                    submit(job)
            for token in engine.step():
                job, collector = running[token.request]
                collector.add(token)
                if collector.done:
                    del running[token.request]
                    open_jobs -= 1
                    job.output = _checked(collector.output(), job.prompt.where)
                    for follower in job.followers:
                        submit(follower)
            while jobs and (output := jobs[0].output) is not None:
                jobs.popleft()
                yield output
    finally:
        for id in list(running):
            engine.abort(id)


def _checked(output: Output, where: str) -> Output:
    for completion in output.completions:
        if completion.finish.failed:
            raise ResourceError(Problem(where or output.id, completion.reason))
    return output
