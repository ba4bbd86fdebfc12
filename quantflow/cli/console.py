"""The one console, the progress of long work, and how errors end a command."""

from __future__ import annotations

import errno
import os
import select
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from quantflow.errors import (
    TURNING,
    GateError,
    QuantFlowError,
    ResourceError,
    ServerError,
    UserError,
    panicked,
)
from quantflow.machine import is_out_of_memory, resident_bytes


class _Words(Console):
    """On a terminal, lines break between words, and never within one: a path stays whole. Elsewhere
    a line is a line."""

    def print(self, *objects: Any, **options: Any) -> None:
        if self.is_terminal:
            objects = tuple(
                self._wrapped(each) if isinstance(each, str) else each for each in objects
            )
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        raise  # what rich is handling: it is for `reporting`, as it is where others write

    def _wrapped(self, text: str) -> str:
        return "\n".join(
            line if len(line) <= self.width else self._filled(line) for line in text.split("\n")
        )

    def _filled(self, line: str) -> str:
        indent = " " * (len(line) - len(line.lstrip(" ")))
        return textwrap.fill(
            line,
            self.width,
            subsequent_indent=f"{indent}  " if indent else "",
            break_long_words=False,
            break_on_hyphens=False,
        )


# No markup: brackets in a path or a model's name are what they are.
console = _Words(highlight=False, soft_wrap=True, markup=False)
errors = _Words(stderr=True, highlight=False, soft_wrap=True, markup=False)

INTERRUPTED = 130
UNREAD = 141  # as a shell has it of a program that was ended so, by SIGPIPE
# What a model or a server says must not work the terminal: control characters but tab and line feed
# are shown as pictures, and so are those that turn the order of letters.
HARMLESS = {
    n: chr(0x2400 + n) if n < 32 else "\ufffd"
    for n in (*range(32), *range(127, 160), *TURNING)
    if n not in (9, 10)
}
ANOTHER_PLACE = "Choose another place with --output."
FULL = (
    4,
    "disk full",
    "Free some space and run the same command: a recipe goes on where it stopped.",
)
FILES = (4, "too many open files", "Raise the limit (ulimit -n) and run the same command.")
# What the system refuses: exit code, title, what to do.
SYSTEM: dict[int, tuple[int, str, str]] = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: (
        4,
        "file too large",
        (
            "Raise the limit (ulimit -f), or choose a file system that takes larger files, and run"
            " the same command."
        ),
    ),
    errno.EMFILE: FILES,
    errno.ENFILE: FILES,
    errno.EROFS: (2, "not writable", ANOTHER_PLACE),
    errno.EACCES: (2, "not permitted", ANOTHER_PLACE),
    errno.EPERM: (2, "not permitted", ANOTHER_PLACE),
    errno.ELOOP: (2, "a link that leads back to itself", "Mend the link, or name another place."),
    errno.ENAMETOOLONG: (2, "a name that is too long", "Choose a shorter one."),
    errno.ENOTDIR: (2, "a file in the place of a directory", "Choose another place."),
    errno.EISDIR: (2, "a directory in the place of a file", "Choose another place."),
}


QUIET_S = 10.0  # after so long without a line, a log hears how far the step at hand is


class Plain:
    """Progress as plain lines, for pipes and logs: a line when a phase begins, at every tenth of
    it, and now and then within a step."""

    def __init__(self) -> None:
        self.phase("", 0)

    def phase(self, name: str, total: int, unit: str = "steps") -> None:
        self._name, self._total, self._unit = name, total, unit
        self._steps, self._done, self._shown = 0, 0.0, 0.0
        self._began = self._last_shown = time.monotonic()
        if name:
            errors.print(f"{name}: {total} {unit if total != 1 else unit.removesuffix('s')}")

    def advance(self, share: float, detail: str = "") -> None:
        self._done = min(self._done + share, float(self._total))
        self._tell(detail)

    def step(self, detail: str = "") -> None:
        self._steps += 1
        self._done = float(self._steps)
        self._tell(detail)

    def note(self, text: str) -> None:
        errors.print(text.translate(HARMLESS))

    def _tell(self, detail: str) -> None:
        now, whole, parts = time.monotonic(), round(self._done, 6), min(self._total, 10)
        reached = int(whole * parts / self._total) > int(self._shown * parts / self._total) or (
            self._total <= 12 and int(whole) > self._shown
        )
        if reached or now - self._last_shown > QUIET_S:
            done = f"{whole:.0f}" if whole == int(whole) else f"{whole:.1f}"
            words = [
                f"{done} of {self._total} {self._unit}",
                f"{now - self._began:.1f} s",
                f"memory {resident_bytes() // 2**20} MiB",
                detail,
            ]
            errors.print(f"{self._name}: {', '.join(filter(None, words))}")
            self._shown, self._last_shown = whole, now


class _Table(Progress):
    """Bars under a line that names the columns."""

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        table = super().make_tasks_table(tasks)
        table.show_header = True
        return table


class Bars:
    """Progress as rich bars: what is done of the phase, time, memory, and what is being worked
    on."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None
        self._steps = 0

    def phase(self, name: str, total: int, unit: str = "steps") -> None:
        self._steps, self._unit = 0, unit
        self._task = self._progress.add_task(
            name, total=total, whole=f"0/{total} {unit}", detail="", memory=""
        )

    def advance(self, share: float, detail: str = "") -> None:
        if self._task is not None:
            task = self._progress.tasks[self._task]
            self._update(min(task.completed + share, task.total or 0.0), detail)

    def step(self, detail: str = "") -> None:
        self._steps += 1
        self._update(self._steps, detail)

    def note(self, text: str) -> None:
        self._progress.console.print(text.translate(HARMLESS))

    def _update(self, done: float, detail: str) -> None:
        if self._task is not None:
            whole = f"{int(done + 1e-6)}/{self._progress.tasks[self._task].total:.0f} {self._unit}"
            memory = f"{resident_bytes() // 2**20} MiB"
            self._progress.update(
                self._task, completed=done, whole=whole, detail=detail, memory=memory
            )


def facts(title: str) -> Table:
    """A table of names and what they are. What is longer than its column, a path, goes on in the
    next line: cut, it would be another."""
    table = Table(show_header=False, title=title)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


@contextmanager
def progress() -> Iterator[Plain | Bars]:
    """Bars on a terminal, plain lines elsewhere; on stderr, so that stdout stays what was asked
    for."""
    if not errors.is_terminal:
        yield Plain()
        return

    def column(name: str, field: str, **options: Any) -> TextColumn:
        return TextColumn(
            f"{{{field}}}", markup=False, table_column=Column(name, no_wrap=True, **options)
        )

    columns = (
        column("phase", "task.description"),
        BarColumn(bar_width=20 if errors.width >= 80 else 8),
        column("done", "task.fields[whole]"),
        TimeElapsedColumn(table_column=Column("time", no_wrap=True)),
        TimeRemainingColumn(table_column=Column("left", no_wrap=True)),
        *([column("memory", "task.fields[memory]")] if errors.width >= 72 else []),
        column("at", "task.fields[detail]", overflow="ellipsis"),
    )
    with _Table(*columns, console=errors, redirect_stdout=False) as bars:
        yield Bars(bars)


@dataclass(frozen=True)
class Hints:
    """What to do when a verb was interrupted, or ran out of memory."""

    interrupted: str
    memory: str


QUANTISING = Hints(
    "Finished layers are in the store: run the same command to go on.",
    "Lower calibration.samples or seqlen (`quantflow plan` estimates the peak), or free memory; run"
    " again to go on.",
)
RUNNING = Hints(
    "", "Lower --session-len, --cache-max-entry-count or the batch, use --kv int8, or free memory."
)


def show(problems: Iterable[Any]) -> None:
    """A line each, on stderr."""
    for problem in problems:
        errors.print(f"  {problem}".translate(HARMLESS))


def translate(error: BaseException, hints: Hints = QUANTISING) -> tuple[int, str, tuple[Any, ...]]:
    """The exit code of an exception, a title, and its problems. The one table from exceptions to
    messages."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted", (hints.interrupted,) if hints.interrupted else ()
    if isinstance(error, GateError):
        return error.exit_code, "quality gate failed", error.problems
    if isinstance(error, ServerError):
        return error.exit_code, "no answer from the server", error.problems
    if isinstance(error, ResourceError):
        return error.exit_code, "this machine could not do it", error.problems
    if isinstance(error, UserError):
        return (
            error.exit_code,
            f"{len(error.problems)} problem{'s' if len(error.problems) > 1 else ''}",
            error.problems,
        )
    if isinstance(error, QuantFlowError):
        return error.exit_code, "internal error", error.problems
    if isinstance(error, OSError) and error.errno in SYSTEM:
        code, title, advice = SYSTEM[error.errno]
        return code, title, (f"{_described(error)}. {advice}",)
    if panicked(error):
        message = str(error).strip().split("\n")[0][:200] or type(error).__name__
        return (
            4,
            "a library failed",
            (f"{message}. Run with --debug to see where; a damaged file is the likeliest cause.",),
        )
    if is_out_of_memory(error):
        return 4, "out of memory", (hints.memory,)
    if isinstance(error, OSError):
        return 4, "the system refused", (_described(error),)
    return (
        1,
        "internal error",
        (
            (
                f"{type(error).__name__}: {error}. This is a bug of QuantFlow's: run with --debug"
                " for the traceback."
            ),
        ),
    )


def _described(error: OSError) -> str:
    """Files are named where they are written: a write that names none is of what the command
    prints."""
    reason = error.strerror or str(error)
    if error.filename is not None:
        return f"{error.filename}: {reason}"
    return (
        f"standard output: {reason}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        else reason
    )


def by_reason(reasons: Mapping[str, str]) -> Iterator[str]:
    """A line for each reason why tensors of a checkpoint are copied or left out, with the names of
    the first."""
    alike: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        alike.setdefault(reason, []).append(name)
    for reason, names in alike.items():
        yield (
            f"{', '.join(names[:2])}{f' and {len(names) - 2} more' if len(names) > 2 else ''}:"
            f" {reason}"
        )


def show_notes(notes: Iterable[str]) -> None:
    """What is odd about a model that is about to run, on stderr."""
    for note in notes:
        errors.print(f"note: {note}".translate(HARMLESS))


def flush() -> bool:
    """Writes what was printed, while an error of it can still be said. Whether there was somebody
    to read it. Raises OSError."""
    read = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            # or Python would try, and complain, again
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if not isinstance(error, BrokenPipeError):
                raise
            read = False
    return read


def _unread(stream: TextIO) -> bool:
    """Whether the other end of a pipe is closed."""
    watch = select.poll()
    watch.register(stream.fileno(), 0)  # errors are told, whatever is asked for
    return bool(watch.poll(0))


@contextmanager
def reporting(debug: bool, hints: Hints = QUANTISING) -> Iterator[None]:
    """Turns exceptions into one clear message and an exit code; `debug` lets the traceback through
    first."""
    try:
        yield
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and (_unread(sys.stdout) or _unread(sys.stderr)):
            # who reads no more, as `head` does when it has enough, wants no word of it either
            sys.exit(UNREAD)
        if debug:
            errors.print_exception()
        code, title, problems = translate(error, hints)
        errors.print(f"quantflow: {title}", style="bold red")
        show(problems)
        show(getattr(error, "__notes__", ()))  # what went wrong beside it
        sys.exit(code)
