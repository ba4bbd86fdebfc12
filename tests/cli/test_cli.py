"""The verbs, their options, exit codes and messages are a contract."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml

import quantflow
import quantflow.pipeline.run as pipeline
from quantflow.cli.console import reporting, translate
from quantflow.cli.main import VERBS, purpose
from quantflow.errors import (
    GateError,
    ModelError,
    Problem,
    QuantFlowError,
    ResourceError,
    UserError,
)
from tests.helpers.runs import STAGES, Bench, invoke, make_bench

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch", "transformers", "datasets", "safetensors", "tokenizers", "numpy", "triton",
    "huggingface_hub",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A bench with a finished artifact."""
    bench = make_bench(tmp_path_factory.mktemp("cli"))
    assert invoke("run", bench.recipe()).exit_code == 0
    return bench


# Help


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=180
    )


@pytest.mark.parametrize(
    "verb", [None, "init", "run", "plan", "sensitivity", "release", "report", "inspect", "eval"]
)
def test_help_imports_nothing_heavy(verb: str | None) -> None:
    arguments = [verb, "--help"] if verb else ["--help"]
    done = python(
        f"import sys; sys.argv = ['quantflow', *{arguments!r}]\nfrom quantflow.cli.main import"
        f" main\ntry:\n    main()\nfinally:\n    print(sorted(set({HEAVY!r}) & set(sys.modules)),"
        " file=sys.stderr)"
    )
    assert done.returncode == 0 and done.stderr.strip().splitlines()[-1] == "[]", done.stderr
    assert "Usage" in done.stdout


def test_help_is_quick() -> None:
    """Half a second of processor time, other programs' work left out; a first run may have to write
    bytecode."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (
            python(
                "import sys; sys.argv = ['quantflow', '--help']; from quantflow.cli.main import"
                " main; main()"
            ).returncode
            == 0
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(spent) < 0.5


def test_the_verbs_and_their_options() -> None:
    top = invoke("--help")
    verbs = (
        "run", "plan", "sensitivity", "release", "report", "compare", "inspect", "eval", "verify",
        "generate", "bench", "schema",
    )  # fmt: skip
    assert top.exit_code == 0 and all(verb in top.stdout for verb in verbs)
    options = {
        "init": {
            "--model",
            "--bits",
            "--for",
            "--data",
            "--output",
            "--force",
            "--json",
            "--debug",
        },
        "run": {"--model", "--output", "--set", "--device", "--fresh", "--json", "--debug"},
        "plan": {
            "--model",
            "--output",
            "--set",
            "--device",
            "--config-only",
            "--fit",
            "--context",
            "--batch",
            "--tp",
            "--sensitivity",
            "--json",
            "--debug",
        },
        "sensitivity": {
            "--data",
            "--field",
            "--bits",
            "--group-size",
            "--symmetric",
            "--samples",
            "--length",
            "--skip",
            "--budget",
            "--average-bits",
            "--granularity",
            "--output",
            "--fresh",
            "--device",
            "--json",
            "--debug",
        },
        "report": {"--output", "--debug"},
        "compare": {"--output", "--json", "--debug"},
        "release": {
            "--output",
            "--previous",
            "--tolerance",
            "--set",
            "--device",
            "--builder-id",
            "--invocation-id",
            "--json",
            "--debug",
        },
        "inspect": {"--config-only", "--json", "--debug"},
        "eval": {
            "--reference",
            "--data",
            "--field",
            "--windows",
            "--length",
            "--skip",
            "--engine",
            "--tasks",
            "--delimiter",
            "--few-shot",
            "--limit",
            "--batch",
            "--stop",
            "--max-tokens",
            "--output",
            "--mode",
            "--kv",
            "--device",
            "--json",
            "--debug",
        },
        "verify": {"--reference", "--device", "--json", "--debug"},
        "generate": {
            "--prompt",
            "--chat",
            "--max-tokens",
            "--temperature",
            "--top-p",
            "--top-k",
            "--repetition-penalty",
            "--seed",
            "--stop",
            "--stream",
            "--mode",
            "--kv",
            "--session-len",
            "--cache-max-entry-count",
            "--verbose",
            "--tp",
            "--dialogue",
            "--eager",
            "--device",
            "--json",
            "--debug",
        },
        "bench": {
            "--reference",
            "--batch",
            "--prompt",
            "--new",
            "--transformers",
            "--no-transformers",
            "--gguf",
            "--output",
            "--mode",
            "--device",
            "--json",
            "--debug",
        },
        "schema": {"--markdown", "--debug"},
    }
    for verb, expected in options.items():
        assert (
            set(re.findall(r"--[a-z-]+", invoke(verb, "--help").stdout)) - {"--help"} == expected
        ), verb


def test_nothing_given_shows_the_verbs_in_order_of_use() -> None:
    result = invoke()
    assert "Usage" in result.output and result.exit_code == 2
    listed = re.findall(r"^  ([a-z]+)  ", result.output, re.M)
    assert listed == [verb for verbs in VERBS.values() for verb in verbs] and len(listed) == len(
        set(listed)
    )
    assert (
        listed.index("plan")
        < listed.index("run")
        < listed.index("verify")
        < listed.index("generate")
        < listed.index("schema")
    )
    assert [
        line.rstrip(":") for line in result.output.splitlines() if re.fullmatch(r"[A-Z]\w+:", line)
    ] == ["Options", *VERBS]


def test_what_a_verb_is_for_is_one_line_and_how_its_help_begins() -> None:
    shown = invoke("--help").output.splitlines()
    for verbs in VERBS.values():
        for name, verb in verbs.items():
            words = purpose(verb)
            assert any(line.split(maxsplit=1) == [name, words] for line in shown), name
            assert (
                " ".join(invoke(name, "--help").output.split())
                .partition("[OPTIONS]")[2]
                .find(words)
                >= 0
            ), name


@pytest.mark.parametrize(
    "arguments", [("-h",), *((verb, "-h") for verbs in VERBS.values() for verb in verbs)]
)
def test_h_is_help_everywhere(arguments: tuple[str, ...]) -> None:
    short, long = invoke(*arguments), invoke(*arguments[:-1], "--help")
    assert short.exit_code == 0 and short.stdout == long.stdout and "-h, --help" in short.stdout


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version(option: str) -> None:
    result = invoke(option)
    assert result.exit_code == 0 and result.stdout == f"quantflow {quantflow.__version__}\n"
    with open(ROOT / "pyproject.toml", "rb") as file:
        assert tomllib.load(file)["project"]["version"] == quantflow.__version__


# Schema


def test_schema_accepts_our_recipes(bench: Bench) -> None:
    result = invoke("schema")
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    for path in [bench.recipe(), *sorted((ROOT / "recipes").glob("*.yaml"))]:
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "a", "stages": ["gptk"]}, schema)


# Exit codes


class PanicException(BaseException):
    """As what a library written in Rust raises, which is no Exception."""


@pytest.mark.parametrize(
    ("error", "code", "fragments"),
    [
        (
            UserError(Problem("here", "this", "that", "do so")),
            2,
            ("1 problem", "here: this; expected that. do so"),
        ),
        (ModelError([Problem("a", "b"), Problem("c", "d")]), 2, ("2 problems", "a: b", "c: d")),
        (GateError("kl: too large"), 3, ("quality gate failed", "kl: too large")),
        (ResourceError("memory: not enough"), 4, ("memory: not enough",)),
        (
            OSError(errno.ENOSPC, "No space left on device", "/big/disk"),
            4,
            ("disk full", "/big/disk", "run the same command"),
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            4,
            ("disk full", "standard output: Disk quota exceeded"),
        ),
        (
            OSError(errno.EFBIG, "File too large", "/x/model.safetensors"),
            4,
            ("/x/model.safetensors: File too large", "ulimit -f"),
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "/x"),
            4,
            ("/x: Too many open files", "ulimit -n"),
        ),
        (
            OSError(errno.ELOOP, "Too many levels of symbolic links", "a"),
            2,
            ("a: Too many levels", "Mend the link"),
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "/x"),
            2,
            ("/x: File name too long", "shorter"),
        ),
        (
            OSError(errno.EIO, "Input/output error", "/bad/disk"),
            4,
            ("/bad/disk: Input/output error",),
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/srv/x"),
            2,
            ("/srv/x: Permission denied",),
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/cd/x"),
            2,
            ("not writable", "/cd/x: Read-only file system", "--output"),
        ),
        (MemoryError(), 4, ("out of memory", "calibration.samples", "quantflow plan")),
        (torch.OutOfMemoryError("CUDA out of memory"), 4, ("out of memory",)),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
            ),
            4,
            ("out of memory",),
        ),
        (KeyboardInterrupt(), 130, ("interrupted", "run the same command to go on")),
        (
            QuantFlowError("layer 3: was planned but not quantised"),
            1,
            ("internal error", "layer 3"),
        ),
        (
            RuntimeError("shapes [3] and [4]"),
            1,
            ("internal error", "RuntimeError: shapes [3] and [4]", "--debug"),
        ),
        (AssertionError(), 1, ("internal error", "AssertionError")),
        (
            PanicException("index out of bounds: 7\nin it"),
            4,
            ("a library failed", "index out of bounds: 7. Run with --debug"),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_error_has_its_code_and_one_message(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    fragments: tuple[str, ...],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run", fail)
    result = invoke("run", bench.recipe())
    message = " ".join(result.stderr.split())
    assert result.exit_code == code == translate(error)[0]
    assert all(fragment in message for fragment in fragments), message
    assert "Traceback" not in result.output and message.count("quantflow:") == 1
    debug = invoke("run", bench.recipe(), "--debug")
    assert debug.exit_code == code and "Traceback" in debug.stderr


def test_messages_are_no_markup(bench: Bench) -> None:
    """Square brackets in what a user wrote stay as they are."""
    result = invoke("run", bench.recipe(), "--model", str(bench.root / "[bold]x[/bold]"))
    assert result.exit_code == 2 and "[bold]x[/bold]" in result.stderr


# JSON and plain output


def test_run_gives_json_on_stdout_and_progress_on_stderr(bench: Bench) -> None:
    result = invoke("run", bench.recipe(), "--fresh", "--json")
    found = json.loads(result.stdout)
    assert set(found) == {"output", "existed", "quality", "failed_gates", "warnings", "seconds"}
    assert (
        found["existed"] is False
        and found["failed_gates"] == []
        and set(found["quality"]) == {"weights", "kv", "weights_and_kv"}
    )
    assert list(found["seconds"]) == [
        "tokenize",
        "hash",
        "calibrate",
        "quantise",
        "pack",
        "evaluate",
        "write",
    ]
    assert "quantise: 2 of 2 layers" in result.stderr and "\x1b" not in result.stderr, (
        "piped progress is plain lines"
    )


def test_a_failed_gate_still_gives_json(bench: Bench) -> None:
    result = invoke(
        "run",
        bench.recipe(stages=[*STAGES, bench.evaluate(gates={"kl_mean": 1e-9})]),
        "--json",
        "--output",
        bench.root / "out" / "gated",
    )
    assert result.exit_code == 3
    assert json.loads(result.stdout)["failed_gates"][0].startswith("kl_mean is ")


def test_eval_json_keys(bench: Bench) -> None:
    base = (
        "eval", bench.output, "--reference", bench.model, "--data", bench.root / "eval.txt",
        "--windows", 3, "--length", 16,
    )  # fmt: skip
    result = invoke(*base, "--json")
    found = json.loads(result.stdout)
    assert list(found) == [
        "perplexity",
        "reference_perplexity",
        "kl_mean",
        "kl_p99",
        "top1",
        "tokens",
    ]
    assert (
        found["tokens"] == 48 and 0 < found["kl_mean"] < found["kl_p99"] and 0 < found["top1"] <= 1
    )
    assert "KL mean" in invoke(*base).stdout
    other = json.loads(invoke(*base, "--json", "--skip", 20).stdout)
    assert other["tokens"] == 48 and other["reference_perplexity"] != found["reference_perplexity"]


def test_eval_of_a_model_against_itself(bench: Bench) -> None:
    result = invoke(
        "eval",
        bench.model,
        "--reference",
        bench.model,
        "--data",
        bench.root / "eval.txt",
        "--windows",
        2,
        "--length",
        16,
        "--json",
    )
    found = json.loads(result.stdout)
    assert (found["kl_mean"], found["kl_p99"], found["top1"]) == (0.0, 0.0, 1.0) and found[
        "perplexity"
    ] == found["reference_perplexity"]


# Inspect


def test_inspect_a_checkpoint(bench: Bench) -> None:
    found = json.loads(invoke("inspect", bench.model, "--json").stdout)
    assert (
        found["architecture"] == "Llama"
        and found["format"] == "full precision"
        and found["artifact"] is None
    )
    assert (
        found["layers"],
        found["hidden"],
        found["heads"],
        found["kv_heads"],
        found["files"],
    ) == (2, 64, 4, 2, 1)
    assert len(found["modules"]) == 14 and set(found["modules"].values()) == {"BF16"}
    text = invoke("inspect", bench.model).stdout
    assert "14 × BF16" in text and "full precision" in text


def test_inspect_an_artifact(bench: Bench) -> None:
    found = json.loads(invoke("inspect", bench.output, "--json").stdout)
    assert found["format"] == "compressed-tensors" and len(set(found["modules"].values())) == 1
    artifact = found["artifact"]
    assert artifact["status"] == "complete" and set(artifact["formats"]) == {
        "compressed-tensors",
        "awq",
        "gptq_v2",
    }
    assert (
        artifact["kv_qparams"]["granularity"] == "tensor"
        and len(artifact["kv_qparams"]["layers"]) == 2
    )
    assert (
        len(artifact["source"]["weights"]) == 64 and artifact["quality"]["weights"]["tokens"] == 128
    )
    text = invoke("inspect", bench.output).stdout
    assert (
        "KV cache" in text
        and "8 bit, one scale a tensor" in text
        and "Quality on held-out text" in text
    )
    for form in ("awq", "gptq_v2"):
        assert json.loads(invoke("inspect", bench.output / form, "--json").stdout)["format"] == form


def test_inspect_refuses_what_is_no_model(bench: Bench, tmp_path: Path) -> None:
    for place, fragment in (
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path, "config.json"),
        (bench.root / "calib.txt", "a file; expected a model directory"),
    ):
        result = invoke("inspect", place)
        assert (
            result.exit_code == 2 and fragment in result.stderr and "Traceback" not in result.output
        )


def test_what_went_wrong_beside_an_error_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), reporting(debug=False):
        error = KeyboardInterrupt()
        error.add_note("and a layer's result could not be saved: No space left on device")
        raise error
    shown = capfd.readouterr().err.splitlines()
    assert shown[0] == "quantflow: interrupted"
    assert shown[-1] == "  and a layer's result could not be saved: No space left on device"


def test_a_terminal_of_ascii_is_no_harm(bench: Bench) -> None:
    command = [sys.executable, "-m", "quantflow.cli.main", "plan", str(bench.recipe())]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=180, env=environment
    )
    assert done.returncode == 0 and "14 ? W4 g16 asymmetric" in done.stdout, done.stderr


def test_brackets_in_a_path_are_no_markup(artifact: Path, tmp_path: Path) -> None:
    place = tmp_path / "[bold] [/x]"
    shutil.copytree(artifact, place)
    for command in (("inspect", place), ("verify", place), ("report", place)):
        result = invoke(*command)
        assert result.exit_code == 0, result.stderr
        assert "[bold] [/x]" in result.stdout
