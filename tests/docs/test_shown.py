"""What the pages show, run: every command, with little text and few tokens, every recipe and
snippet, and LMDeploy's tutorial from chat to the table of comparisons. One file, so that one
process makes what it is run on, and one store keeps what several commands quantise."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from safetensors.torch import load_file

from quantflow import LLM, SamplingParams
from quantflow.cli.main import app
from quantflow.formats.reader import Weights
from quantflow.recipe import Recipe, read_recipe
from quantflow.stages.registry import STAGES, load_recipe
from tests.helpers.pages import (
    FOREIGN,
    OURS,
    ROOT,
    SHELLS,
    Block,
    Command,
    blocks,
    commands,
    inline_commands,
    inline_settings,
    pages,
    run_python,
)
from tests.helpers.places import ALWAYS, provide
from tests.helpers.runs import invoke, reduced
from tests.helpers.serving import LMDEPLOY_BODY, Running, serving
from tests.helpers.shown import ADDRESS, run_quantflow


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where it is run: what the pages name is made there (`provide`). With one store, so that a
    recipe quantises once."""
    root = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTFLOW_STORE", str(root / "store"))
        patch.chdir(root)
        provide(ALWAYS)
        yield root


@pytest.fixture
def inside(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sandbox, as the current directory. lm_eval puts what torch finds out about the machine
    into its results, which takes seconds."""
    monkeypatch.chdir(sandbox)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "a machine")
    return sandbox


@pytest.fixture(scope="module")
def server(sandbox: Path) -> Iterator[Running]:
    """What `http://127.0.0.1:23333` on a page means."""
    provide("artifacts/demo_w4_kv8")
    with serving(sandbox / "artifacts" / "demo_w4_kv8") as running:
        yield running


COMMANDS = commands()
UNIQUE = list({command.text: command for command in COMMANDS if command.program in OURS}.values())
RUN_BY_THEMSELVES = {
    "check", "docs", "setup", "wheel-check", "demo-chat", "test", "lint", "kernel-report",
    "bench-gpu", "tune-gpu", "bench-cpu", "clean",
}  # fmt: skip
"""Targets of make that are no command of QuantFlow's, take minutes, or need a package (`demo-chat`,
which tests/quality/test_smollm2.py runs): that they exist is all that is looked at here."""
OPTIONS = {
    name: {
        flag for parameter in verb.params for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    | {"--help"}
    for name, verb in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
}


@pytest.mark.parametrize(
    "command", UNIQUE, ids=[re.sub(r"[^\w.-]+", "-", c.text)[:70] for c in UNIQUE]
)
def test_it_runs(
    command: Command,
    inside: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provide(command.text)
    address = request.getfixturevalue("server").address if ADDRESS in command.text else ADDRESS
    if command.program == "quantflow":
        run_quantflow(command.text, {"DIR": str(tmp_path / "out"), ADDRESS: address}, monkeypatch)
    elif command.program == "make":
        run_make(command.text, monkeypatch)
    elif command.text.startswith("python -m "):
        run_module(command.text, monkeypatch)
    else:
        run_program(command.text.replace(ADDRESS, address))


def run_make(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What make would do is asked of make; the commands of ours among it are run."""
    words = shlex.split(text.partition(" < ")[0])  # what stands behind is the shell's
    command = [*words, "--dry-run", "--no-print-directory", "-C", str(ROOT), "QUANTFLOW=quantflow"]
    # `make test` runs this
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    said = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert said.returncode == 0, said.stderr
    target = words[1]
    found = [line for line in said.stdout.splitlines() if line.startswith("quantflow ")]
    assert found or target in RUN_BY_THEMSELVES, f"what does make {target} run?"
    for line in found if target not in RUN_BY_THEMSELVES else ():
        run_quantflow(line, {}, monkeypatch)


def run_module(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m`, in this process: imports of seconds are done once."""
    _, _, name, *arguments = shlex.split(text)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    # another test may have imported it, and runpy warns of that
    monkeypatch.delitem(sys.modules, name, raising=False)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_program(text: str) -> None:
    """curl, in a shell, in the sandbox."""
    if not shutil.which("curl"):
        pytest.skip("there is no curl")
    text = text.replace('"max_tokens": 64', '"max_tokens": 4')
    text = re.sub(r"^curl\b", "curl --silent --fail-with-body", text)
    done = subprocess.run(text, shell=True, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_none_is_left_out() -> None:
    """Counted a second time, with no regard to how a line goes on."""
    shown = sum(
        len(re.findall(r"^[ \t]*(?:\$ )?quantflow ", block.text, re.M)) for block in blocks()
    )
    assert shown == sum(command.program == "quantflow" for command in COMMANDS)
    assert {command.program for command in COMMANDS} <= {*OURS, *FOREIGN}
    assert {
        text.split()[1]
        for text in [
            *(c.text for c in COMMANDS if c.program == "quantflow"),
            *(text for _, text in inline_commands()),
        ]
    } >= {*OPTIONS}, "a verb is on no page"
    for page in pages():
        assert not re.search(r"^[ \t]+```|^~~~", page.read_text(encoding="utf-8"), re.M), (
            f"{page} has a fence that is not looked into"
        )
    for block in blocks():
        # where a block says that it is commands, every line is one that is known
        if block.language in SHELLS[1:]:
            for line in block.text.replace("\\\n", " ").splitlines():
                assert line.removeprefix("$ ").split()[0] in (*OURS, *FOREIGN, "#"), (
                    f"{block.page}:{block.line} {line}"
                )


@pytest.mark.parametrize(
    ("page", "text"),
    [*inline_commands(), *[(c.page, c.whole) for c in COMMANDS if c.program == "quantflow"]],
)
def test_its_verb_and_options_exist(page: str, text: str) -> None:
    verb, *words = re.sub(r"[\[\]]", " ", text).split()[1:]
    assert verb in OPTIONS, f"{page}: {text}"
    strange = {word.partition("=")[0] for word in words if word.startswith("--")} - OPTIONS[verb]
    assert not strange, f"{page}: {text}"


def test_the_check_itself() -> None:
    assert (
        "--requantize" in OPTIONS["export"]
        and "--set" in OPTIONS["run"]
        and "--no-transformers" in OPTIONS["bench"]
    )
    with pytest.raises(AssertionError):
        test_its_verb_and_options_exist("x", "quantflow run R --no-such-option")
    with pytest.raises(AssertionError):
        test_its_verb_and_options_exist("x", "quantflow no-such-verb")


YAML = [block for block in blocks() if block.language == "yaml"]
PYTHON = [block for block in blocks() if block.language == "python"]


def named(found: list[Block]) -> list[str]:
    return [f"{block.page}-{block.line}" for block in found]


def validated(value: Any) -> Recipe:
    """A part of a recipe within a whole one. Raises ValidationError."""
    if isinstance(value, list):
        value = {"stages": value}
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in STAGES:
        value = {"stages": [value]}
    return read_recipe({"name": "part", "stages": ["rtn"], **value}, STAGES)


@pytest.mark.parametrize("block", YAML, ids=named(YAML))
def test_yaml_is_a_recipe_or_a_part_of_one(block: Block, inside: Path) -> None:
    value = yaml.safe_load(block.text)
    if not (isinstance(value, dict) and {"name", "stages"} <= value.keys()):
        validated(value)
        return
    provide(block.text)
    path = inside / "shown.yaml"
    path.write_text(block.text, encoding="utf-8")
    recipe = load_recipe(path)
    if Path(recipe.model or "").is_dir():
        planned = invoke(*reduced(["plan", str(path), "--output", "planned"]))
        assert planned.exit_code == 0, planned.stderr


@pytest.mark.parametrize(("page", "text"), inline_settings())
def test_settings_in_a_sentence_are_what_a_recipe_takes(page: str, text: str) -> None:
    value = yaml.safe_load(text)
    if {*value} & {*STAGES, "calibration", "weights"}:
        key, settings = next(iter(value.items()))
        if key == "calibration":
            settings.setdefault("data", "c4")
        if key == "pack":
            settings.setdefault("format", "awq")
        if key == "evaluate":
            settings.setdefault("data", "c4")
        validated(value)


@pytest.mark.parametrize("block", PYTHON, ids=named(PYTHON))
def test_python_runs(block: Block, inside: Path) -> None:
    provide(block.text)
    run_python(block)


PAGE = "docs/from_lmdeploy.md"


def shown(start: str) -> str:
    """The first command of the page that begins so."""
    found = [
        text
        for page, text in inline_commands(start.split()[0])
        if page == PAGE and text.startswith(start)
    ]
    assert found, f"{PAGE} does not show {start}"
    return found[0]


def bare(text: str) -> str:
    """Without what may be left out."""
    return re.sub(r"\s*\[[^\]]*\]", "", text)


@contextmanager
def served(command: str) -> Iterator[str]:
    """The address of a server that the page's command starts, on a free port."""
    words = shlex.split(command.replace("--port 23333", "--port 0"))[1:]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "quantflow.cli.main", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout
        ready = process.stdout.readline()
        port = re.search(r":(\d+) serves", ready)
        assert port, ready
        yield f"http://127.0.0.1:{port[1]}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.communicate()


def fetched(address: str, body: Any = None, key: str = "") -> str:
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    with urllib.request.urlopen(
        urllib.request.Request(address, data, headers), timeout=180
    ) as answer:
        return str(answer.read().decode())


def test_the_five_lines_on_internlm(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them as the page has it, for two ranks."""
    provide("internlm-chat-7b")

    def run(start: str) -> str:
        return run_quantflow(bare(shown(start)), {"DIR": "internlm-chat-7b"}, monkeypatch)

    run("quantflow run recipes/calibrate.yaml")
    statistics = load_file("quant_output/calibrate/calibration.safetensors")
    assert statistics["model.layers.0.key.absmax"].shape == (4, 64)
    assert "No weight was changed" in run("quantflow run recipes/kv_qparams.yaml")
    assert load_file("quant_output/kv_qparams/kv_qparams.safetensors").keys() == {
        f"model.layers.{i}.self_attn.{part}"
        for i in range(2)
        for part in ("k_scale", "k_zero_point", "v_scale", "v_zero_point")
    }
    run("quantflow run recipes/auto_awq.yaml")
    config = json.loads(Path("quant_output/auto_awq/config.json").read_text())[
        "quantization_config"
    ]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("awq", 4, 128)
    run("quantflow export quant_output/auto_awq --format turbomind --tp 2")
    assert "tensor_para_size = 2" in Path("workspace/triton_models/weights/config.ini").read_text()
    here, there = Weights(Path("quant_output/auto_awq")), Weights(Path("workspace"))
    assert here.modules == there.modules and len(here.modules) == 14
    assert "ready" in run(
        "quantflow serve workspace --host 0.0.0.0 --port 23333 --max-batch-size 64"
    )


def test_the_tutorial_on_the_demo_model(
    sandbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("recipes", "calib_data", "c4.jsonl"):
        Path(name).symlink_to(sandbox / name)
    model = "calib_data/demo_model"

    def run(start: str, more: str = "", **places: str) -> str:
        return run_quantflow(
            f"{bare(shown(start))} {more}", {"DIR": model, "MODEL": model, **places}, monkeypatch
        )

    # Chat with a local model; convert for two ranks; chat with the workspace
    assert "answer" in run("quantflow chat DIR")
    run("quantflow export DIR --format turbomind --output workspace", "--tp 2")
    assert (
        tmp_path / "workspace" / "triton_models" / "weights" / "layers.0.attention.w_qkv.1.weight"
    ).is_file()
    assert "answer" in run("quantflow chat workspace")

    # Serve it to others, with a key; the client; the web page; the tutorial's request
    subprocess.run(
        shown("python -c").replace("python", shlex.quote(sys.executable), 1),
        shell=True,
        check=True,
        timeout=180,
    )
    with served(
        shown("quantflow serve DIR --host 0.0.0.0 --port 23333 --api-key-file").replace(
            "DIR", "workspace"
        )
    ) as address:
        client = re.sub(r"[\[\]]", "", shown("quantflow chat http://")).replace(
            "http://localhost:23333", address
        )
        assert "answer" in run_quantflow(client, {}, monkeypatch)
        key, question = (
            Path("keys").read_text().strip(),
            {**LMDEPLOY_BODY, "messages": "What is a table?", "max_tokens": 8},
        )
        assert "<title>" in fetched(address) and "/v1/chat/completions" in fetched(
            f"{address}/openapi.json", key=key
        )
        answer = json.loads(fetched(f"{address}/v1/chat/completions", question, key))
        assert (
            answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"] <= 8
        )

    # Python: a prompt in the dialogue format, growing lists of tokens, a session that goes on
    llm = LLM("workspace", device="cpu", cache_bytes=2**24)
    tokens = llm.encode(llm.get_prompt("What is a table?"), special=False)
    lists = list(
        llm.stream_infer(
            session_id=0, input_ids=tokens, params=SamplingParams(max_tokens=5, ignore_eos=True)
        )
    )
    assert [len(found) for found in lists] == [1, 2, 3, 4, 5] and llm.decode(lists[-1])
    assert all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(lists))
    more = list(
        llm.stream_infer(
            session_id=0, input_ids=llm.encode(" And"), params=SamplingParams(max_tokens=2)
        )
    )
    assert more and len(llm.engine.sessions[0].tokens) > len(tokens) + 5

    # Calibrate; KV parameters, in a workspace with quant_policy 4; 4-bit weights
    run("quantflow run recipes/calibrate.yaml")
    run("quantflow run recipes/kv_qparams.yaml")
    run(
        "quantflow run recipes/kv_qparams.yaml",
        "--set stages.pack.format=turbomind --output quant_output/kv_workspace",
    )
    assert (
        "quant_policy = 4"
        in Path("quant_output/kv_workspace/triton_models/weights/config.ini").read_text()
    )
    assert (
        "int8, calibrated"
        in LLM("quant_output/kv_workspace", device="cpu", cache_bytes=2**24).engine.describe()[
            "KV cache"
        ]
    )
    run("quantflow run recipes/auto_awq.yaml")
    found = json.loads(run("quantflow bench DIR", "--json", DIR="quant_output/auto_awq"))
    assert [row["case"]["name"] for row in found["rows"]] == [
        "full precision",
        "KV int8",
        "weights",
        "weights + KV int8",
    ]
    assert all(row["decode_tokens_s"] > 0 for row in found["rows"])
    assert found["rows"][2]["weight_bytes"] < found["rows"][0]["weight_bytes"]
