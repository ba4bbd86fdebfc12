"""Tasks: questions from a local file of JSON lines, and how many of them a model answers rightly.

Three forms of lines, as in llm-foundry's evaluation gauntlet; further keys, and white space at the
ends of texts, are ignored:
    {"query", "choices", "gold"}
        multiple choice: the choice likeliest after the query; gold: its index, or several
    {"context_options", "continuation", "gold"}
        Winograd: the context after which the continuation is likeliest (Trinh and Le 2018)
    {"query", "answer"} or {"query", "answers"}
        exact match: what the model goes on with, greedily
"""

from __future__ import annotations

import json
import math
import string
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantflow.artifacts.fingerprint import file_digest
from quantflow.engine.engine import Engine
from quantflow.engine.request import SamplingParams
from quantflow.errors import DataError, Problem
from quantflow.evaluate.scoring import Encoder, Pair, Prompt, Score, generate, loglikelihoods
from quantflow.evaluate.significance import Interval, Paired, paired, wilson_interval
from quantflow.placeholder import placeholder_at

CHOICE, WINOGRAD, EXACT = "multiple choice", "winograd", "exact match"
METRICS = {
    CHOICE: ("acc", "acc_norm", "acc_bytes"),
    WINOGRAD: ("acc", "acc_norm", "acc_bytes"),
    EXACT: ("acc", "acc_norm"),
}
BETWEEN_EXAMPLES = "\n\n"  # lm-evaluation-harness's fewshot_delimiter
_MOST_PROBLEMS = 20  # of a file that are named one by one


@dataclass(frozen=True)
class Settings:
    """How a file's questions are put. delimiter: between a query and what follows. few_shot: the
    first questions of the file are shown with their answers before each of the others, and not
    scored. limit: questions scored. stop, max_tokens: where an answer ends."""

    delimiter: str = " "
    few_shot: int = 0
    limit: int | None = None
    stop: tuple[str, ...] = ("\n",)
    max_tokens: int = 64


@dataclass(frozen=True)
class Item:
    """A question: contexts and continuations, one of the two being single, and which of the choices
    is right; or, to be matched exactly, a context and `answers`. line: of the file, from 1."""

    line: int
    contexts: tuple[str, ...]
    continuations: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def form(self) -> str:
        return EXACT if self.answers else CHOICE if len(self.continuations) > 1 else WINOGRAD

    @property
    def choices(self) -> tuple[tuple[str, str], ...]:
        """(context, continuation) of each."""
        return tuple(
            (context, continuation)
            for context in self.contexts
            for continuation in self.continuations
        )

    def shown(self, delimiter: str) -> str:
        """It with its answer, as an example."""
        if self.form == EXACT:
            return self.contexts[0] + delimiter + self.answers[0]
        context, continuation = self.choices[self.gold[0]]
        return context + delimiter + continuation


@dataclass(frozen=True)
class Task:
    """A file's questions. before: the examples that stand before each. sha256: of the file."""

    name: str
    path: str
    form: str
    items: tuple[Item, ...]
    settings: Settings
    before: str = ""
    sha256: str = ""

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing; None where there is nothing to choose from."""
        if self.form == EXACT:
            return None
        return math.fsum(len(item.gold) / len(item.choices) for item in self.items) / len(
            self.items
        )


# --- reading


def read_tasks(paths: Sequence[str | Path], settings: Sequence[Settings]) -> list[Task]:
    """The task of each file, with the settings in the same place. Raises DataError with every
    problem of every file."""
    tasks: list[Task] = []
    problems: list[Problem] = []
    for path, own in zip(map(Path, paths), settings, strict=True):
        items, wrong = _read(path)
        if len(wrong) > _MOST_PROBLEMS:
            wrong = [
                *wrong[:_MOST_PROBLEMS],
                Problem(str(path), f"{len(wrong) - _MOST_PROBLEMS} more problems like these"),
            ]
        if not wrong and len(items) <= own.few_shot:
            wrong = [
                Problem(
                    str(path),
                    f"{len(items)} questions",
                    f"more than the {own.few_shot} that are shown as examples",
                )
            ]
        name = path.name.removesuffix(".jsonl")
        if any(name == task.name for task in tasks):
            wrong.append(
                Problem(str(path), f"a second task called {name}", "files of different names")
            )
        problems += wrong
        if not wrong:
            examples, rest = items[: own.few_shot], items[own.few_shot :]
            before = "".join(item.shown(own.delimiter) + BETWEEN_EXAMPLES for item in examples)
            tasks.append(
                Task(
                    name,
                    str(path),
                    items[0].form,
                    tuple(rest[: own.limit]),
                    own,
                    before,
                    file_digest(path),
                )
            )
    if problems:
        raise DataError(problems)
    return tasks


def _read(path: Path) -> tuple[list[Item], list[Problem]]:
    items: list[Item] = []
    problems: list[Problem] = []
    if path.is_file() and (problem := placeholder_at(path)):
        return items, [problem]
    try:
        # -sig: Windows puts a byte order mark first
        with path.open(encoding="utf-8-sig") as stream:
            for line, text in enumerate(stream, 1):
                if not text.strip():
                    continue
                try:
                    item = _item(json.loads(text), line)
                    if items and item.form != items[0].form:
                        raise _Wrong(
                            f"a question of {item.form}",
                            f"{items[0].form}, as line {items[0].line} is",
                        )
                    items.append(item)
                except _Wrong as error:
                    problems.append(Problem(f"{path}:{line}", error.found, error.expected))
                except (
                    ValueError,
                    RecursionError,
                ) as error:  # ValueError: bad JSON, or a number of thousands of digits
                    problems.append(
                        Problem(f"{path}:{line}", f"not JSON ({error})", "an object a line")
                    )
    except UnicodeDecodeError as error:
        problems.append(
            Problem(str(path), f"not UTF-8 text ({error.reason} at byte {error.start})", "UTF-8")
        )
    except OSError as error:
        problems.append(
            Problem(str(path), error.strerror or str(error), "a readable file of JSON lines")
        )
    if not items and not problems:
        problems.append(Problem(str(path), "no questions", "JSON lines"))
    return items, problems


class _Wrong(Exception):
    def __init__(self, problem: str, expected: str) -> None:
        super().__init__(problem)
        self.found, self.expected = problem, expected


def _item(value: Any, line: int) -> Item:
    """Raises _Wrong."""
    forms = (
        '{"query", "choices", "gold"}, {"context_options", "continuation", "gold"} or {"query",'
        ' "answer" or "answers"}'
    )
    if not isinstance(value, dict):
        raise _Wrong(f"JSON of type {type(value).__name__}", f"an object: {forms}")
    keys = set(value)
    if {"query", "choices", "gold"} <= keys:
        continuations = _texts(value, "choices", least=2)
        return Item(
            line, (_text(value, "query"),), continuations, _gold(value["gold"], len(continuations))
        )
    if {"context_options", "continuation", "gold"} <= keys:
        contexts = _texts(value, "context_options", least=2)
        return Item(
            line, contexts, (_text(value, "continuation"),), _gold(value["gold"], len(contexts))
        )
    if "query" in keys and len(keys & {"answer", "answers"}) == 1:
        answers = (
            _texts(value, "answers", least=1) if "answers" in keys else (_text(value, "answer"),)
        )
        return Item(line, (_text(value, "query"),), answers=answers)
    raise _Wrong(
        f"an object with {', '.join(map(repr, sorted(keys)))}" if keys else "an empty object", forms
    )


def _shown(value: Any) -> str:
    """A value as the file has it, so that "0" is not taken for 0."""
    # half a surrogate pair cannot be printed
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 60 else f"{text[:59]}…"


def _text(value: Mapping[str, Any], key: str) -> str:
    return _checked(value[key], key)


def _checked(text: Any, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise _Wrong(f"{where}: {_shown(text)}", "text that is not empty")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _Wrong(f"{where}: half a surrogate pair", "text that UTF-8 can hold")
    return text.strip()


def _texts(value: Mapping[str, Any], key: str, least: int) -> tuple[str, ...]:
    many = value[key]
    if not isinstance(many, list) or len(many) < least:
        raise _Wrong(f"{key}: {_shown(many)}", f"a list of at least {least} texts")
    return tuple(_checked(text, f"{key}[{i}]") for i, text in enumerate(many))


def _gold(value: Any, count: int) -> tuple[int, ...]:
    many = value if isinstance(value, list) else [value]
    whole = all(isinstance(g, int) and not isinstance(g, bool) and 0 <= g < count for g in many)
    if not many or not whole or len(set(many)) < len(many):
        raise _Wrong(
            f"gold: {_shown(value)}", f"an index from 0 to {count - 1}, or a list of different ones"
        )
    return tuple(many)


# --- answering


@dataclass(frozen=True)
class Answer:
    """A model's answer to one question. right: by metric. logprobs, greedy: of each choice; text:
    what was generated. tokens: scored or generated. cut: whether the context lost its beginning."""

    line: int
    right: Mapping[str, bool]
    tokens: int
    cut: bool
    logprobs: tuple[float, ...] = ()
    greedy: tuple[bool, ...] = ()
    text: str | None = None

    def as_dict(self) -> dict[str, Any]:
        own = (
            {"text": self.text}
            if self.text is not None
            else {"logprobs": list(self.logprobs), "greedy": list(self.greedy)}
        )
        return {"line": self.line, **self.right, "tokens": self.tokens, "cut": self.cut, **own}


@dataclass(frozen=True)
class Result:
    """A model's answers to a task's questions, in their order.

    acc: right by the sum of log-probabilities; acc_norm: by that over the characters of the choice,
    acc_bytes: over its UTF-8 bytes (as the metrics of these names in lm-evaluation-harness 0.4.13).
    Of exact match, acc: the same characters, white space at the ends apart; acc_norm: the same
    after `normalized`.
    """

    task: Task
    answers: tuple[Answer, ...]
    seconds: float = field(compare=False, default=0.0)

    @property
    def count(self) -> int:
        return len(self.answers)

    def right(self, metric: str) -> list[bool]:
        return [answer.right[metric] for answer in self.answers]

    def accuracy(self, metric: str) -> tuple[float, Interval]:
        """The share of right answers, and its interval of 95%."""
        right = sum(self.right(metric))
        return right / self.count, wilson_interval(right, self.count)

    def as_dict(self, *, items: bool = False) -> dict[str, Any]:
        """items: with every answer."""
        metrics = {}
        for metric in METRICS[self.task.form]:
            value, interval = self.accuracy(metric)
            metrics[metric] = {"value": value, "interval": [interval.low, interval.high]}
        answers = {"items": [answer.as_dict() for answer in self.answers]} if items else {}
        tokens, cut = sum(a.tokens for a in self.answers), sum(a.cut for a in self.answers)
        return {
            **metrics,
            "tokens": tokens,
            "cut": cut,
            "seconds": round(self.seconds, 3),
            **answers,
        }


def compare(model: Result, reference: Result, metric: str) -> Paired:
    """Two models on the same task. Raises ValueError where it is not the same."""
    if model.task != reference.task:
        raise ValueError(f"{model.task.name} and {reference.task.name} are not the same questions")
    return paired(model.right(metric), reference.right(metric))


def answer(
    engine: Engine, task: Task, batch: int, step: Callable[[], None] = lambda: None
) -> Result:
    """What an engine's model answers. step: called after each question. Raises UserError and
    ResourceError, as the engine does."""
    began, answers = time.monotonic(), []
    for one in (_exact if task.form == EXACT else _choose)(engine, task, batch):
        answers.append(one)
        step()
    return Result(task, tuple(answers), time.monotonic() - began)


def _choose(engine: Engine, task: Task, batch: int) -> Iterator[Answer]:
    encoder = Encoder(engine)

    def pairs() -> Iterator[Pair]:
        for item in task.items:
            for context, continuation in item.choices:
                yield encoder.pair(
                    task.before + context + task.settings.delimiter,
                    continuation,
                    f"{task.path}:{item.line}",
                )

    scores = loglikelihoods(engine, pairs(), batch)
    for item in task.items:
        own = [next(scores) for _ in item.choices]
        logprobs = [score.logprob for score in own]
        choices = [continuation for _, continuation in item.choices]
        over = {
            "acc": [1] * len(own),
            "acc_norm": [len(t) for t in choices],
            "acc_bytes": [len(t.encode()) for t in choices],
        }
        right = {name: _likeliest(logprobs, lengths) in item.gold for name, lengths in over.items()}
        yield Answer(
            item.line, right, *_sizes(own), tuple(logprobs), tuple(score.greedy for score in own)
        )


def _likeliest(logprobs: list[float], lengths: list[int]) -> int:
    """The first of the best, as numpy's argmax has it."""
    rated = [logprob / length for logprob, length in zip(logprobs, lengths, strict=True)]
    return rated.index(max(rated))


def _sizes(scores: list[Score]) -> tuple[int, bool]:
    return sum(score.tokens for score in scores), any(score.cut for score in scores)


def _exact(engine: Engine, task: Task, batch: int) -> Iterator[Answer]:
    encoder, settings = Encoder(engine), task.settings
    params = SamplingParams(max_tokens=settings.max_tokens, stop=settings.stop)
    room = engine.room - settings.max_tokens
    if room < 1:
        raise DataError(
            Problem(
                "max_tokens", str(settings.max_tokens), f"less than {engine.room_is}, {engine.room}"
            )
        )
    cut: deque[bool] = deque()

    def prompts() -> Iterator[Prompt]:
        for item in task.items:
            tokens = encoder.encode(
                (task.before + item.contexts[0] + settings.delimiter).rstrip(" ")
            )
            cut.append(len(tokens) > room)
            yield Prompt(
                tuple(tokens[-room:]), params, min(len(tokens), room), f"{task.path}:{item.line}"
            )

    for item, output in zip(task.items, generate(engine, prompts(), batch), strict=True):
        text = output.text.strip()
        right = {
            "acc": text in item.answers,
            "acc_norm": normalized(text) in {normalized(wanted) for wanted in item.answers},
        }
        yield Answer(
            item.line, right, len(output.completions[0].token_ids), cut.popleft(), text=text
        )


def normalized(text: str) -> str:
    """An answer as SQuAD compares them (Rajpurkar et al. 2016, `normalize_answer`): lower case,
    without ASCII punctuation and the articles a, an and the, words one space apart; but an answer
    of articles alone keeps them. It makes 3.5 and 35 the same: for numbers, `acc` is the
    measure."""
    words = text.lower().translate(str.maketrans("", "", string.punctuation)).split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)
