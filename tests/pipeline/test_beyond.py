"""What a checkpoint holds beside its decoder, blocks that predict further tokens above all: it goes
into the artifact as it is, and nobody takes it for quantised."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.checkpoints.tensor_file import TensorFile, save_tensors
from quantflow.checkpoints.tensor_problems import listed
from quantflow.formats.reader import Weights
from quantflow.report.page import report_page
from tests.helpers.hosted import write_gemma3
from tests.helpers.library import write_tiny
from tests.helpers.runs import invoke
from tests.helpers.tiny import write_llama
from tests.helpers.zoo import decoder_logits, random_tokens

FAMILIES = {"native": write_llama, "hosted": write_gemma3}
FORMATS = ("compressed-tensors", "awq", "gptq_v2", "huggingface", "gguf")
MATRICES = ("fc", "layers.0.mlp.up_proj", "layers.0.self_attn.q_proj")


def with_more(folder: Path, more: dict[str, Tensor], **config: Any) -> Path:
    """The checkpoint with more tensors, and more in its config."""
    file = TensorFile(folder / "model.safetensors")
    save_tensors(folder / "model.safetensors", {n: file.read(n) for n in file.tensors} | more)
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def layers(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["num_hidden_layers"])


def further(folder: Path) -> dict[str, Tensor]:
    """A block in a layer of its own, as DeepSeek-V3's, one under its own name, as Qwen3-Next's, and
    one inside the model, as MiMo's."""
    places = (f"model.layers.{layers(folder)}", "mtp", "model.mtp_layers.0")
    return {
        f"{place}.{name}.weight": torch.randn(32, 64).bfloat16()
        for place in places
        for name in (*MATRICES, "norm")
    } | {f"{place}.norm.weight": torch.randn(64).bfloat16() for place in places}


@pytest.fixture(scope="module", params=FAMILIES)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and artifacts of it in `out`."""
    root = tmp_path_factory.mktemp("beyond")
    model = FAMILIES[request.param](root / "model")
    with_more(model, further(model), num_nextn_predict_layers=1)
    formats = FORMATS if request.param == "native" else FORMATS[:-1]
    recipe = {
        "name": "r",
        "model": str(model),
        "output": str(root / "out"),
        "weights": {"bits": 4, "group_size": 32, "symmetric": True},
        "stages": ["rtn", *({"pack": {"format": form}} for form in formats)],
    }
    (root / "r.yaml").write_text(yaml.safe_dump(recipe))
    result = invoke("run", root / "r.yaml", "--device", "cpu")
    assert result.exit_code == 0, result.output
    return root


def test_it_is_copied_to_the_bit_with_the_config_that_counts_it(packed: Path) -> None:
    source = load_file(packed / "model" / "model.safetensors")
    names = {n for n in source if "mtp" in n or f".layers.{layers(packed / 'model')}." in n}
    assert len(names) == 12
    for form in FORMATS[:-1]:
        written = load_file(packed / "out" / form / "model.safetensors")
        assert all(torch.equal(written[n], source[n]) for n in names), form
        assert all(written[n].dtype == torch.bfloat16 for n in names), form
        config = json.loads((packed / "out" / form / "config.json").read_text())
        assert config["num_nextn_predict_layers"] == 1


def test_no_format_says_that_it_is_quantised(packed: Path) -> None:
    last = layers(packed / "model")
    matrices = {
        f"{place}.{name}"
        for place in (f"model.layers.{last}", "mtp", "model.mtp_layers.0")
        for name in MATRICES
    }
    configs = {
        form: json.loads((packed / "out" / form / "config.json").read_text())["quantization_config"]
        for form in FORMATS[:3]
    }
    assert matrices < set(configs["compressed-tensors"]["ignore"])
    assert matrices < set(configs["awq"]["modules_to_not_convert"])
    left_alone = [n.removeprefix("-:") for n in configs["gptq_v2"]["dynamic"]]
    assert all(any(re.match(pattern, name) for pattern in left_alone) for name in matrices)
    for form in FORMATS[:3]:
        weights = Weights(packed / "out" / form)
        assert not any(weights.is_quantised(f"{name}.weight") for name in matrices)
        assert len(weights.checkpoint.copied) == 12


def test_the_decoder_is_what_it_would_be_without(packed: Path) -> None:
    """Of transformers over the artifact, against the dequantised reference."""
    folder, tokens = packed / "out" / "compressed-tensors", random_tokens(3, 12)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(tokens).logits
    expected = decoder_logits(Weights(folder), tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)


def test_report_plan_and_inspect_name_it(packed: Path) -> None:
    report = json.loads((packed / "out" / "report.json").read_text())
    tensors, last = report["tensors"], layers(packed / "model")
    assert len(tensors["copied"]) == 12 and tensors["left_out"] == {}
    parts = tensors["quantised"] + tensors["kept"] + len(tensors["copied"])
    assert parts == tensors["source"] == len(load_file(packed / "model" / "model.safetensors"))
    assert set(tensors["copied"].values()) == {
        f"in a layer beyond num_hidden_layers = {last} (num_nextn_predict_layers = 1)",
        "of a block that predicts further tokens (num_nextn_predict_layers = 1)",
    }
    shown = invoke("plan", packed / "r.yaml", "--device", "cpu").stdout
    assert "copied" in shown and "beyond num_hidden_layers" in "".join(shown.split("\n"))
    inspected = json.loads(invoke("inspect", packed / "out", "--json").stdout)
    assert inspected["copied"] == tensors["copied"]
    assert ", 12 copied, 0 left out" in report_page(report)
    if (packed / "out" / "gguf").exists():
        assert any("gguf leaves out" in warning for warning in report["warnings"])


def test_an_export_keeps_it(packed: Path, tmp_path: Path) -> None:
    result = invoke(
        "export", packed / "out", "--format", "gptq_v2", "--output", tmp_path / "exported"
    )
    assert result.exit_code == 0, result.output
    source = load_file(packed / "model" / "model.safetensors")
    written = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(written[n], source[n]) for n in source if "mtp" in n)


@pytest.mark.parametrize(
    ("model_type", "place"),
    [
        ("deepseek_v3", "model.layers.2."),
        ("glm4_moe", "model.layers.2."),
        ("qwen3_next", "mtp.layers.0."),
    ],
)
def test_blocks_of_families_that_have_them(model_type: str, place: str, tmp_path: Path) -> None:
    """A copy of the last layer, experts and all, where the family has its block; and every tensor
    of the source accounted for."""
    model = write_tiny(tmp_path / "model", model_type)
    decoder = load_file(model / "model.safetensors")
    start = "model.layers.1."
    block = {n.replace(start, place): torch.randn_like(t) for n, t in decoder.items() if start in n}
    assert any(".experts.3." in name for name in block)
    with_more(model, block)
    recipe = {
        "name": "r",
        "weights": {"bits": 4, "group_size": 32, "symmetric": True},
        "stages": ["rtn", {"pack": {"format": "compressed-tensors"}}],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    result = invoke(
        "run", tmp_path / "r.yaml", "--model", model, "--output", out, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in block.items())
    tensors = json.loads((out / "report.json").read_text())["tensors"]
    assert set(tensors["copied"]) == set(block) and tensors["left_out"] == {}
    assert tensors["quantised"] + tensors["kept"] == len(decoder)
    assert tensors["quantised"] == sum(name.endswith("_packed") for name in written)
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    matrices = {n.removesuffix(".weight") for n, t in block.items() if t.dim() == 2}
    assert matrices <= set(ignored)
    tokens = random_tokens(2, 12)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = loaded(tokens).logits
    torch.testing.assert_close(logits, decoder_logits(Weights(out), tokens), rtol=0, atol=5e-5)


def test_what_others_quantised_beyond_is_left_out_and_named(tmp_path: Path) -> None:
    """Its scales alone would make no sense."""
    packed = {
        "mtp.fc.weight_packed": torch.zeros(4, 4, dtype=torch.int32),
        "mtp.fc.weight_scale": torch.ones(4, 1),
        "mtp.norm.weight": torch.ones(8),
    }
    checkpoint = Checkpoint(with_more(write_llama(tmp_path / "m"), packed))
    assert checkpoint.problems() == []
    assert set(checkpoint.copied) == {"mtp.norm.weight"}
    assert set(checkpoint.left_out) == {"mtp.fc.weight_packed", "mtp.fc.weight_scale"}


def test_what_the_class_passes_over_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it does not is refused."""
    folder = with_more(write_gemma3(tmp_path / "m"), {"model.extra.weight": torch.ones(4)})
    (problem,) = Checkpoint(folder).problems()
    assert "does not have: model.extra.weight" in str(problem)
    monkeypatch.setattr(Gemma3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"\.extra\."])
    checkpoint = Checkpoint(folder)
    assert checkpoint.problems() == []
    reason = "Gemma3ForCausalLM of transformers does not read it"
    assert checkpoint.copied == {"model.extra.weight": reason}


def test_names_are_listed_whole_and_many_in_ranges() -> None:
    assert listed(["a.1.b", "a.2.b"]) == "a.1.b, a.2.b"
    names = [f"m.{i}.e.{e}.w" for i in (0, 1, 3) for e in range(8)]
    assert listed(["head.w", *names, "m.7.norm"]) == "head.w, m.[0-1,3].e.[0-7].w, m.7.norm"
    assert listed([*names, "m.2.e.0.w"]) == "m.[0-1,3].e.[0-7].w, m.2.e.0.w"
