"""Models that see: their language model is quantised, and the rest is what it was, in transformers'
own class and over a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.checkpoints.tensor_file import save_tensors
from quantflow.formats.reader import Weights
from quantflow.models.stored_names import StoredNames
from tests.helpers.multimodal import features, logits, write_multimodal
from tests.helpers.runs import invoke
from tests.helpers.tiny import write_text
from tests.helpers.zoo import decoder_logits, random_tokens

# One of each way of names: as the class has them, with `language_model.model` in front, and as
# before the class had a `language_model`.
SEARCHED = ["calibrate", {"awq": {"grid": 4}}, "gptq", "kv_qparams"]
STAGES: dict[str, list[Any]] = {
    "qwen3_vl": SEARCHED,
    "gemma3": SEARCHED,
    "qwen2_5_vl": ["rtn"],
    "llava": ["rtn"],
    "internvl": ["rtn"],
    "mistral3": ["rtn"],
    "glm4v_moe": ["rtn"],
    "qwen3_vl_moe": ["rtn"],
    "llama4": ["rtn"],
    "qwen3_5": ["rtn"],
    "qwen3_5_moe": ["rtn"],
    "gemma4": ["rtn"],
}
LINEARS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
    "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj",
    "per_layer_projection", "per_layer_input_gate",
)  # fmt: skip
TOWERS = ("visual.", "vision_tower.", "vision_model.", "multi_modal_projector.", "embed_vision.")


@dataclass(frozen=True)
class Run:
    """A finished run over a checkpoint in float32."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def packed(self) -> Path:
        return self.root / "out" / "compressed-tensors"

    @property
    def plain(self) -> Path:
        return self.root / "out" / "huggingface"

    @cached_property
    def source(self) -> dict[str, torch.Tensor]:
        return load_file(self.model / "model.safetensors")

    @property
    def report(self) -> Any:
        return json.loads((self.root / "out" / "report.json").read_text())

    @property
    def text_names(self) -> set[str]:
        return {n for n in self.source if not n.removeprefix("model.").startswith(TOWERS)}

    @property
    def linears(self) -> set[str]:
        """Those of the language model by the tensors' names, experts in one tensor as single
        ones."""
        modules = {n.removesuffix(".weight") for n in self.text_names if n.endswith(".weight")}
        single = {module for module in modules if module.rpartition(".")[2] in LINEARS}
        for name in self.fused:
            experts, _, leaf = name.rpartition(".")
            parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            single |= {f"{experts}.{e}.{n}" for e in range(len(self.source[name])) for n in parts}
        return single

    @property
    def fused(self) -> set[str]:
        return {n for n in self.text_names if ".experts." in n and self.source[n].dim() == 3}


@pytest.fixture(scope="module", params=STAGES)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp(request.param)
    write_multimodal(root / "model", request.param)
    write_text(root / "calib.txt", 0, 128)
    recipe = {
        "name": "out",
        "model": str(root / "model"),
        "output": str(root / "out"),
        "calibration": {"data": str(root / "calib.txt"), "samples": 8, "seqlen": 20},
        "weights": {
            "bits": 4,
            "group_size": 32,
            "symmetric": True,
            # engines find their names by those of the class
            "overrides": [
                {"match": "*.k_proj", "bits": 8},
                {"match": "*.1.*.o_proj", "ignore": True},
            ],
        },
        "stages": [
            *STAGES[request.param],
            {"pack": {"format": "compressed-tensors"}},
            {"pack": {"format": "huggingface"}},
        ],
    }
    (root / "r.yaml").write_text(yaml.safe_dump(recipe))
    result = invoke("run", root / "r.yaml", "--device", "cpu")
    assert result.exit_code == 0, result.output
    return Run(root)


@cache
def opened(folder: Path) -> Any:
    """By the class of its config, which finds all that it looks for and nothing else."""
    model, told = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    return model.eval()


def test_over_a_picture_transformers_computes_our_reference(finished: Run) -> None:
    """The reference: the class over the dequantised weights, plain."""
    text = random_tokens(1, 12)
    original, packed = opened(finished.model), opened(finished.packed)
    plain = opened(finished.plain)
    weights, numbers = Weights(finished.packed), Weights(finished.plain)
    for name in weights.checkpoint.expected:
        assert torch.equal(numbers.tensor(name), weights.tensor(name)), name
    assert torch.equal(features(packed), features(original))
    expected = logits(plain, text)
    torch.testing.assert_close(logits(packed, text), expected, rtol=0, atol=5e-5)
    assert (logits(original, text) - expected).abs().max() > 0.05  # it is quantised


def test_over_text_alone_so_does_the_pipeline(finished: Run) -> None:
    text = random_tokens(1, 12)
    for folder in (finished.model, finished.packed):
        expected = logits(opened(folder), text, sees=False)
        torch.testing.assert_close(
            decoder_logits(Weights(folder), text), expected, rtol=0, atol=5e-5
        )


def test_the_names_are_those_of_the_source_and_the_rest_is_copied(finished: Run) -> None:
    written = load_file(finished.packed / "model.safetensors")
    quantised = {n.removesuffix(".weight_packed") for n in written if n.endswith("_packed")}
    left_alone = {module for module in finished.linears if module.endswith(".1.self_attn.o_proj")}
    # Experts that the format has no names for stay in their tensor, the way round that it had.
    whole = finished.fused & set(written)
    for name in whole:
        off = written[name] - finished.source[name]
        assert off.norm() / finished.source[name].norm() < 0.2, name
    left_alone |= {
        module
        for module in finished.linears
        if any(module.startswith(f"{name.rpartition('.')[0]}.") for name in whole)
    }
    assert quantised == finished.linears - left_alone and len(quantised) > 6
    kept = {n for n in finished.source if n.removesuffix(".weight") not in quantised}
    kept -= finished.fused - whole
    assert kept == {n for n in written if "weight_" not in n}
    towers = set(finished.source) - finished.text_names
    assert len(towers) > 20
    assert all(torch.equal(written[n], finished.source[n]) for n in towers)
    tensors = finished.report["tensors"]
    assert set(tensors["copied"]) == towers and tensors["left_out"] == {}
    assert tensors["quantised"] + tensors["kept"] + len(towers) == tensors["source"]
    assert tensors["source"] == len(finished.source)


def test_the_config_is_the_sources_with_what_is_quantised_at_the_top(finished: Run) -> None:
    config = json.loads((finished.packed / "config.json").read_text())
    quantization = config.pop("quantization_config")
    source = json.loads((finished.model / "config.json").read_text())
    assert config == source and "text_config" in config
    model, held = opened(finished.model), Weights(finished.packed).checkpoint.held
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    plain = linears - {held(n) for n in finished.report["linears"]}
    assert plain and plain <= set(quantization["ignore"])
    settings = json.loads((finished.packed / "preprocessor_config.json").read_text())
    assert settings == {"do_resize": False}


def test_plan_and_inspect_say_what_is_copied(finished: Run) -> None:
    plan = json.loads(invoke("plan", finished.root / "r.yaml", "--json", "--device", "cpu").stdout)
    assert any("is quantised, on text alone" in note for note in plan["notes"])
    inspected = json.loads(invoke("inspect", finished.packed, "--json").stdout)
    assert len(inspected["copied"]) == len(finished.source) - len(finished.text_names)


def test_a_config_alone_counts_the_towers(tmp_path: Path) -> None:
    write_multimodal(tmp_path, "gemma3")
    whole, alone = Checkpoint(tmp_path), Checkpoint(tmp_path, config_only=True)
    assert alone.copied == whole.copied
    assert {n: alone.shape_of(n) for n in alone.copied} == {
        n: whole.shape_of(n) for n in whole.copied
    }
    assert alone.weight_bytes == whole.weight_bytes


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl"])
def test_what_a_tower_lacks_or_has_too_much_is_named(model_type: str, tmp_path: Path) -> None:
    write_multimodal(tmp_path, model_type)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = next(n for n in tensors if n.removeprefix("model.").startswith(TOWERS))
    kind = lost.partition(".")[0]
    save_tensors(
        file, {n: t for n, t in tensors.items() if n != lost} | {f"{kind}.odd": torch.ones(2)}
    )
    missing, unknown = Checkpoint(tmp_path).problems()
    assert missing.found == f"missing tensors: {lost}"
    assert f"does not have: {kind}.odd" in unknown.found


def in_eight_bits(root: Path) -> Path:
    """`model` of that folder, rounded and packed."""
    recipe: dict[str, Any] = {
        "name": "r",
        "weights": {"bits": 8, "group_size": 32, "symmetric": True},
        "stages": ["rtn", {"pack": {"format": "compressed-tensors"}}],
    }
    (root / "r.yaml").write_text(yaml.safe_dump(recipe))
    options = ("--model", root / "model", "--output", root / "out", "--device", "cpu")
    result = invoke("run", root / "r.yaml", *options)
    assert result.exit_code == 0, result.output
    return root / "out"


def as_older_files(name: str, model: Any) -> str:
    """The hub's: transformers takes `vision_model` out, vLLM looks for it."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def as_in_the_class(name: str, model: Any) -> str:
    """As tools write them that know no names but the class's."""
    return str(StoredNames(model).held(name))


@pytest.mark.parametrize("model_type", ["gemma3", "llava"])
@pytest.mark.parametrize("renamed", [as_older_files, as_in_the_class])
def test_other_names_are_read_and_a_towers_are_kept(
    model_type: str, renamed: Callable[[str, Any], str], tmp_path: Path
) -> None:
    """What is written loads, whatever its names were."""
    model = write_multimodal(tmp_path / "model", model_type)
    text, file = random_tokens(1, 12), tmp_path / "model" / "model.safetensors"
    source = decoder_logits(Weights(tmp_path / "model"), text)
    other = {renamed(name, model): value for name, value in load_file(file).items()}
    assert set(other) != set(load_file(file))
    file.unlink()
    save_tensors(file, other)
    assert torch.equal(decoder_logits(Weights(tmp_path / "model"), text), source)
    out = in_eight_bits(tmp_path)
    towers = {n for n in other if "vision_tower" in n}
    assert towers == {n for n in load_file(out / "model.safetensors") if "vision_tower" in n}
    packed = opened(out)
    assert torch.equal(features(packed), features(model))
    expected = logits(model, text)
    assert 0 < (logits(packed, text) - expected).norm() / expected.norm() < 0.05
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    layer = "vision_tower.encoder.layers.0.mlp.fc1"
    assert {f"model.{layer}", f"{renamed(f'{layer}.weight', model)[: -len('.weight')]}"} <= set(
        ignored
    )
