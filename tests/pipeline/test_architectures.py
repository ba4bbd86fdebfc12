"""Every architecture from its original tensor names through calibrate → awq → gptq → kv_qparams →
pack, and into transformers.

One run a family writes compressed-tensors, AWQ and GPTQ from the same result. transformers loads
the first, without remote code, and must compute what QuantFlow's decoder computes over the same
files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantflow.calibration.data import cut_windows, documents
from quantflow.errors import UserError
from quantflow.formats.reader import Weights
from quantflow.models.registry import ARCHITECTURES, TRANSLATIONS
from quantflow.pipeline.artifact import Artifact
from quantflow.pipeline.plan import make_plan
from quantflow.pipeline.progress import Silent
from quantflow.pipeline.run import run
from quantflow.stages.registry import load_recipe
from quantflow.tokenizers.load import load_tokenizer
from tests.helpers.tiny import write_text
from tests.helpers.zoo import (
    EXPERTS,
    LAYERS,
    Specimen,
    decoder_logits,
    random_tokens,
    specimen,
    write,
)

DENSE = 2 * 7  # q, k, v, o, gate, up, down in two layers


@dataclass(frozen=True)
class Case:
    """linears: how many are quantised. transformers: the class that loads the artifact. dtype: of
    the checkpoint."""

    linears: int
    transformers: str
    dtype: torch.dtype = torch.bfloat16
    symmetric: bool = False


CASES = {
    "llama3": Case(DENSE, "LlamaForCausalLM"),
    "llama_bias": Case(DENSE, "LlamaForCausalLM", torch.float32),
    "internlm": Case(DENSE, "LlamaForCausalLM", torch.float16),
    "internlm2": Case(DENSE, "LlamaForCausalLM"),
    "internlm3": Case(DENSE, "LlamaForCausalLM"),
    "baichuan2": Case(DENSE, "LlamaForCausalLM"),
    "mistral": Case(DENSE, "MistralForCausalLM", symmetric=True),
    "qwen": Case(DENSE, "Qwen2ForCausalLM"),
    "qwen2": Case(DENSE, "Qwen2ForCausalLM"),
    "qwen3": Case(DENSE, "Qwen3ForCausalLM"),
    # four experts of three linears; the router stays
    "mixtral": Case(2 * (4 + 4 * 3), "MixtralForCausalLM", symmetric=True),
    "mixtral_fused": Case(2 * (4 + 4 * 3), "MixtralForCausalLM", symmetric=True),
    # the first layer is dense
    "qwen3_moe": Case(7 + (4 + 4 * 3), "Qwen3MoeForCausalLM", torch.float32, symmetric=True),
    "qwen3_moe_fused": Case(2 * (4 + 4 * 3), "Qwen3MoeForCausalLM", symmetric=True),
    "opt": Case(2 * 6, "OPTForCausalLM", torch.float16),  # no gate
    "olmo2": Case(DENSE, "Olmo2ForCausalLM"),
    "granite": Case(DENSE, "GraniteForCausalLM"),
    # q, k and v are one linear, and so are gate and up
    "phi3": Case(2 * 4, "Phi3ForCausalLM"),
    "phi4_mini": Case(2 * 4, "Phi3ForCausalLM", torch.float32),
    "glm": Case(2 * 6, "GlmForCausalLM", symmetric=True),
    "glm4": Case(2 * 6, "Glm4ForCausalLM"),
    "gemma2": Case(DENSE, "Gemma2ForCausalLM"),
    "gemma3": Case(DENSE, "Gemma3ForCausalLM", torch.float32),
}


FORMATS = ("compressed-tensors", "awq", "gptq")


def quantise(
    root: Path, found: Specimen, symmetric: bool, formats: tuple[str, ...] = FORMATS, bits: int = 4
) -> Artifact:
    """Runs the recipe over the checkpoint `found`; everything lies below `root`."""
    torch.set_num_threads(1)
    recipe = {
        "name": "zoo",
        "model": str(write(root / "model", found)),
        "output": str(root / "out" / "artifact"),
        "calibration": {
            "data": str(write_text(root / "calib.txt", 0, 128)),
            "samples": 12,
            "seqlen": 20,
        },
        "weights": {"bits": bits, "group_size": 32, "symmetric": symmetric},
        "stages": [
            "calibrate",
            {"awq": {"grid": 4}},
            "gptq",
            "kv_qparams",
            *({"pack": {"format": f}} for f in formats),
        ],
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return run(make_plan(load_recipe(path), device="cpu"), Silent())


class AsLoaded(Weights):
    """Weights as transformers holds them. It dequantises experts, and all of an asymmetric
    checkpoint, while it loads them, to the dtype of their scales; other linears, at every forward,
    to the dtype that was asked for."""

    def tensor(self, name: str) -> Tensor:
        value = super().tensor(name)
        if self.is_quantised(name) and (".experts." in name or self._config.get("dequantize")):
            return value.to(getattr(torch, self.checkpoint.config.dtype)).float()
        return value


def loaded_logits(folder: Path, tokens: Tensor, transformers_class: str) -> Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert type(model).__name__ == transformers_class
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for parameter in model.parameters():
        if parameter.is_floating_point():
            # experts are in 16 bits still, and would be multiplied so
            parameter.data = parameter.data.float()
    with torch.inference_mode():
        return model.eval()(tokens).logits


Quantised = Callable[[str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """The artifact of a family and its report.json, made once."""

    @cache
    def made(name: str) -> tuple[Path, dict[str, Any]]:
        case = CASES[name]
        result = quantise(tmp_path_factory.mktemp(name), specimen(name, case.dtype), case.symmetric)
        return result.path, json.loads((result.path / "report.json").read_text())

    return made


@pytest.mark.parametrize("name", CASES)
def test_every_linear_is_quantised_and_nothing_fell_back(name: str, quantised: Quantised) -> None:
    output, report = quantised(name)
    linears = CASES[name].linears
    assert len(report["linears"]) == linears
    assert report["fallbacks"] == {}
    kept = dict(report["kept"])
    assert kept.pop("lm_head") and set(kept.values()) <= {"the router"}
    sparse = 1 if name == "qwen3_moe" else 2  # its first layer is dense
    assert len(kept) == ("mixtral" in name or "moe" in name) * sparse
    assert {line["method"] for line in report["linears"].values()} == {"gptq"}
    for form, suffix in (
        ("compressed-tensors", ".weight_packed"),
        ("awq", ".qweight"),
        ("gptq", ".qweight"),
    ):
        written = load_file(output / form / "model.safetensors")
        assert {n.removesuffix(suffix) for n in written if n.endswith(suffix)} == set(
            report["linears"]
        )
        assert [n for n in written if n.removesuffix(".weight") in report["linears"]] == []
    manifest = json.loads((output / "quantflow.json").read_text())
    assert manifest["status"] == "complete"
    scales = load_file(output / "kv_qparams.safetensors")
    assert len(scales) == LAYERS * 4
    assert all(bool(t.isfinite().all()) for t in scales.values())
    assert all(bool((t > 0).all()) for n, t in scales.items() if n.endswith("_scale"))


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_what_quantflow_computes(name: str, quantised: Quantised) -> None:
    folder = quantised(name)[0] / "compressed-tensors"
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config and config["architectures"] == [CASES[name].transformers]
    tokens = random_tokens(2, 20)
    theirs = loaded_logits(folder, tokens, CASES[name].transformers)
    assert float(theirs.std()) > 0.5
    # Beyond float32's own rounding there is only that of the weights to 16 bits, which AsLoaded
    # repeats.
    torch.testing.assert_close(theirs, decoder_logits(AsLoaded(folder), tokens), rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", CASES)
def test_awq_and_gptq_read_back_to_the_same_weights(name: str, quantised: Quantised) -> None:
    output, report = quantised(name)
    first, *others = (Weights(output / form) for form in FORMATS)
    assert first.modules == set(report["linears"])
    for other in others:
        assert other.modules == first.modules
        for native in first.checkpoint.expected:
            torch.testing.assert_close(other.tensor(native), first.tensor(native), rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_eight_bits_compute_what_the_original_computes(name: str, tmp_path: Path) -> None:
    """With the rounding out of the way, whatever AWQ rescaled on one side alone would show: a bias,
    a router, a second reader of a norm."""
    output = quantise(
        tmp_path, specimen(name), CASES[name].symmetric, formats=("compressed-tensors",), bits=8
    ).path
    report = json.loads((output / "report.json").read_text())
    assert report["fallbacks"] == {}
    # AWQ has rescaled something
    assert sum(line["scale"] != "identity" for line in report["awq"]) >= LAYERS
    windows = cut_windows(
        load_tokenizer(tmp_path / "model"),
        documents(str(tmp_path / "calib.txt")),
        count=4,
        length=20,
    )
    tokens = torch.tensor(windows.tokens)
    original = decoder_logits(Weights(tmp_path / "model"), tokens)
    error = (decoder_logits(Weights(output), tokens) - original).norm(dim=-1) / original.norm(
        dim=-1
    )
    # the median, because rounding sends a token in a hundred to another expert
    assert float(error.median()) < 0.01


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_fused"])
def test_asymmetric_experts_go_where_they_can_be_read(name: str, tmp_path: Path) -> None:
    found = specimen(name, torch.bfloat16)
    with pytest.raises(UserError) as caught:
        quantise(tmp_path / "refused", found, symmetric=False)
    assert len(caught.value.problems) == 3  # gate, up and down, not one an expert and layer
    assert all(
        "asymmetric expert" in p.found and "symmetric: true" in p.hint
        for p in caught.value.problems
    )
    assert not (tmp_path / "refused" / "out").exists()

    output = quantise(tmp_path / "written", found, symmetric=False, formats=("awq", "gptq_v2")).path
    awq, gptq = Weights(output / "awq"), Weights(output / "gptq_v2")
    assert len(awq.modules) == CASES[name].linears and awq.modules == gptq.modules
    for module in awq.modules:
        torch.testing.assert_close(
            awq.tensor(f"{module}.weight"), gptq.tensor(f"{module}.weight"), rtol=0, atol=0
        )


def test_the_pipeline_has_every_architecture() -> None:
    there = {specimen(name).config["model_type"] for name in CASES}
    assert there - set(TRANSLATIONS) == set(ARCHITECTURES)


def _shun(found: Specimen, expert: int) -> Specimen:
    """The checkpoint with a first channel that is the same for every token, which nothing writes to
    and, of the routers' rows, only that of `expert` reads: it drives the expert to the bottom."""
    tensors = {name: tensor.clone() for name, tensor in found.tensors.items()}
    tensors["model.embed_tokens.weight"][:, 0] = 2.0
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "w2.weight", "experts.down_proj")):
            tensor[..., 0, :] = 0.0
        if name.endswith(("v_proj.weight", "gate.weight")):
            tensor[:, 0] = 0.0
        if name.endswith("gate.weight"):
            tensor[expert, 0] = -20.0
    return Specimen(found.config, tensors)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mixtral", ("block_sparse_moe", "w1", "w2", "w3")),
        ("qwen3_moe_fused", ("mlp", "gate_proj", "down_proj", "up_proj")),
    ],
)
def test_an_expert_without_a_token_is_rounded_to_nearest_and_reported(
    name: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    shunned = 2
    found = _shun(specimen(name), shunned)
    output = quantise(tmp_path, found, symmetric=True).path
    report = json.loads((output / "report.json").read_text())
    block, gate, down, up = parts
    names = {
        f"model.layers.{i}.{block}.experts.{shunned}.{part}"
        for i in range(LAYERS)
        for part in (gate, down, up)
    }
    assert report["fallbacks"] == dict.fromkeys(names, "no calibration token: rounded to nearest")
    assert len(report["linears"]) == LAYERS * (4 + EXPERTS * 3)
    assert {n for n, line in report["linears"].items() if line["method"] == "rtn"} == names
    unreached = [line["group"] for line in report["awq"] if "no token" in line["scale"]]
    assert unreached == [
        f"model.layers.{i}.{block}.experts.{shunned}.{down}" for i in range(LAYERS)
    ]

    original, artifact = Weights(tmp_path / "model"), Weights(output / "compressed-tensors")
    for module in names:
        before, after = (
            original.tensor(f"{module}.weight").float(),
            artifact.tensor(f"{module}.weight"),
        )
        # AWQ has scaled what the norm in front of the experts gives them
        if not module.endswith(down):
            norm = f"{module[: module.index(f'.{block}.')]}.post_attention_layernorm.weight"
            before = before * (original.tensor(norm).float() / artifact.tensor(norm).float())
        # A group of 32 spans at most twice its largest value in 15 steps; the range search may
        # clip, which costs less than it saves.
        step = before.view(len(before), -1, 32).abs().amax(-1) * 2 / 15
        error = (after - before).view(len(before), -1, 32).square().mean(-1).sqrt()
        assert bool(after.isfinite().all())
        assert bool((error <= step / 2 * 1.02).all())

    tokens = random_tokens(2, 20)
    theirs = loaded_logits(output / "compressed-tensors", tokens, CASES[name].transformers)
    torch.testing.assert_close(theirs, decoder_logits(artifact, tokens), rtol=0, atol=5e-5)
