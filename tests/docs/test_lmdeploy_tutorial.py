"""What LMDeploy's tutorial has its users do, from chat to the table of comparisons, by the commands of docs/from_lmdeploy.md."""

from __future__ import annotations

import json
import os
import re
import shlex
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
from safetensors.torch import load_file

from quantflow import LLM, SamplingParams
from quantflow.formats.reader import Weights
from tests.helpers.pages import ROOT, inline_commands
from tests.helpers.serving import LMDEPLOY_BODY
from tests.helpers.shown import run_quantflow

PAGE = "docs/from_lmdeploy.md"


def shown(start: str) -> str:
    """The first command of the page that begins so."""
    found = [text for page, text in inline_commands(start.split()[0]) if page == PAGE and text.startswith(start)]
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
        [sys.executable, "-m", "quantflow.cli.main", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        assert process.stdout
        ready = process.stdout.readline()
        port = re.search(r":(\d+) serves", ready)
        assert port, ready
        yield f"http://127.0.0.1:{port[1]}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def fetched(address: str, body: Any = None, key: str = "") -> str:
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=60) as answer:
        return str(answer.read().decode())


def test_the_five_lines_on_internlm(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them as the page has it, for two ranks."""

    def run(start: str) -> str:
        return run_quantflow(bare(shown(start)), {"DIR": "internlm-chat-7b"}, monkeypatch)

    run("quantflow run recipes/calibrate.yaml")
    statistics = load_file("quant_output/calibrate/calibration.safetensors")
    assert statistics["model.layers.0.key.absmax"].shape == (4, 64)
    assert "No weight was changed" in run("quantflow run recipes/kv_qparams.yaml")
    assert load_file("quant_output/kv_qparams/kv_qparams.safetensors").keys() == {
        f"model.layers.{i}.self_attn.{part}" for i in range(2) for part in ("k_scale", "k_zero_point", "v_scale", "v_zero_point")
    }
    run("quantflow run recipes/auto_awq.yaml")
    config = json.loads(Path("quant_output/auto_awq/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("awq", 4, 128)
    run("quantflow export quant_output/auto_awq --format turbomind --tp 2")
    assert "tensor_para_size = 2" in Path("workspace/triton_models/weights/config.ini").read_text()
    here, there = Weights(Path("quant_output/auto_awq")), Weights(Path("workspace"))
    assert here.modules == there.modules and len(here.modules) == 14
    assert "ready" in run("quantflow serve workspace --host 0.0.0.0 --port 23333 --max-batch-size 64")


def test_the_tutorial_on_the_demo_model(sandbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("recipes", "calib_data", "c4.jsonl"):
        Path(name).symlink_to(sandbox / name)
    model = "calib_data/demo_model"

    def run(start: str, more: str = "", **places: str) -> str:
        return run_quantflow(f"{bare(shown(start))} {more}", {"DIR": model, "MODEL": model, **places}, monkeypatch)

    # Chat with a local model; convert for two ranks; chat with the workspace
    assert "answer" in run("quantflow chat DIR")
    run("quantflow export DIR --format turbomind --output workspace", "--tp 2")
    assert (tmp_path / "workspace" / "triton_models" / "weights" / "layers.0.attention.w_qkv.1.weight").is_file()
    assert "answer" in run("quantflow chat workspace")

    # Serve it to others, with a key; the client; the web page; the tutorial's request
    subprocess.run(shown("python -c").replace("python", shlex.quote(sys.executable), 1), shell=True, check=True, timeout=60)
    with served(shown("quantflow serve DIR --host 0.0.0.0 --port 23333 --api-key-file").replace("DIR", "workspace")) as address:
        client = re.sub(r"[\[\]]", "", shown("quantflow chat http://")).replace("http://localhost:23333", address)
        assert "answer" in run_quantflow(client, {}, monkeypatch)
        key, question = Path("keys").read_text().strip(), {**LMDEPLOY_BODY, "messages": "What is a table?", "max_tokens": 8}
        assert "<title>" in fetched(address) and "/v1/chat/completions" in fetched(f"{address}/openapi.json", key=key)
        answer = json.loads(fetched(f"{address}/v1/chat/completions", question, key))
        assert answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"] <= 8

    # Python: a prompt in the dialogue format, growing lists of tokens, a session that goes on
    llm = LLM("workspace", device="cpu", cache_bytes=2**24)
    tokens = llm.encode(llm.get_prompt("What is a table?"), special=False)
    lists = list(llm.stream_infer(session_id=0, input_ids=tokens, params=SamplingParams(max_tokens=5, ignore_eos=True)))
    assert [len(found) for found in lists] == [1, 2, 3, 4, 5] and llm.decode(lists[-1])
    assert all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(lists))
    more = list(llm.stream_infer(session_id=0, input_ids=llm.encode(" And"), params=SamplingParams(max_tokens=2)))
    assert more and len(llm.engine.sessions[0].tokens) > len(tokens) + 5

    # Calibrate; KV parameters, in a workspace with quant_policy 4; 4-bit weights
    run("quantflow run recipes/calibrate.yaml")
    run("quantflow run recipes/kv_qparams.yaml")
    run("quantflow run recipes/kv_qparams.yaml", "--set stages.pack.format=turbomind --output quant_output/kv_workspace")
    assert "quant_policy = 4" in Path("quant_output/kv_workspace/triton_models/weights/config.ini").read_text()
    assert "int8, calibrated" in LLM("quant_output/kv_workspace", device="cpu", cache_bytes=2**24).engine.describe()["KV cache"]
    run("quantflow run recipes/auto_awq.yaml")
    found = json.loads(run("quantflow bench DIR", "--json", DIR="quant_output/auto_awq"))
    assert [row["case"]["name"] for row in found["rows"]] == ["full precision", "KV int8", "weights", "weights + KV int8"]
    assert all(row["decode_tokens_s"] > 0 for row in found["rows"])
    assert found["rows"][2]["weight_bytes"] < found["rows"][0]["weight_bytes"]
