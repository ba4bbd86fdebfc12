"""Mixtures without a table, from a recipe into transformers: experts that a class holds in tensors
of three dimensions, each matrix quantised.

transformers computes over the files what the artifact is held against; the number of matrices
comes from the safetensors header alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantflow.formats.reader import Weights
from tests.helpers.library import write_tiny
from tests.helpers.runs import invoke
from tests.helpers.tiny import write_text
from tests.helpers.zoo import decoder_logits, random_tokens

# A model type -> matrices that no recipe quantises, as expressions that match what is beside them.
BY_EXPERT = {
    "deepseek_v3": r"mlp\.gate$",
    "minimax_m2": r"block_sparse_moe\.gate$",
    "qwen2_moe": r"mlp\.(gate|shared_expert_gate)$",
}


def run(root: Path, model_type: str, *stages: Any) -> Path:
    write_tiny(root / "model", model_type)
    write_text(root / "calib.txt", 0, 128)
    recipe = {
        "name": model_type,
        "model": str(root / "model"),
        "output": str(root / "out"),
        "calibration": {"data": str(root / "calib.txt"), "samples": 12, "seqlen": 20},
        "weights": {"bits": 4, "group_size": 32, "symmetric": True},
        "stages": [
            *stages,
            {"pack": {"format": "compressed-tensors"}},
            {"pack": {"format": "huggingface"}},
        ],
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = invoke("run", root / "recipe.yaml", "--device", "cpu")
    assert result.exit_code == 0, result.output
    return root / "out"


@pytest.fixture(scope="module", params=sorted(BY_EXPERT))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param) / request.param
    root.mkdir()
    return run(root, request.param, "calibrate", {"awq": {"grid": 4}}, "gptq", "kv_qparams")


def header(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def logits(folder: Path, tokens: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        found: Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("form", ["compressed-tensors", "huggingface"])
def test_the_artifact_in_transformers_is_our_reference(finished: Path, form: str) -> None:
    tokens = random_tokens(2, 24)
    expected = decoder_logits(Weights(finished / form), tokens)
    original = logits(finished.parent / "model", tokens)
    assert (expected - original).abs().max() > 0.05  # it is quantised
    torch.testing.assert_close(logits(finished / form, tokens), expected, rtol=0, atol=1e-4)


def test_every_matrix_of_the_header_is_quantised_or_named(finished: Path) -> None:
    source, packed = header(finished.parent / "model"), header(finished / "compressed-tensors")
    matrices = {
        name.removesuffix(".weight")
        for name, shape in source.items()
        if ".layers." in name and len(shape) == 2 and name.endswith(".weight")
    }
    beside = re.compile(BY_EXPERT[finished.parent.name])
    wanted = {name for name in matrices if not beside.search(name)}
    report = json.loads((finished / "report.json").read_text())
    assert set(report["linears"]) == wanted
    assert {n.removesuffix(".weight_packed") for n in packed if "weight_packed" in n} == wanted
    assert sum(".experts." in name for name in wanted) >= 3 * 4
    for name in matrices - wanted:
        assert report["kept"][name] == "the router"
    kept = {n for n in source if n.removesuffix(".weight") not in wanted}
    assert kept == {n for n in packed if ".weight_" not in n}
    account = report["tensors"]
    assert account["source"] == len(source) == account["quantised"] + account["kept"]
    assert account["quantised"] == len(wanted) and account["left_out"] == {}
