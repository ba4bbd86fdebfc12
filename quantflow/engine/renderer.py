"""A model's chat template, rendered in a process of its own: Jinja's sandbox keeps it from touching
anything, and limits on memory and time from using the machine up.

    python -m quantflow.engine.renderer

reads {"template": …, "variables": {…}, "date": …} a line, writes {"text": …} or {"error": …}.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from queue import LifoQueue
from typing import Any

from quantflow.engine.child import Child, ChildEnded, ChildSlow

MOST_CHARACTERS = 4_000_000
MOST_BYTES = 2**30  # of memory
MOST_SECONDS = 10.0
PROCESSES = 2


class TemplateRefused(ValueError):
    """The template does not take what it was given, or does not behave."""


class Renderer:
    """For several threads: as many at a time as there are processes, so that one that takes long
    does not keep all others waiting. date: what templates see for today; by default, what today
    is."""

    def __init__(self, date: datetime | None = None) -> None:
        self._date = date.isoformat() if date else None
        # the last one first: the other is started only where it is needed
        self._idle: LifoQueue[Child] = LifoQueue()
        for _ in range(PROCESSES):
            self._idle.put(Child("quantflow.engine.renderer"))

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Raises TemplateRefused."""
        line = json.dumps(
            {"template": template, "variables": dict(variables), "date": self._date}
        ).encode()
        child = self._idle.get()
        try:
            answer = _ask(child, line)
        except ChildSlow as error:
            raise TemplateRefused(f"it took more than {MOST_SECONDS:g} s") from error
        except ChildEnded as error:
            raise TemplateRefused(
                f"it took more than {MOST_BYTES >> 20} MiB, or its process was ended ({error})"
            ) from error
        finally:
            self._idle.put(child)
        result = json.loads(answer)
        if "error" in result:
            raise TemplateRefused(result["error"])
        return str(result["text"])


def _ask(child: Child, line: bytes) -> bytes:
    if not child.running:
        child.start()
    try:
        return child.ask(line, MOST_SECONDS)
    except ChildEnded:  # somebody may have ended it, which is not the template's fault
        child.start()
        return child.ask(line, MOST_SECONDS)


def answer(line: bytes) -> bytes:
    """What is written for a line that was read."""
    from quantflow.engine.chat_environment import compiled, written_on

    try:
        asked = json.loads(line)
        dated = (
            {"strftime_now": written_on(datetime.fromisoformat(asked["date"]))}
            if asked["date"]
            else {}
        )
        text = "".join(compiled(asked["template"]).generate(asked["variables"] | dated))
        result = (
            {"text": text}
            if len(text) <= MOST_CHARACTERS
            else {"error": f"{len(text)} characters, expected at most {MOST_CHARACTERS}"}
        )
    except MemoryError:
        result = {"error": f"it took more than {MOST_BYTES >> 20} MiB"}
    except Exception as error:  # whatever a template does wrong is for whoever sent it
        result = {"error": f"{type(error).__name__}: {error}"[:500]}
    return json.dumps(result).encode()


def main() -> None:
    import resource

    import quantflow.engine.chat_environment  # noqa: F401 - before the limit

    # a terminal's Ctrl-C is for who started this; its end closes stdin
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(answer(line) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
