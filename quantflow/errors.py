"""The exceptions of QuantFlow. Each class names who can mend the problem, and so the exit code.

QuantFlowError                1   our own fault
├── UserError                 2   the recipe, the model, the data or the output directory is wrong
│   ├── RecipeError               the YAML file
│   ├── ModelError                the checkpoint: config, tensors, tokenizer
│   ├── DataError                 calibration or evaluation text
│   ├── FormatError               a format cannot hold what it is given
│   ├── OutputError               where the result should go
│   └── RequestError              what was asked of the engine
├── GateError                 3   the artifact is kept, but failed its quality gates
└── ResourceError             4   the machine: disk full, out of memory, an engine that ended
    └── ServerError               a server elsewhere: not there, or it failed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# Characters that are not seen and turn the order of those that are: a line with them shows what it
# does not say.
TURNING = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        where: A file and line, an option, a tensor: what the rest is about.
        found: What was found there.
        expected: What was expected.
        hint: What to do.
        code: A name for programs, where one may ask.
    """

    where: str
    found: str
    expected: str = ""
    hint: str = ""
    code: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.found}"
        if self.expected:
            text += f"; expected {self.expected}"
        if self.hint:
            text += f". {self.hint}"
        return text


class QuantFlowError(Exception):
    """Base of all errors that QuantFlow raises on purpose.

    Attributes:
        problems: Every `Problem` that was found, not the first alone.
        exit_code: What the command line ends with: who can mend it.
    """

    exit_code = 1

    def __init__(self, problems: str | Problem | Sequence[Problem]) -> None:
        if isinstance(problems, str):
            problems = (
                [Problem(*problems.split(": ", 1))]
                if ": " in problems
                else [Problem("quantflow", problems)]
            )
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class UserError(QuantFlowError):
    """The recipe, the model, the data or the output directory is wrong."""

    exit_code = 2


class RecipeError(UserError):
    """The recipe: its YAML, a key, a value, a combination."""


class ModelError(UserError):
    """The checkpoint: config, tensors, tokenizer."""


class DataError(UserError):
    """The text to calibrate or to evaluate on."""


class FormatError(UserError):
    """A format cannot hold what it is given."""


class OutputError(UserError):
    """The place where the result should go."""


class RequestError(UserError):
    """What was asked of the engine."""


class GateError(QuantFlowError):
    """The artifact is kept, but missed its quality gates."""

    exit_code = 3


class ResourceError(QuantFlowError):
    """The machine: disk full, out of memory, an engine that ended."""

    exit_code = 4


class ServerError(ResourceError):
    """A server elsewhere: not there, or it failed."""


def panicked(error: BaseException) -> bool:
    """Whether a library written in Rust has failed in a way that it did not foresee. Its panic is
    no Exception, and gets past whoever handles those."""
    return type(error).__name__ == "PanicException"


def contained(work: Callable[[], T]) -> T:
    """What `work` gives; a panic in it becomes a RuntimeError."""
    try:
        return work()
    except BaseException as error:
        if panicked(error):
            raise RuntimeError(f"a library has failed: {error}") from error
        raise
