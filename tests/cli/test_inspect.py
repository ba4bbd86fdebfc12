"""`quantflow inspect` of a model that is not quantised: whether it is supported, held against the
headers of its files and what is known of each family."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.helpers.runs import invoke
from tests.helpers.zoo import LAYERS, ZOO, specimen, write
from tests.models.test_translations import CASES

ENGINES = ("QuantFlow", "vLLM", "LMDeploy", "SGLang", "transformers", "llama.cpp")
EXPERTS = {"mixtral": 2 * (4 + 12), "mixtral_fused": 2 * (4 + 12), "qwen3_moe": 7 + 4 + 12}
# No gate in the first two; q, k and v, or gate and up, are one in the others.
PLAIN = {"opt": 2 * 6, "opt_prefixed": 2 * 6}
FUSED = {"phi3": 2 * 4, "phi4_mini": 2 * 4, "glm": 2 * 6, "glm4": 2 * 6}
LINEARS = {**EXPERTS, "qwen3_moe_fused": 2 * (4 + 12), **PLAIN, **FUSED}


def inspect(folder: Path, *options: str) -> dict[str, Any]:
    result = invoke("inspect", folder, "--json", *options)
    assert result.exit_code == 0, result.stderr
    summary: dict[str, Any] = json.loads(result.stdout)
    return summary


def answers(summary: dict[str, Any]) -> dict[str, str]:
    return {e["engine"].split()[0]: e["answer"] for e in summary["support"]["engines"]}


def header(folder: Path) -> dict[str, int]:
    """Each tensor's bytes."""
    item = {"F32": 4, "F16": 2, "BF16": 2}
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    return {n: math.prod(s.get_shape()) * item[s.get_dtype()] for n, s in slices.items()}


@pytest.mark.parametrize("name", ZOO)
def test_every_byte_of_a_family_is_quantised_or_kept_or_left_out(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, specimen(name))
    summary, there = inspect(folder), header(folder)
    support = summary["support"]
    assert support["problems"] == []
    assert support["quantised"]["tensors"] == LINEARS.get(name, LAYERS * 7)
    parts = [support["quantised"], *support["kept"].values()]
    left_out = sum(there[tensor] for tensor in summary["left_out"])
    assert sum(part["bytes"] for part in parts) + left_out == sum(there.values())
    assert answers(summary)["QuantFlow"] == answers(summary)["transformers"] == "yes"
    # transformers' names of a mixture's experts, of which the sources are one or many
    alone = inspect(folder, "--config-only")["support"]
    assert alone["quantised"] == support["quantised"] and alone["engines"] == support["engines"]


def test_a_model_that_every_engine_runs(tmp_path: Path) -> None:
    summary = inspect(write(tmp_path, specimen("llama_bias")))
    assert summary["support"]["written_as"] == "LlamaForCausalLM"
    assert answers(summary) == dict.fromkeys(ENGINES, "yes") | {"SGLang": "perhaps"}
    text = invoke("inspect", tmp_path).stdout
    assert "yes: computed by QuantFlow's own decoder" in text and "14 matrices" in text


def test_a_model_that_some_engines_run(tmp_path: Path) -> None:
    """StableLM's class is hosted, and neither TurboMind nor the GGUF writer has it."""
    summary = inspect(write(tmp_path, CASES["orion"]().specimen))
    support = summary["support"]
    assert support["written_as"] == "StableLmForCausalLM"
    assert support["computed_by"].startswith("StableLmForCausalLM of transformers 5.")
    assert answers(summary)["QuantFlow"] == "no"
    assert {answers(summary)[engine] for engine in ("vLLM", "transformers")} == {"yes"}
    assert {answers(summary)[engine] for engine in ("LMDeploy", "llama.cpp")} == {"no"}
    assert support["kept"]["the embedding"] == {"tensors": 1, "bytes": 320 * 64 * 4}


def test_what_is_in_the_way_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path, specimen("llama3"))
    (folder / "tokenizer.json").rename(folder / "tiktoken.model")
    (problem,) = inspect(folder)["support"]["problems"]
    assert "no tokenizer" in problem and "needs a tokenizer.json" in problem
    assert "in the way" in invoke("inspect", folder).stdout


def test_a_model_type_that_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "baichaun"}))
    result = invoke("inspect", tmp_path, "--config-only")
    assert result.exit_code == 2
    assert "'baichaun'" in result.stderr and "Did you mean 'baichuan'?" in result.stderr


def test_of_an_artifact_nothing_is_asked(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nweights: {group_size: 32}\nstages: [rtn, pack: {format: awq}]\n")
    model = write(tmp_path / "model", specimen("llama3"))
    made = invoke("run", recipe, "--model", model, "--output", tmp_path / "out", "--device", "cpu")
    assert made.exit_code == 0, made.stderr
    assert inspect(tmp_path / "out")["support"] is None
