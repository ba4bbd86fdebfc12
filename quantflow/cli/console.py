"""The one console, the progress of long work, and how errors end a command."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from quantflow.errors import GateError, QuantFlowError, ResourceError, UserError
from quantflow.machine import is_out_of_memory, resident_bytes

# No markup: brackets in a path or a model's name are what they are.
console = Console(highlight=False, soft_wrap=True, markup=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)

INTERRUPTED = 130
# What a model or a server says must not work the terminal: control characters but tab and line feed are shown as pictures.
HARMLESS = {n: chr(0x2400 + n) if n < 32 else "\ufffd" for n in (*range(32), *range(127, 160)) if n not in (9, 10)}
_DISK_FULL = (28, 122)  # ENOSPC, EDQUOT


class Plain:
    """Progress as plain lines, for pipes and logs: a line when a phase begins and at every tenth of it."""

    def __init__(self) -> None:
        self._name, self._total, self._done, self._began = "", 0, 0, time.monotonic()

    def phase(self, name: str, total: int) -> None:
        self._name, self._total, self._done, self._began = name, total, 0, time.monotonic()
        errors.print(f"{name}: {total} steps")

    def step(self, detail: str = "") -> None:
        self._done += 1
        if self._total <= 12 or self._done * 10 // self._total > (self._done - 1) * 10 // self._total:
            seconds = time.monotonic() - self._began
            errors.print(f"{self._name}: {self._done}/{self._total} {seconds:.1f} s {resident_bytes() // 2**20} MiB {detail}".rstrip())

    def note(self, text: str) -> None:
        errors.print(text)


class Bars:
    """Progress as rich bars: steps, time left, memory, and what is being worked on."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def phase(self, name: str, total: int) -> None:
        self._task = self._progress.add_task(name, total=total, detail="", memory="")

    def step(self, detail: str = "") -> None:
        if self._task is not None:
            self._progress.update(self._task, advance=1, detail=detail, memory=f"{resident_bytes() // 2**20} MiB")

    def note(self, text: str) -> None:
        self._progress.console.print(text)


@contextmanager
def progress() -> Iterator[Plain | Bars]:
    """Bars on a terminal, plain lines elsewhere; on stderr, so that stdout stays what was asked for."""
    if not errors.is_terminal:
        yield Plain()
        return
    columns = (
        TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[memory]} {task.fields[detail]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=errors) as bars:
        yield Bars(bars)


@dataclass(frozen=True)
class Hints:
    """What to do when a verb was interrupted, or ran out of memory."""

    interrupted: str
    memory: str


QUANTISING = Hints(
    "Finished layers are in the store: run the same command to go on.",
    "Lower calibration.samples or seqlen (`quantflow plan` estimates the peak), or free memory; run again to go on.",
)
RUNNING = Hints("", "Lower --session-len, --cache-max-entry-count or the batch, use --kv int8, or free memory.")


def show(problems: Iterable[Any]) -> None:
    """A line each, on stderr."""
    for problem in problems:
        errors.print(f"  {problem}".translate(HARMLESS))


def translate(error: BaseException, hints: Hints = QUANTISING) -> tuple[int, str, tuple[Any, ...]]:
    """The exit code of an exception, a title, and its problems. The one table from exceptions to messages."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted", (hints.interrupted,) if hints.interrupted else ()
    if isinstance(error, GateError):
        return error.exit_code, "quality gate failed", error.problems
    if isinstance(error, ResourceError):
        return error.exit_code, "not enough of something", error.problems
    if isinstance(error, UserError):
        return error.exit_code, f"{len(error.problems)} problem{'s' if len(error.problems) > 1 else ''}", error.problems
    if isinstance(error, QuantFlowError):
        return error.exit_code, "internal error", error.problems
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        place = error.filename or "the disk"
        return 4, "disk full", (f"{place}: {error.strerror}. Free some space and run the same command: a recipe goes on where it stopped.",)
    if isinstance(error, PermissionError):
        return 2, "not permitted", (f"{error.filename}: {error.strerror}. Choose another place with --output.",)
    if is_out_of_memory(error):
        return 4, "out of memory", (hints.memory,)
    if isinstance(error, OSError):
        return 4, "the system refused", (f"{error.filename or ''} {error.strerror or error}".strip(),)
    return 1, "internal error", (f"{type(error).__name__}: {error}. This is a bug of QuantFlow's: run with --debug for the traceback.",)


def left_out_lines(left_out: Mapping[str, str]) -> Iterator[str]:
    """A line for each reason why tensors of a checkpoint are left out, with the names of the first."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        yield f"{', '.join(names[:2])}{f' and {len(names) - 2} more' if len(names) > 2 else ''}: {reason}"


def show_notes(notes: Iterable[str]) -> None:
    """What is odd about a model that is about to run, on stderr."""
    for note in notes:
        errors.print(f"note: {note}".translate(HARMLESS))


@contextmanager
def reporting(debug: bool, hints: Hints = QUANTISING) -> Iterator[None]:
    """Turns exceptions into one clear message and an exit code; `debug` lets the traceback through first."""
    try:
        yield
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if debug:
            errors.print_exception()
        code, title, problems = translate(error, hints)
        errors.print(f"quantflow: {title}", style="bold red")
        show(problems)
        sys.exit(code)
