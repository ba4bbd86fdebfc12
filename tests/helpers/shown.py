"""A command as a page shows it, run in this process with little text and few tokens."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from tests.helpers.runs import invoke, reduced

ADDRESS = "http://127.0.0.1:23333"
FEWER: dict[str, list[str]] = {
    "eval": ["--windows", "2", "--length", "64"],
    "eval --tasks": ["--limit", "2"],
    "sensitivity": ["--samples", "2", "--length", "32"],
    "generate": ["--max-tokens", "4"],
    "bench": ["--batch", "1", "--prompt", "8", "--new", "2", "--no-transformers"],
    "chat": ["--max-tokens", "4"],
    "serve": ["--port", "0", "--cache-max-entry-count", "0.01"],
}
"""What is put behind a verb's arguments, where the last of two counts; behind those of a verb with
an option, where it has that."""
TYPED = "What is a table?\n\n/stats\nexit\n"  # to `quantflow chat`


def run_quantflow(text: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command prints; that it ends well is asserted. places: words of the page -> what
    they are here."""
    _in_this_process(monkeypatch)
    words = [places.get(word, word) for word in shlex.split(text)[1:]]
    options = [f"{words[0]} {word}" for word in words if f"{words[0]} {word}" in FEWER]
    recipe = words[0] in ("run", "plan", "release") and not words[1].startswith("-")
    arguments = reduced(words) if recipe else [*words, *FEWER.get((options or words)[0], [])]
    result = invoke(*arguments, text=TYPED)
    assert result.exit_code == 0, f"{shlex.join(arguments)}\n{result.output}{result.stderr}"
    assert result.stdout.strip()
    return result.stdout


def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench` measures, and `serve` ends when it is ready, without further processes."""
    from quantflow.evaluate import throughput
    from quantflow.serve import run

    def measure(case: throughput.Case) -> throughput.Row:
        return throughput.Row(**throughput._run_engine(case), case=case)

    def serve(service: Any, ready: Any) -> int:
        ready("http://127.0.0.1")
        service.close()
        return 0

    monkeypatch.setattr(throughput, "measure", measure)
    monkeypatch.setattr(run, "serve", serve)
