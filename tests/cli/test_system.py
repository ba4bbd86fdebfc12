"""What the system refuses: disk full, files too large, links in circles. Each is said with its path
and what to do, in a line."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantflow.cli.console import translate
from quantflow.paths import absent, naming
from tests.helpers.runs import invoke
from tests.helpers.serving import DEMO

ROOT = Path(__file__).parents[2]


def python(
    *arguments: str, most_bytes: int | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    limit = (
        {}
        if most_bytes is None
        else {
            "preexec_fn": lambda: resource.setrlimit(
                resource.RLIMIT_FSIZE, (most_bytes, most_bytes)
            )
        }
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        timeout=300,
        **limit,
        **options,
    )


@pytest.mark.parametrize("arguments", [["--version"], ["schema"]])
def test_a_full_disk_behind_standard_output(arguments: list[str]) -> None:
    """Of few letters, which are written when the command ends, and of many."""
    with open("/dev/full", "w") as full:
        done = python("-m", "quantflow.cli.main", *arguments, stdout=full)
    assert done.returncode == 4
    assert done.stderr.startswith(
        "quantflow: disk full\n  standard output: No space left on device. Free some space"
    )
    assert done.stderr.count("\n") == 2  # and Python has nothing to add


@pytest.mark.parametrize(
    ("arguments", "unbuffered", "code"),
    [
        (["schema"], "", 141),
        (["schema"], "1", 141),
        (["--help"], "", 141),
        (["formats"], "", 141),
        (["chat", str(DEMO), "--max-tokens", "4"], "", 141),
        (["schema", "--nothing"], "", 2),
    ],
)
def test_a_reader_that_is_gone(
    arguments: list[str], unbuffered: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `| head`, which ends when it has enough: nothing is said, and what was cut short is
    no success."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = python(
            "-m", "quantflow.cli.main", *arguments, stdout=writer, input="What is a table?\n"
        )
    finally:
        os.close(writer)
    said = [
        line
        for line in done.stderr.splitlines()
        if not re.match("mode: |Usage: |Try |Error: |$", line)
    ]
    assert (done.returncode, said) == (code, []), done.stderr
    if code == 2:
        assert "--nothing" in done.stderr


WRITERS = """
import sys
from pathlib import Path
import torch
from quantflow.artifacts.store import write_json
from quantflow.decoder.stream import Stream
from quantflow.checkpoints.tensor_file import save_tensors
from quantflow.tokenizers.export import export_tokenizer
from quantflow.paths import write_text

folder, model = Path(sys.argv[1]), Path(sys.argv[2])

def stream():
    held = Stream((4, 8, 16), torch.float32, torch.device("cpu"), None)
    held.write(0, torch.zeros(4, 8, 16))
    held.save(folder / "saved.bin")

WORK = {
    "text.json": lambda: write_text(folder / "text.json", "x" * 5000),
    "record.json": lambda: write_json(folder / "record.json", ["x"] * 5000),
    ".model.safetensors": lambda: save_tensors(
        folder / "model.safetensors", {"a": torch.zeros(5000)}
    ),
    "token": lambda: export_tokenizer(model, folder / "tokens"),
    "saved.bin": stream,
}
for name, work in WORK.items():
    try:
        work()
    except OSError as error:
        named, inside = Path(error.filename).name, str(error.filename).startswith(str(folder))
        print(error.errno, name in named, inside)
"""


def test_a_file_that_is_too_large_is_named_whoever_writes_it(tmp_path: Path) -> None:
    """A limit as `ulimit -f` sets it. The first write of a file that fails does not say of which it
    was."""
    done = python("-c", WRITERS, str(tmp_path), str(DEMO), most_bytes=1024, stdout=subprocess.PIPE)
    assert done.stdout.splitlines() == ["27 True True"] * 5, done.stdout + done.stderr


def test_a_run_that_meets_a_limit(tmp_path: Path) -> None:
    output = tmp_path / "recipe.yaml"
    done = python(
        "-m",
        "quantflow.cli.main",
        "init",
        "--model",
        str(DEMO),
        "--output",
        str(output),
        most_bytes=100,
    )
    assert (
        done.returncode == 4
        and done.stderr.startswith("quantflow: file too large\n")
        and "ulimit -f" in done.stderr
    )
    assert "recipe.yaml: File too large" in done.stderr and "Traceback" not in done.stderr


def test_what_is_in_the_place_of_what_cannot_be_found(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "gone").symlink_to("nowhere")
    assert absent(tmp_path / "a", "directory") == "a link that leads back to itself"
    assert (
        absent(tmp_path / "a" / "x" / "y", "file")
        == f"under {tmp_path / 'a'}, a link that leads back to itself"
    )
    assert absent(tmp_path / "gone", "file") == "a link to nowhere, which is not there"
    assert (
        absent(tmp_path / "other", "file")
        == absent(tmp_path / "o\0", "file")
        == absent(Path("x" * 5000), "file")
        == "no such file"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "a"],
        ["plan", "a", "--model", str(DEMO)],
        ["run", "w4", "--model", "a"],
        ["run", "w4", "--model", str(DEMO), "--output", "a"],
        ["run", "w4", "--model", str(DEMO), "--output", "a/b"],
        ["report", "a"],
        ["verify", "a"],
        ["generate", "a", "hello"],
        ["init", "--model", str(DEMO), "--output", "a"],
        ["init", "--model", "a"],
    ],
    ids=lambda value: " ".join(value).replace(str(DEMO), "DIR"),
)
def test_links_in_a_circle(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    done = invoke(*arguments)
    assert done.exit_code == 2 and " a" in done.stderr and "Traceback" not in done.stderr
    assert "a link that leads back to itself" in done.stderr or "Symlink loop" in done.stderr


def test_an_error_keeps_the_name_that_it_has() -> None:
    with pytest.raises(OSError) as caught, naming("outer"), naming("inner"):
        raise OSError(28, "No space left on device")
    assert (
        caught.value.filename == "inner" and "inner: No space left" in translate(caught.value)[2][0]
    )
