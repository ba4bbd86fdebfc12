"""Hosted families whose layers cache something else than one K and one V, or nothing: states of
linear attention, convolutions, latents; layers that differ from one another; and such as hand on
more than hidden states, or get what follows from the text.

What transformers' whole model computes is the oracle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import quantflow
from quantflow.calibration.data import cut_windows, documents
from quantflow.checkpoints.tensor_file import TensorFile
from quantflow.cli.plan import summarise
from quantflow.decoder.decoder import open_decoder
from quantflow.errors import UserError
from quantflow.formats.reader import Weights
from quantflow.tokenizers.load import load_tokenizer
from tests.helpers.library import write_tiny
from tests.helpers.tiny import write_text
from tests.helpers.zoo import decoder_logits, random_tokens

SAMPLES, SEQLEN = 6, 20
PACK = {"pack": {"format": "huggingface"}}
# model type -> of each layer, (heads, width) of what it caches as K and as V
CACHED: dict[str, list[Any]] = {
    "bamba": [None, ((2, 16), (2, 16))],
    "deepseek_v3": [((1, 32), (1, 16))] * 2,
    "falcon_h1": [((2, 16), (2, 16))] * 2,
    # the last two read what the first two cache
    "gemma3n_text": [((2, 16), (2, 16))] * 2 + [None] * 2,
    "gemma4_text": [((2, 16), (2, 16)), ((2, 32), (2, 32)), None, None],
    "glm_moe_dsa": [((1, 32), (1, 16))] * 2,
    "jamba": [None, ((2, 16), (2, 16))],
    "nemotron_h": [None, None, ((2, 16), (2, 16)), None],
    "qwen3_5_text": [None, ((2, 16), (2, 16))],
    "qwen3_next": [None, ((2, 16), (2, 16))],
}


KINDS = ["sliding_attention", "full_attention"] * 2
CHANGES: dict[str, dict[str, Any]] = {
    "gemma4_text": {"num_hidden_layers": 4, "layer_types": KINDS, "num_kv_shared_layers": 2}
}


def library_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def recipe(root: Path, stages: list[Any]) -> dict[str, Any]:
    return {
        "name": "states",
        "model": str(root / "model"),
        "output": str(root / "out"),
        "calibration": {"data": str(root / "calib.txt"), "samples": SAMPLES, "seqlen": SEQLEN},
        "weights": {"bits": 4, "group_size": 32, "symmetric": True},
        "stages": stages,
    }


@pytest.fixture(scope="module", params=sorted(CACHED))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    write_tiny(root / "model", request.param, **CHANGES.get(request.param, {}))
    write_text(root / "calib.txt", 0, 128)
    stages = ["calibrate", {"awq": {"grid": 2}}, "gptq", "kv_qparams"]
    packs = [{"pack": {"format": form}} for form in ("compressed-tensors", "huggingface")]
    quantflow.quantize(recipe(root, stages + packs), device="cpu")
    return root


def test_layer_by_layer_is_the_whole_model(finished: Path) -> None:
    """Every layer's hidden states, to the bit."""
    weights, tokens = Weights(finished / "model"), random_tokens(2, 20)
    model, expected = library_model(finished / "model"), list[torch.Tensor]()
    library = weights.checkpoint.architecture.library
    assert library is not None
    for layer in model.get_submodule(library.prefix):
        layer.register_forward_hook(
            lambda module, args, output: expected.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
    with torch.inference_mode():
        model(tokens, use_cache=False)
        decoder, outer = open_decoder(weights.checkpoint, 20, "cpu"), weights.outer()
        x = decoder.embed({n: outer[n] for n in decoder.embeds}, tokens, torch.float32)
        for index, after in enumerate(expected):
            x = decoder.block(index, weights.layer(index), torch.float32).forward(x)
            hidden, _ = library.frame.rows(20, torch.float32, x.device).split(x)
            assert torch.equal(hidden, after), index


@pytest.mark.parametrize("form", ["compressed-tensors", "huggingface"])
def test_the_artifact_in_transformers_is_our_reference(finished: Path, form: str) -> None:
    folder, tokens = finished / "out" / form, random_tokens(2, 24)
    expected = decoder_logits(Weights(folder), tokens)
    with torch.inference_mode():
        logits = library_model(folder)(tokens, use_cache=False).logits
        original = library_model(finished / "model")(tokens, use_cache=False).logits
    assert (expected - original).abs().max() > 0.05  # it is quantised
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)


def test_parameters_of_the_layers_that_cache_k_and_v(finished: Path) -> None:
    """What transformers' own cache holds after the calibration windows; of other layers none."""
    checkpoint = Weights(finished / "model").checkpoint
    shapes = [checkpoint.cached(index) for index in range(checkpoint.config.layers)]
    assert shapes in CACHED.values()
    tokenizer = load_tokenizer(finished / "model")
    texts = documents(str(finished / "calib.txt"))
    windows = cut_windows(tokenizer, texts, count=SAMPLES, length=SEQLEN).tokens
    model = library_model(finished / "out" / "huggingface")
    # without a config it keeps all of a sliding window's keys, but has no room for states
    cache = DynamicCache(config=None if "gemma" in str(finished) else model.config)
    with torch.inference_mode():
        model(torch.tensor(windows), past_key_values=cache)
    file = TensorFile(finished / "out" / "kv_qparams.safetensors")
    assert len(file.tensors) == 4 * sum(shape is not None for shape in shapes)
    for index in checkpoint.cached_layers:
        layer = cache.layers[index]
        for letter, values in (("k", layer.keys), ("v", layer.values)):
            low, high = float(values.min()), float(values.max())
            name = f"{checkpoint.attention(index)}.{letter}"
            scale, zero = (float(file.read(f"{name}_{part}")) for part in ("scale", "zero_point"))
            assert scale == pytest.approx((high - low) / 255, rel=1e-3)
            assert zero == pytest.approx((high + low) / 2, rel=1e-3, abs=1e-3)


def test_what_is_no_linear_is_copied_and_named(finished: Path) -> None:
    """In the report; and what is a linear that a layer does not call, also to the loader."""
    source = TensorFile(finished / "model" / "model.safetensors")
    kept = json.loads((finished / "out" / "report.json").read_text())["kept"]
    written = TensorFile(finished / "out" / "compressed-tensors" / "model.safetensors")
    config = json.loads((finished / "out" / "compressed-tensors" / "config.json").read_text())
    convolutions = [n for n, info in source.tensors.items() if len(info.shape) == 3 and "conv" in n]
    for name in convolutions:
        assert kept[name.removesuffix(".weight")] == "a weight of Conv1d, which is no linear"
        assert torch.equal(written.read(name), source.read(name))
    uncalled = [name for name, why in kept.items() if why.startswith("a linear that its layer")]
    assert set(uncalled) <= set(config["quantization_config"]["ignore"])
    if "jamba" in str(finished):
        assert uncalled == ["model.layers.0.mamba.dt_proj"]


@pytest.mark.parametrize("finished", ["gemma4_text", "glm_moe_dsa"], indirect=True)
def test_rows_in_files_give_the_same(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What goes along with hidden states is spilled with them."""
    monkeypatch.setenv("QUANTFLOW_ACTIVATION_BYTES", "0")
    stages = ["calibrate", {"awq": {"grid": 2}}, "gptq", "kv_qparams", PACK]
    again = recipe(finished, stages) | {"output": str(tmp_path / "out")}
    quantflow.quantize(again, device="cpu")
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (finished / "out" / "huggingface" / "model.safetensors").read_bytes()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_text(tmp_path / "calib.txt", 0, 64)
    return tmp_path


def test_a_plan_names_layers_without_a_cache(place: Path) -> None:
    write_tiny(place / "model", "nemotron_h")
    plan = quantflow.plan(recipe(place, ["calibrate", "rtn", "kv_qparams", PACK]), device="cpu")
    (note,) = (note for note in summarise(plan, None)["notes"] if note.startswith("kv_qparams"))
    assert note == (
        "kv_qparams: 3 of 4 layers cache no K and V of their own and get no parameters: 0-1, 3"
    )


def test_a_model_that_caches_nothing_has_no_parameters(place: Path) -> None:
    write_tiny(place / "model", "mamba2")
    stages = ["calibrate", "rtn", "kv_qparams", PACK]
    with pytest.raises(UserError, match="no layer of Mamba2ForCausalLM caches K and V"):
        quantflow.plan(recipe(place, stages), device="cpu")
    stages.remove("kv_qparams")
    quantflow.quantize(recipe(place, stages), device="cpu")
    tokens, folder = random_tokens(2, 12), place / "out"
    with torch.inference_mode():
        logits = library_model(folder)(tokens, use_cache=False).logits
    torch.testing.assert_close(logits, decoder_logits(Weights(folder), tokens), rtol=0, atol=5e-5)


def test_latents_have_no_scales_in_the_checkpoint(place: Path) -> None:
    write_tiny(place / "model", "deepseek_v3")
    pack = {"pack": {"format": "compressed-tensors", "kv_scales": "fp8"}}
    with pytest.raises(UserError, match="layer 0 caches 1 × 32 and 1 × 16 values a token"):
        quantflow.plan(recipe(place, ["calibrate", "rtn", "kv_qparams", pack]), device="cpu")
