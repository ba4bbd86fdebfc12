"""What is asked of the engine, how one sequence of it stands, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from quantflow.engine.grammar import Grammar, Matcher, grammar_of
from quantflow.engine.text import Detokenizer
from quantflow.errors import Problem, RequestError

MOST_SEQUENCES = 64  # of one request
MOST_LOGPROBS = 50
LEAST_TEMPERATURE = 1e-5  # less than that overflows
MOST_BIASES = 1024
MOST_STOPS, MOST_STOP_CHARACTERS = 32, 512

# The least and the most that each may be; None: nothing above.
_RANGES: tuple[tuple[str, type, float, float | None], ...] = (
    ("max_tokens", int, 0, None),
    ("min_tokens", int, 0, None),
    ("temperature", float, 0, 100),
    ("top_p", float, 0, 1),
    ("min_p", float, 0, 1),
    ("repetition_penalty", float, 0, 100),
    ("presence_penalty", float, -2, 2),
    ("frequency_penalty", float, -2, 2),
    ("top_k", int, 0, None),
    ("n", int, 1, MOST_SEQUENCES),
    ("logprobs", int, 0, MOST_LOGPROBS),
    ("prompt_logprobs", int, 0, MOST_LOGPROBS),
    ("prompt_logprobs_from", int, 0, None),
    ("seed", int, -(2**63), 2**64 - 1),
)
# What some of them must be more than: what lies between that and 0 computes nothing sensible.
_LEAST = (("top_p", 0.0), ("repetition_penalty", 0.01), ("temperature", LEAST_TEMPERATURE))


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop; everything wrong is reported at once, by
    RequestError.

    Attributes:
        max_tokens: None means as many as the context holds; 0, that the prompt's log-probabilities
            are all that is wanted, without a text: the prompt's last token then does not go through
            the model, and it may be one token longer than the context.
        min_tokens: Neither end tokens nor stop strings end the text before.
        temperature: 0 is greedy.
        top_k: Only so many of the most likely tokens; 0: all.
        top_p: Only the most likely tokens that have this share of the probability together.
        min_p: Only tokens with this share of the most likely token's probability.
        repetition_penalty: Of tokens in prompt and output (Keskar et al. 2019); 1: none.
        presence_penalty: Taken off the logit of every token in the output.
        frequency_penalty: Taken off it for each time that it is there.
        logit_bias: Added to the logits of these token ids.
        seed: The same seed gives the same text; None: another each time.
        n: How many texts to make.
        stop: Strings that end the text.
        stop_token_ids: Tokens that end it, beside the model's own.
        ignore_eos: Whether the model's own end tokens do not.
        logprobs: How many alternatives to report beside the token itself, from the model's own
            distribution; None: nothing.
        prompt_logprobs: The same of the prompt's tokens.
        prompt_logprobs_from: Tokens of the prompt before this one are not reported, and may come
            from the prefix cache.
        grammar: What the text may be; it ends where nothing can follow.
        skip_special_tokens: Whether they are left out of the text.
        include_stop: Whether the stop string or token that ends a text is a part of it; a special
            token is not, where those are left out.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 0
    grammar: Grammar | None = None
    skip_special_tokens: bool = True
    include_stop: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "grammar", grammar_of(self.grammar))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            value = (
                (value,)
                if isinstance(value, str)
                else tuple(value)
                if isinstance(value, (list, tuple))
                else value
            )
            object.__setattr__(self, name, value)
        problems = [*_wrong_numbers(self), *_wrong_lists(self)]
        if problems := problems or list(_wrong_together(self)):
            raise RequestError(problems)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """Whether the most likely token is taken, and nothing else asked for."""
        untouched = (
            self.repetition_penalty == 1
            and self.presence_penalty == self.frequency_penalty == 0
            and not self.logit_bias
        )
        return (
            self.greedy
            and untouched
            and self.logprobs is None
            and not self.min_tokens
            and self.grammar is None
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _is(value: object, kind: type, low: float, high: float | None) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        return False
    return (
        value >= low
        and (high is None or value <= high)
        and (isinstance(value, int) or math.isfinite(value))
    )


def _outside(
    params: SamplingParams, name: str, kind: type, low: float, high: float | None
) -> list[Problem]:
    value = getattr(params, name)
    optional = name in ("max_tokens", "logprobs", "prompt_logprobs", "seed")
    if (value is None and optional) or _is(value, kind, low, high):
        return []
    number = "an integer" if kind is int else "a number"
    expected = (
        f"{number} of at least {low:g}" if high is None else f"{number} from {low:g} to {high:g}"
    )
    return [Problem(name, _shown(value), expected + (" or nothing" if optional else ""))]


def _wrong_numbers(params: SamplingParams) -> Iterator[Problem]:
    for name, kind, low, high in _RANGES:
        yield from _outside(params, name, kind, low, high)
    for name, least in _LEAST:
        value = getattr(params, name)
        if (
            _is(value, float, 0, least)
            and value < max(least, 1e-30)
            and (value or name != "temperature")
        ):
            greedy = "0, or " if name == "temperature" else ""
            yield Problem(name, str(value), f"{greedy}more than {least:g}")


def _wrong_lists(params: SamplingParams) -> Iterator[Problem]:
    biases, stop, tokens = params.logit_bias, params.stop, params.stop_token_ids
    if not isinstance(biases, Mapping) or len(biases) > MOST_BIASES:
        yield Problem(
            "logit_bias", _shown(biases), f"at most {MOST_BIASES} tokens and their biases"
        )
    elif not all(_is(k, int, 0, None) and _is(v, float, -100, 100) for k, v in biases.items()):
        yield Problem(
            "logit_bias", _shown(dict(biases)), "token ids, each with a number from -100 to 100"
        )
    if (
        not isinstance(stop, tuple)
        or len(stop) > MOST_STOPS
        or not all(isinstance(s, str) and 0 < len(s) <= MOST_STOP_CHARACTERS for s in stop)
    ):
        expected = f"at most {MOST_STOPS} strings of 1 to {MOST_STOP_CHARACTERS} characters"
        yield Problem("stop", _shown(stop), expected)
    if (
        not isinstance(tokens, tuple)
        or len(tokens) > MOST_BIASES
        or not all(_is(t, int, 0, None) for t in tokens)
    ):
        yield Problem("stop_token_ids", _shown(tokens), f"at most {MOST_BIASES} token ids")


def _wrong_together(params: SamplingParams) -> Iterator[Problem]:
    """What does not go together, of values that are fine alone."""
    if params.max_tokens == 0 and (params.prompt_logprobs is None or params.n > 1):
        expected = "an integer of at least 1, or prompt_logprobs, and one text"
        yield Problem("max_tokens", "0", expected)
    if params.prompt_logprobs_from and params.prompt_logprobs is None:
        yield Problem(
            "prompt_logprobs_from", str(params.prompt_logprobs_from), "with prompt_logprobs"
        )
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        yield Problem(
            "min_tokens", str(params.min_tokens), f"at most max_tokens, {params.max_tokens}"
        )
    if params.grammar and (params.min_tokens or params.ignore_eos):
        yield Problem(
            "grammar",
            "with min_tokens or ignore_eos",
            "neither: where the text is complete, it ends",
        )


class Finish(StrEnum):
    """Why a sequence ended."""

    stop = "stop"  # an end token, a stop token or a stop string
    length = "length"  # max_tokens, or the context is full
    abort = "abort"  # whoever asked has gone
    error = "error"
    grammar = "grammar"  # an error, too: the text came to where its grammar cannot be followed

    @property
    def failed(self) -> bool:
        return self in (Finish.error, Finish.grammar)


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability and rank (1: the most likely), and the most likely tokens, by
    falling log-probability."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Request:
    """A prompt and what to make of it. lower `priority` goes first; among equals, the earlier
    request. rope_length: how many tokens a rotary embedding that depends on the length is stretched
    for, fixed here; 0 where it is not. session: whose history the prompt ends."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    # to generate; 0: the prompt is scored, without its last token going through the model
    most_tokens: int
    arrival: int
    priority: int = 0
    rope_length: int = 0
    session: int | None = None

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.arrival


@dataclass(eq=False)
class Sequence:
    """One of a request's `n` sequences while it is made. computed: tokens whose keys and values are
    in the cache. chain, sealed: its place in the prefix cache, see `block_manager`. detokenizer:
    None before the first token that is shown. prompt_logprobs: of the first of the sequences, those
    that are known of its prompt's tokens."""

    request: Request
    index: int
    tokens: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    chain: int = 0
    sealed: int = 0
    cached: int = 0  # tokens found in the prefix cache when it was first admitted
    preemptions: int = 0
    forks: bool = False  # its siblings begin where its prompt ends
    matcher: Matcher | None = None  # of its grammar
    detokenizer: Detokenizer | None = None
    prompt_logprobs: list[Logprob | None] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens that have yet to go through the model; 1 in a decode."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True)
class Token:
    """One step of one sequence. text: what can be shown by now; characters that may become part of
    a stop string are held back. token: None where the sequence ended without another one. stop: the
    stop string or stop token that ended it, if one did."""

    request: str
    index: int
    token: int | None
    text: str = ""
    logprob: Logprob | None = None
    finish: Finish | None = None
    reason: str = ""
    stop: str | int | None = None
    prompt_logprobs: tuple[Logprob | None, ...] = ()
    cached: int = 0  # tokens of the prompt that the prefix cache held


@dataclass(frozen=True)
class Completion:
    """One finished text. token_ids: the generated tokens, the end token included. stop: the stop
    string or the stop token that ended it, if one did; None for a token that ends every text."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish: Finish
    reason: str = ""
    logprobs: tuple[Logprob, ...] = ()
    stop: str | int | None = None


@dataclass(frozen=True)
class Output:
    """All that came of a request.

    Attributes:
        id: The request's.
        prompt: Its token ids.
        completions: Its finished texts, `n` of them, each with `text`, `token_ids` and `finish`.
        prompt_logprobs: Of every token of the prompt, where they were asked for.
        cached_tokens: Tokens of the prompt that the prefix cache held.
    """

    id: str
    prompt: tuple[int, ...]
    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[Logprob | None, ...] = ()
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        """The first text."""
        return self.completions[0].text
