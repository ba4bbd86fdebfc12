"""What a text may be: JSON of a schema, or a language written as a grammar. Every token that would
leave it is forbidden.

The library llguidance works out which tokens may come next; it does so lazily, within limits. Its
limits do not hold for all that happens while a grammar is compiled (intersections of expressions,
large multiples), so that each is compiled in a process of its own first, with limits on memory and
time.

    python -m quantflow.engine.grammar

reads a tokenizer, then a grammar a line, as JSON; writes {"text": …}, what llguidance reads, or
{"error": …}.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from quantflow.distribution import missing
from quantflow.engine.child import Child, ChildEnded, ChildSlow
from quantflow.engine.gbnf import lark_of
from quantflow.engine.schema import endless
from quantflow.errors import Problem, RequestError, contained

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")

MOST_CHARACTERS = 65536  # of a grammar
KEPT = 64  # compiled grammars
START_S = 30.0
MOST_SECONDS, MOST_BYTES = 3.0, 2**30  # to compile one
MOST_TRIED = 32  # first tokens, when a grammar is compiled


class GrammarKind(StrEnum):
    """json_schema: a JSON value, without spaces between its parts. regex: Rust's syntax. lark:
    llguidance's dialect of Lark. gbnf: llama.cpp's grammars, read as llguidance reads them: a rule
    of characters alone takes as many as it can."""

    json_schema = "json_schema"
    regex = "regex"
    lark = "lark"
    gbnf = "gbnf"


INNER = "inner"


@dataclass(frozen=True)
class Grammar:
    """text: the schema as JSON, the expression, or the grammar. around: a grammar in Lark in which
    `@inner` stands for that; "": it is the whole. Raises RequestError."""

    kind: GrammarKind
    text: str
    around: str = ""

    def __post_init__(self) -> None:
        if self.kind not in tuple(GrammarKind):
            raise RequestError(
                Problem("grammar", repr(self.kind)[:80], "one of " + ", ".join(GrammarKind))
            )
        wrong = [
            type(part).__name__ for part in (self.text, self.around) if not isinstance(part, str)
        ]
        if wrong or not self.text or len(self.text) + len(self.around) > MOST_CHARACTERS:
            problem = wrong[0] if wrong else f"{len(self.text) + len(self.around)} characters"
            raise RequestError(
                Problem(
                    "grammar",
                    f"{self.kind} of {problem}",
                    f"text of 1 to {MOST_CHARACTERS} characters",
                )
            )


FIELDS = {field.name for field in fields(Grammar)}


class Grammars:
    """The grammars of one model's tokenizer, compiled once. Safe for several threads: compiling may
    take a second, and is done beforehand by whoever must not wait. end_tokens: what may end a text
    that is complete."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end_tokens: Iterable[int]) -> None:
        self._tokenizer, self._vocabulary, self._end_tokens = (
            tokenizer,
            vocabulary,
            sorted(end_tokens),
        )
        self._lock, self._compiling = threading.Lock(), threading.Lock()
        self._child = Child("quantflow.engine.grammar")
        self._own: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar) -> Matcher:
        """For one text. Raises RequestError for a grammar that is wrong, or more than can be
        followed."""
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
        if compiled is None:
            with self._compiling:
                tokenizer = self._own = self._own or self._load()
                compiled = _compile(tokenizer, grammar, self._try(grammar))
            with self._lock:
                self._compiled[grammar] = compiled
                while len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
        return Matcher(compiled.deep_copy(), self._vocabulary)

    def _try(self, grammar: Grammar) -> str:
        """Compiles it where that can do no harm; what of it llguidance reads. Raises
        RequestError."""
        if not self._child.running:
            setup = {
                "tokenizer": self._tokenizer.to_str(),
                "vocabulary": self._vocabulary,
                "end_tokens": self._end_tokens,
            }
            self._child.start(json.dumps(setup).encode(), START_S)
        try:
            answer = json.loads(self._child.ask(json.dumps(asdict(grammar)).encode(), MOST_SECONDS))
        except (ChildSlow, ChildEnded) as error:
            how = f" (its process: {error})" if isinstance(error, ChildEnded) else ""
            problem = (
                f"{grammar.kind}: it takes more than {MOST_SECONDS:g} s or {MOST_BYTES >> 20} MiB"
                f" to compile{how}"
            )
            raise RequestError(Problem("grammar", problem, "a simpler one")) from error
        if "error" in answer:
            raise RequestError(
                Problem("grammar", f"{grammar.kind}: {answer['error']}", "one that can be followed")
            )
        return str(answer["text"])

    def _load(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise RequestError(missing("grammar", "llguidance", "serve")) from error
        if not self._end_tokens:
            raise RequestError(
                Problem("grammar", "a model without an end token", "one that can end its text")
            )
        try:
            return LLTokenizer(
                self._tokenizer.to_str(), n_vocab=self._vocabulary, eos_token=self._end_tokens
            )
        except (ValueError, RuntimeError) as error:
            raise RequestError(
                Problem("grammar", f"this model's tokenizer cannot be followed ({error})"[:200])
            ) from error


def _read(grammar: Grammar) -> str:
    """What llguidance reads. Raises RequestError."""
    from llguidance import LLMatcher

    try:
        if grammar.kind == GrammarKind.json_schema:
            schema = json.loads(grammar.text)
            place = endless(schema)
            if place is not None:
                raise ValueError(
                    f"{place}: no value satisfies it, since it always needs another of itself"
                )
            text = LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_flexible": False}
            )
        elif grammar.kind == GrammarKind.regex:
            text = LLMatcher.grammar_from_regex(grammar.text)
        else:
            lark = lark_of(grammar.text) if grammar.kind == GrammarKind.gbnf else grammar.text
            text = json.dumps({"grammars": [{"lark_grammar": lark}]})
        grammars = json.loads(text)["grammars"]
        if grammar.around:
            grammars = [{"lark_grammar": grammar.around}, {**grammars[0], "name": INNER}]
        return json.dumps({"grammars": grammars})
    except (ValueError, RecursionError) as error:
        raise RequestError(
            Problem("grammar", f"{grammar.kind}: {error}"[:200], "one that can be read")
        ) from error


def _compile(tokenizer: LLTokenizer, grammar: Grammar, text: str) -> LLMatcher:
    """Raises RequestError."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False, max_grammar_size=100_000, max_lexer_states=50_000)
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=limits)
    if matcher.is_error():
        raise RequestError(
            Problem(
                "grammar",
                f"{grammar.kind}: {_first_line(matcher.get_error())}",
                "one that can be followed",
            )
        )
    return matcher


def _check_beginning(matcher: LLMatcher, grammar: Grammar) -> None:
    """Raises RequestError where no text can begin, or none can go on after its first token: `start:
    "a" start` never ends, and llguidance writes all that must follow at once."""
    begun = matcher.deep_copy()
    mask = begun.compute_bitmask()
    error = begun.get_error() if begun.is_error() else ""
    if not error:
        first = np.flatnonzero(
            np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
        )
        # one that can be followed is enough; it is nearly always the first
        for token in map(int, first[:MOST_TRIED]):
            step = begun.deep_copy()
            step.consume_token(token)
            if not step.is_error():
                return
            error = error or step.get_error()
        if len(first) > MOST_TRIED:
            return
    raise RequestError(
        Problem(
            "grammar",
            f"{grammar.kind}: no text follows it to its end ({_first_line(error)})",
            "one that can end",
        )
    )


class Matcher:
    """How far one text has come in its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._panic = ""

    def copy(self) -> Matcher:
        return Matcher(self._matcher.deep_copy(), self._vocabulary)

    def forbid_(self, logits: Tensor) -> None:
        """Sets the logits `[V]` of tokens that may not come next to minus infinity: all, where it
        cannot be followed any further."""
        mask = self._tried(self._matcher.compute_bitmask, b"")
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        known = min(len(bits), len(logits))
        if not self._matcher.is_error():  # else the mask allows the end alone
            allowed[:known] = torch.from_numpy(bits[:known].astype(bool))
        logits[~allowed.to(logits.device)] = -torch.inf

    def add(self, token: int) -> None:
        self._tried(lambda: self._matcher.consume_token(token), False)

    def _tried(self, call: Callable[[], T], otherwise: T) -> T:
        """What the library says; where it panics, this text alone has a problem."""
        try:
            return contained(call)
        except RuntimeError as error:
            self._panic = _first_line(str(error))
            return otherwise

    @property
    def ended(self) -> bool:
        """Whether the text is complete and nothing can follow."""
        return bool(self._matcher.is_stopped())

    @property
    def panicked(self) -> bool:
        """Whether that is the library's fault, and not the grammar's."""
        return bool(self._panic)

    @property
    def problem(self) -> str:
        """Why the text cannot go on; "" where it can."""
        return self._panic or (
            _first_line(str(self._matcher.get_error())) if self._matcher.is_error() else ""
        )


def grammar_of(value: Any) -> Grammar | None:
    """A grammar, or the same as a dictionary. Raises RequestError."""
    if value is None or isinstance(value, Grammar):
        return value
    if (
        isinstance(value, dict)
        and {"kind", "text"} <= set(value) <= FIELDS
        and value["kind"] in tuple(GrammarKind)
    ):
        return Grammar(**{**value, "kind": GrammarKind(value["kind"])})
    raise RequestError(Problem("grammar", repr(value)[:80], "a Grammar"))


def _first_line(text: str) -> str:
    """Of an error, without the grammar that llguidance shows below it."""
    return text.strip().splitlines()[0][:300] if text.strip() else "it cannot be followed"


def main() -> None:
    import resource

    from llguidance import LLTokenizer

    # a terminal's Ctrl-C is for who started this; its end closes stdin
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setup = json.loads(sys.stdin.buffer.readline())
    tokenizer = LLTokenizer(
        setup["tokenizer"], n_vocab=setup["vocabulary"], eos_token=setup["end_tokens"]
    )
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + MOST_BYTES, used + MOST_BYTES))
    answer: dict[str, str] = {}  # to the first line
    while True:
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        request = json.loads(line)
        try:
            grammar = Grammar(**{**request, "kind": GrammarKind(request["kind"])})
            text = _read(grammar)
            _check_beginning(_compile(tokenizer, grammar, text), grammar)
            answer = {"text": text}
        except RequestError as error:
            answer = {"error": error.problems[0].found.removeprefix(f"{request['kind']}: ")}


if __name__ == "__main__":
    main()
