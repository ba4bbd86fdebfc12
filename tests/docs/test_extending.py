"""docs/extending.md, done as it says: its architecture is planned, quantised and run; its numbers
are stored and cut, its format is written and read back, its stage is one file and a name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantflow.engine.llm import LLM
from quantflow.engine.request import SamplingParams
from quantflow.formats import FORMATS
from quantflow.formats.reader import Weights
from quantflow.formats.weight import Weight
from quantflow.models.registry import TRANSLATIONS
from quantflow.quant.grid import GridRules
from quantflow.quant.numbers import NUMBERS
from quantflow.quant.requantize import relative_error, requantize
from quantflow.quant.scheme import Scheme
from tests.helpers.pages import ROOT, blocks, run_python
from tests.helpers.runs import invoke
from tests.helpers.tiny import write_llama

START = "from quantflow.cli.main import main; main()"
SNIPPETS = {  # by the file that each is, in its first line
    block.text.splitlines()[0].removeprefix("# "): block
    for block in blocks()
    if block.page == "docs/extending.md" and block.language == "python"
}


def test_its_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama whose q, k and v lie in one tensor says what that Llama says."""
    monkeypatch.setitem(
        TRANSLATIONS, "packed", run_python(SNIPPETS["quantflow/models/packed.py"])["PACKED"]
    )
    llama = write_llama(tmp_path / "llama", num_key_value_heads=4, dtype=torch.float32)
    packed = write_llama(
        tmp_path / "packed", num_key_value_heads=4, dtype=torch.float32, model_type="packed"
    )
    tensors = load_file(packed / "model.safetensors")
    for i in range(2):
        at = f"model.layers.{i}.self_attn"
        tensors[f"{at}.W_pack.weight"] = torch.cat(
            [tensors.pop(f"{at}.{letter}_proj.weight") for letter in "qkv"]
        )
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})

    said = [
        LLM(str(path), device="cpu", cache_bytes=2**20).generate(
            "The fox", SamplingParams(max_tokens=8)
        )
        for path in (llama, packed)
    ]
    assert said[0][0].completions[0].token_ids == said[1][0].completions[0].token_ids

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\nweights: {group_size: 32}\nstages: [rtn, pack: {format: compressed-tensors}]\n"
    )
    for model in (llama, packed):
        for verb in ("plan", "run"):
            done = invoke(verb, recipe, "--model", model, "--output", tmp_path / f"{model.name}-w4")
            assert done.exit_code == 0, done.stderr
    assert (
        "written as Llama"
        in invoke("plan", recipe, "--model", packed, "--output", tmp_path / "other").stdout
    )
    written = [
        load_file(tmp_path / f"{name}-w4" / "model.safetensors") for name in ("llama", "packed")
    ]
    assert written[0].keys() == written[1].keys() and all(
        torch.equal(written[0][name], written[1][name]) for name in written[0]
    )
    assert json.loads((tmp_path / "packed-w4" / "config.json").read_text())["model_type"] == "llama"


def test_its_stage(tmp_path: Path) -> None:
    """One file and its name in the registry, in a copy of the package: the recipe, the reference,
    the plan and the run know it. Its weights are those of `rtn` on a model that was clamped by
    hand."""
    package = shutil.copytree(
        ROOT / "quantflow", tmp_path / "quantflow", ignore=shutil.ignore_patterns("__pycache__")
    )
    (package / "stages" / "clamp.py").write_text(SNIPPETS["quantflow/stages/clamp.py"].text)
    registry = package / "stages" / "registry.py"
    lines = registry.read_text().replace("        Nf4,\n", "        Clamp,\n        Nf4,\n")
    first = "from quantflow.stages.evaluate import"
    registry.write_text(lines.replace(first, f"from quantflow.stages.clamp import Clamp\n{first}"))

    def quantflow(*arguments: object) -> subprocess.CompletedProcess[str]:
        paths = os.pathsep.join((str(tmp_path), str(ROOT / "kernels")))
        return subprocess.run(
            [sys.executable, "-P", "-c", START, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": paths},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    def recipe(*stages: str) -> Path:
        path = tmp_path / "recipe.yaml"
        entries = ", ".join((*stages, "pack: {format: huggingface}"))
        path.write_text(f"name: x\nweights: {{group_size: 32}}\nstages: [{entries}]\n")
        return path

    model, clamped = (write_llama(tmp_path / name, dtype=torch.float32) for name in "ab")
    tensors = load_file(clamped / "model.safetensors")
    for name, weight in tensors.items():
        if "_proj" in name:
            limit = 1.5 * weight.std(1, keepdim=True)
            tensors[name] = weight.minimum(limit).maximum(-limit)
    save_file(tensors, clamped / "model.safetensors", {"format": "pt"})
    for source, stage in ((model, "clamp: {deviations: 1.5}"), (clamped, "rtn")):
        output = tmp_path / f"{source.name}-w4"
        done = quantflow("run", recipe(stage), "--model", source, "--output", output)
        assert done.returncode == 0, done.stderr
    here, there = (load_file(tmp_path / f"{name}-w4" / "model.safetensors") for name in "ab")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)

    refused = quantflow("plan", recipe("awq", "clamp: {deviation: 2}"), "--model", model)
    for problem in (
        "recipe.yaml:3: awq with clamp; expected clamp alone",
        "Did you mean `deviations`",
    ):
        assert problem in refused.stderr
    reference = quantflow("schema", "--markdown").stdout
    assert "- clamp: {deviations: 3}" in reference and "gptq, rtn, clamp, nf4" in reference


def test_its_numbers(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new kind goes through the store, ranks and a format without a word about it anywhere
    else."""
    power = run_python(SNIPPETS["quantflow/quant/numbers/power.py"])["PowerTensor"]
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
    monkeypatch.setitem(
        FORMATS, "bytewise", run_python(SNIPPETS["quantflow/formats/bytewise.py"])["Bytewise"]()
    )
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
