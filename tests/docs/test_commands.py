"""Every command that a page shows is run, with little text and few tokens; where one is only mentioned, its verb and options exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from quantflow.cli.main import app
from tests.helpers.pages import FOREIGN, OURS, ROOT, SHELLS, Command, blocks, commands, inline_commands, pages
from tests.helpers.serving import Running
from tests.helpers.shown import ADDRESS, run_quantflow

COMMANDS = commands()
UNIQUE = list({command.text: command for command in COMMANDS if command.program in OURS}.values())
RUN_BY_THEMSELVES = {"test", "lint", "kernel-report", "bench-gpu", "bench-cpu", "clean"}
"""Targets of make that are no command of QuantFlow's, or take minutes: that they exist is all that is looked at here."""


@pytest.mark.parametrize("command", UNIQUE, ids=[re.sub(r"[^\w.-]+", "-", c.text)[:70] for c in UNIQUE])
def test_it_runs(command: Command, inside: Path, server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if command.program == "quantflow":
        run_quantflow(command.text, {"DIR": str(tmp_path / "out"), ADDRESS: server.address}, monkeypatch)
    elif command.program == "make":
        run_make(command.text, monkeypatch)
    else:
        run_program(command.text, server)


def run_make(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What make would do is asked of make; the commands of ours among it are run."""
    command = [*shlex.split(text), "--dry-run", "--no-print-directory", "-C", str(ROOT), "QUANTFLOW=quantflow"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}  # `make test` runs this
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert said.returncode == 0, said.stderr
    target = shlex.split(text)[1]
    found = [line for line in said.stdout.splitlines() if line.startswith("quantflow ")]
    assert found or target in RUN_BY_THEMSELVES, f"what does make {target} run?"
    for line in found:
        run_quantflow(line, {}, monkeypatch)


def run_program(text: str, server: Running) -> None:
    """curl, python: in a shell, in the sandbox."""
    words = shlex.split(text)
    if words[0] == "curl" and not shutil.which("curl"):
        pytest.skip("there is no curl")
    text = text.replace(ADDRESS, server.address).replace('"max_tokens": 64', '"max_tokens": 4')
    text = re.sub(r"^python\b", shlex.quote(sys.executable), re.sub(r"^curl\b", "curl --silent --fail-with-body", text))
    done = subprocess.run(text, shell=True, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_none_is_left_out() -> None:
    """Counted a second time, with no regard to how a line goes on."""
    shown = sum(len(re.findall(r"^[ \t]*(?:\$ )?quantflow ", block.text, re.M)) for block in blocks())
    assert shown == sum(command.program == "quantflow" for command in COMMANDS) > 10
    assert {command.program for command in COMMANDS} <= {*OURS, *FOREIGN}
    for page in pages():
        assert not re.search(r"^[ \t]+```|^~~~", page.read_text(encoding="utf-8"), re.M), f"{page} has a fence that is not looked into"
    for block in blocks():
        if block.language in SHELLS[1:]:  # where a block says that it is commands, every line is one that is known
            for line in block.text.replace("\\\n", " ").splitlines():
                assert line.removeprefix("$ ").split()[0] in (*OURS, *FOREIGN, "#"), f"{block.page}:{block.line} {line}"


OPTIONS = {
    name: {flag for parameter in verb.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for name, verb in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
}


@pytest.mark.parametrize(("page", "text"), [*inline_commands(), *[(c.page, c.whole) for c in COMMANDS if c.program == "quantflow"]])
def test_its_verb_and_options_exist(page: str, text: str) -> None:
    verb, *words = re.sub(r"[\[\]]", " ", text).split()[1:]
    assert verb in OPTIONS, f"{page}: {text}"
    strange = {word.partition("=")[0] for word in words if word.startswith("--")} - OPTIONS[verb]
    assert not strange, f"{page}: {text}"


def test_the_check_itself() -> None:
    assert "--requantize" in OPTIONS["export"] and "--set" in OPTIONS["run"] and "--no-transformers" in OPTIONS["bench"]
    with pytest.raises(AssertionError):
        test_its_verb_and_options_exist("x", "quantflow run R --no-such-option")
    with pytest.raises(AssertionError):
        test_its_verb_and_options_exist("x", "quantflow no-such-verb")
