"""docs/extending.md, done as it says: its architecture is planned, quantised and run; its numbers
are stored and cut, its format is written and read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantflow.engine.llm import LLM
from quantflow.engine.request import SamplingParams
from quantflow.formats import FORMATS
from quantflow.formats.reader import Weights
from quantflow.formats.weight import Weight
from quantflow.models.registry import ARCHITECTURES
from quantflow.quant.grid import GridRules
from quantflow.quant.numbers import NUMBERS
from quantflow.quant.requantize import relative_error, requantize
from quantflow.quant.scheme import Scheme
from tests.helpers.pages import blocks, run_python
from tests.helpers.runs import invoke
from tests.helpers.tiny import write_llama

SNIPPETS = [
    block for block in blocks() if block.page == "docs/extending.md" and block.language == "python"
]


def test_its_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama whose q, k and v lie in one tensor, as Baichuan-7B's do, says what that Llama
    says."""
    monkeypatch.setitem(ARCHITECTURES, "baichuan", run_python(SNIPPETS[0])["BAICHUAN"])
    llama = write_llama(tmp_path / "llama", num_key_value_heads=4, dtype=torch.float32)
    baichuan = write_llama(
        tmp_path / "baichuan", num_key_value_heads=4, dtype=torch.float32, model_type="baichuan"
    )
    tensors = load_file(baichuan / "model.safetensors")
    for i in range(2):
        at = f"model.layers.{i}.self_attn"
        tensors[f"{at}.W_pack.weight"] = torch.cat(
            [tensors.pop(f"{at}.{letter}_proj.weight") for letter in "qkv"]
        )
    save_file(tensors, baichuan / "model.safetensors", {"format": "pt"})

    said = [
        LLM(str(path), device="cpu", cache_bytes=2**20).generate(
            "The fox", SamplingParams(max_tokens=8)
        )
        for path in (llama, baichuan)
    ]
    assert said[0][0].completions[0].token_ids == said[1][0].completions[0].token_ids

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\nweights: {group_size: 32}\nstages: [rtn, pack: {format: compressed-tensors}]\n"
    )
    for model in (llama, baichuan):
        for verb in ("plan", "run"):
            done = invoke(verb, recipe, "--model", model, "--output", tmp_path / f"{model.name}-w4")
            assert done.exit_code == 0, done.stderr
    assert (
        "written as Llama"
        in invoke("plan", recipe, "--model", baichuan, "--output", tmp_path / "other").stdout
    )
    written = [
        load_file(tmp_path / f"{name}-w4" / "model.safetensors") for name in ("llama", "baichuan")
    ]
    assert written[0].keys() == written[1].keys() and all(
        torch.equal(written[0][name], written[1][name]) for name in written[0]
    )
    assert (
        json.loads((tmp_path / "baichuan-w4" / "config.json").read_text())["model_type"] == "llama"
    )


def test_its_numbers(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new kind goes through the store, ranks and a format without a word about it anywhere
    else."""
    power = run_python(SNIPPETS[1])["PowerTensor"]
    monkeypatch.setitem(NUMBERS, "power", power)
    scheme, rules = Scheme(4, 2, True, "power"), GridRules((torch.float16,))
    tensor = power.quantize(
        torch.tensor([[8.0, -1.1, 0.5, -4.0], [1.0, 0.7, 0.0, 2.0]]), scheme, rules
    )
    assert (
        tensor.dequantize().tolist() == [[8.0, -1.0, 0.5, -4.0], [1.0, 0.5, 0.015625, 2.0]]
        and str(scheme) == "P4 g2"
    )
    assert torch.equal(
        power.from_parts(scheme, tensor.parts(), 4).dequantize(), tensor.dequantize()
    )
    assert torch.equal(tensor.cut(1, 1, 2).dequantize(), tensor.dequantize()[:, 2:])
    plain, refused = (FORMATS["huggingface"], FORMATS["awq"].check(Weight("m", (8, 4), scheme)))
    assert torch.equal(plain.encode("m", tensor, torch.float32)["m.weight"], tensor.dequantize())
    assert (
        refused[0].found == "P4 g2, a grid of powers of two"
        and refused[0].expected == "a grid with integer zero points"
    )
    assert (
        relative_error(
            requantize(tensor.dequantize(), tensor, Scheme(8, 2, False), rules), tensor.dequantize()
        )
        < 0.01
    )


def test_its_format(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "bytewise", run_python(SNIPPETS[2])["Bytewise"]())
    done = invoke("export", artifact, "--format", "bytewise", "--output", tmp_path / "bytewise")
    assert done.exit_code == 0, done.stderr
    there, back = Weights(artifact), Weights(tmp_path / "bytewise")
    assert (
        back.format is FORMATS["bytewise"]
        and back.modules == there.modules
        and len(back.modules) == 14
    )
    for module in sorted(there.modules):
        assert torch.equal(
            there.quantized(module).dequantize(), back.quantized(module).dequantize()
        )
    again = invoke(
        "export",
        tmp_path / "bytewise",
        "--format",
        "compressed-tensors",
        "--output",
        tmp_path / "again",
    )
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        artifact / "model.safetensors"
    ).read_bytes()
    refused = invoke(
        "export", artifact, "--format", "bytewise", "--output", tmp_path / "none", "--tp", "3"
    )
    assert refused.exit_code == 2 and "a multiple of 3" in refused.stderr
