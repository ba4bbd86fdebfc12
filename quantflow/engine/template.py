"""A model's chat template, rendered in a process of its own: Jinja's sandbox keeps it from touching anything, and limits on memory and time
from using the machine up.

    python -m quantflow.engine.template    reads {"template": …, "variables": {…}} a line, writes {"text": …} or {"error": …}
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

MOST_LETTERS = 4_000_000
MOST_BYTES = 2**30  # of memory
MOST_SECONDS = 10.0


class TemplateRefused(ValueError):
    """The template does not take what it was given, or does not behave."""


class Renderer:
    """Renders in a process that is started when it is first needed, and again after it had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Raises TemplateRefused."""
        line = json.dumps({"template": template, "variables": dict(variables)}).encode() + b"\n"
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                # -P: nothing of the current folder is imported.
                command = [sys.executable, "-P", "-m", "quantflow.engine.template"]
                process = self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
            assert process.stdin and process.stdout
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = _line(process.stdout.fileno())
            except BaseException as error:
                self._end()  # an answer that nobody waited for would be the next question's
                if not isinstance(error, OSError):
                    raise
                raise TemplateRefused(f"it took more than {MOST_BYTES >> 20} MiB, or its process was ended ({error})") from error
            if answer is None:
                self._end()
                raise TemplateRefused(f"it took more than {MOST_SECONDS:g} s or {MOST_BYTES >> 20} MiB")
        found = json.loads(answer)
        if "error" in found:
            raise TemplateRefused(found["error"])
        return str(found["text"])

    def _end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __del__(self) -> None:
        process = self._process
        if process and process.poll() is None:
            process.kill()


def _line(descriptor: int) -> bytes | None:
    """What comes until the end of a line; None where the other end is silent too long, or gone."""
    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([descriptor], [], [], MOST_SECONDS)
        part = os.read(descriptor, 1 << 20) if ready else b""
        if not part:
            return None
        parts.append(part)
        if part.endswith(b"\n"):
            return b"".join(parts)


def _render(template: str, variables: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    text = "".join(environment.from_string(template).generate(**variables))
    if len(text) > MOST_LETTERS:
        raise TemplateError(f"{len(text)} letters, expected at most {MOST_LETTERS}")
    return text


def main() -> None:
    import resource

    import jinja2.ext
    import jinja2.sandbox  # noqa: F401 - before the limit

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for who started this; its end closes stdin
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    for line in sys.stdin.buffer:
        try:
            answer = {"text": _render(**json.loads(line))}
        except MemoryError:
            answer = {"error": f"it took more than {MOST_BYTES >> 20} MiB"}
        except Exception as error:  # whatever a template does wrong is for whoever sent it
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
