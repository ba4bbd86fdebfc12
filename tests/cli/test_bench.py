"""`quantflow bench`: what is refused before anything is measured, what is shown, and children that
die."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quantflow.engine.child import Child, ChildEnded
from quantflow.errors import Problem, QuantFlowError
from quantflow.evaluate import throughput
from quantflow.machine import ending
from tests.helpers.runs import invoke
from tests.helpers.tiny import write_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and another one as a GGUF file."""
    folder = tmp_path_factory.mktemp("bench")
    other = write_llama(folder / "other", intermediate_size=96, num_hidden_layers=1)
    assert invoke("export", other, "--format", "gguf", "--output", folder / "gguf").exit_code == 0
    return write_llama(folder / "model"), next((folder / "gguf").glob("*.gguf"))


def refused(model: Path, gguf: Path, *said: str) -> None:
    result = invoke("bench", model, "--gguf", gguf, "--batch", "1", "--prompt", "4", "--new", "2")
    assert result.exit_code == 2, result.output
    assert all(part in " ".join(result.output.split()) for part in said), result.output
    assert " rows: " not in result.output  # none was begun


def test_a_gguf_file_that_is_not_there(models: tuple[Path, Path], tmp_path: Path) -> None:
    refused(models[0], tmp_path / "none.gguf", "none.gguf", "quantflow export DIR --format gguf")


def test_without_llama_cpp(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "llama_cpp" else find(name, *more),
    )
    refused(*models, "llama-cpp-python is not installed", "pip install llama-cpp-python")


def test_a_gguf_file_of_another_model(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: find("json") if name == "llama_cpp" else find(name, *more),
    )
    refused(*models, "1 layers, hidden 64", "2 layers, hidden 64")


# What is shown, and what a child that dies says


def test_rows_come_as_they_are_measured_and_their_number_is_said(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third row fails: the first two have been shown by then."""
    seen = []

    def measure(case: throughput.Case) -> throughput.Row:
        seen.append(case.name)
        if len(seen) == 3:
            raise QuantFlowError(Problem(case.name, "killed by SIGILL (illegal instruction)"))
        return throughput.Row(case, 0.125, 64.0, 8.0, 125.0, 2**20, 2**21, 2**22)

    monkeypatch.setattr(throughput, "measure", measure)
    result = invoke(
        "bench", models[0], "--batch", "1,2", "--prompt", "8", "--new", "2", "--device", "cpu"
    )
    assert (
        result.exit_code == 1 and "weights: killed by SIGILL (illegal instruction)" in result.stderr
    )
    assert "4 rows: weights, weights + KV int8; batch 1,2, prompt 8, 2 new tokens" in result.stderr
    heads, *rows = result.stdout.splitlines()
    assert heads.split() == [
        "batch",
        "prompt",
        "first",
        "prefill",
        "decode",
        "step",
        "peak",
        "weights",
        "KV",
    ]
    assert [row.split() for row in rows] == [
        ["weights", "1", "8", "0.125", "64", "8.0", "125.0", "1", "2", "4"],
        ["weights", "+", "KV", "int8", "1", "8", "0.125", "64", "8.0", "125.0", "1", "2", "4"],
    ]
    assert len({len(line) for line in (heads, *rows)}) == 1 and len(heads) <= 80


@pytest.mark.parametrize(
    ("engine", "name", "says"),
    [
        (
            "llama.cpp",
            "ILL",
            "killed by SIGILL (illegal instruction). It was built for another processor",
        ),
        (
            "quantflow",
            "KILL",
            (
                "killed by SIGKILL (killed). If nobody did that, the system ends what takes too"
                " much memory"
            ),
        ),
        ("transformers", "SEGV", "killed by SIGSEGV (segmentation fault)"),
    ],
)
def test_a_child_that_a_signal_ends_says_which(
    engine: str, name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it printed last: llama.cpp's line about its scheduler is not why it died."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho 'sched_reserve: reserving ...' >&2\nkill -{name} $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(throughput.sys, "executable", str(program))
    case = throughput.Case("a row", engine, "m", "full", "exact", "cpu", 1, 8, 2)
    with pytest.raises(QuantFlowError) as caught:
        throughput.measure(case)
    assert str(caught.value.problems[0]).startswith(f"a row: {says}")


def test_endings() -> None:
    assert ending(0) == "ended with exit code 0" and ending(3) == "ended with exit code 3"
    for name in (signal.SIGILL, signal.SIGTERM, signal.SIGABRT):
        done = subprocess.run(
            [sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(name)})"],
            stderr=subprocess.DEVNULL,
        )
        assert ending(done.returncode).startswith(f"killed by {name.name} (")
    assert ending(-signal.SIGRTMIN - 1).startswith("killed by ")


def test_our_own_child_says_it_too() -> None:
    child = Child("signal")  # a module that ends at once
    with pytest.raises(ChildEnded, match="ended with exit code 0"):
        child.start(b"x")
    child._process = subprocess.Popen(
        ["sh", "-c", "kill -ILL $$"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with pytest.raises(ChildEnded, match=r"killed by SIGILL \(illegal instruction\)|Broken pipe"):
        child.ask(b"x", 10)
