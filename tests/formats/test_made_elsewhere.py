"""Checkpoints that llm-compressor and GPTQModel wrote, against what their own packages read from
them; `made_elsewhere/README.md`."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor

from quantflow.errors import FormatError
from quantflow.formats.reader import Weights
from quantflow.pipeline.export import export
from quantflow.quant.scheme import Scheme

FOLDER = Path(__file__).parent / "made_elsewhere"
SCHEMES = {
    "llmcompressor_w4_asymmetric": Scheme(4, 16, False),
    "llmcompressor_w4_static": Scheme(4, 16, True),
    "llmcompressor_w8_channel": Scheme(8, -1, True),
    "llmcompressor_older_w4_group": Scheme(4, 16, True),
    "gptqmodel_v1_asymmetric": Scheme(4, 16, False),
    "gptqmodel_v2_act_order": Scheme(4, 16, False),
    "autoround_v1_symmetric": Scheme(4, 16, True),
    "autoround_v1_asymmetric": Scheme(4, 16, False),
    "autoround_v2_mixed": Scheme(4, 16, False),
    "autoround_awq": Scheme(4, 16, False),
}
# Modules of one checkpoint that are not as the others: by name, and by a part of the name; None for
# one that is not quantised.
MIXED = {
    "autoround_v2_mixed": {
        "model.layers.0.mlp.down_proj": Scheme(8, 16, True),
        "model.layers.0.self_attn.k_proj": Scheme(2, 32, True),
        "model.layers.1.self_attn.k_proj": Scheme(2, 32, True),
        "model.layers.1.self_attn.o_proj": None,
    }
}
ONE_LESS = {"autoround_v1_asymmetric"}  # its package writes a zero point of 1 where it would be 0
INDEXED = {"llmcompressor_older_w4_group", "gptqmodel_v2_act_order"}
WITH_HEAD = {"gptqmodel_v2_act_order"}
LIVE = [name for name in SCHEMES if not (FOLDER / name / "dequantised.json").exists()]
STORED = [name for name in SCHEMES if name not in LIVE]


def bits(weight: Tensor) -> bytes:
    return weight.contiguous().view(torch.int16).numpy().tobytes()


def whole(name: str, folder: Path) -> Path:
    """A copy of a checkpoint with a tokenizer, any, which an export wants."""
    shutil.copytree(FOLDER / name, folder)
    Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0")).save(
        str(folder / "tokenizer.json")
    )
    return folder


def everything(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Every quantised tensor of a checkpoint, by module."""
    weights = Weights(folder)
    found = {}
    for module in weights.modules:
        q = weights.quantized(module)
        index = None if q.group_index is None else q.group_index.tolist()
        found[module] = (
            q.scheme,
            q.codes.tolist(),
            q.scales.double().tolist(),
            q.zeros.tolist(),
            index,
        )
    return found


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_quantised_and_how(name: str) -> None:
    weights = Weights(FOLDER / name)
    linears = {f"self_attn.{part}_proj" for part in "qkvo"} | {
        f"mlp.{part}_proj" for part in ("gate", "up", "down")
    }
    schemes = {
        f"model.layers.{i}.{linear}": SCHEMES[name] for i in range(2) for linear in linears
    } | MIXED.get(name, {})
    modules = {module for module, scheme in schemes.items() if scheme}
    assert weights.modules == modules | ({"lm_head"} if name in WITH_HEAD else set())
    for module in modules:
        tensor = weights.quantized(module)
        said = weights.scheme_of(module)
        assert said is not None and tensor.scheme == schemes[module]
        # of AWQ's, its zero points say the rest
        assert replace(said, symmetric=tensor.scheme.symmetric) == tensor.scheme
        assert (tensor.group_index is not None) == (name in INDEXED)
    zeros = weights.quantized("model.layers.0.self_attn.q_proj").zeros
    assert bool((zeros == 0).any()) == (not SCHEMES[name].symmetric and name not in ONE_LESS)
    head = weights.scheme_of("lm_head")
    assert head == (Scheme(8, 32, True) if name in WITH_HEAD else None)
    if head is None:
        assert weights.tensor("lm_head.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("name", LIVE)
def test_compressed_tensors_reads_the_same(name: str) -> None:
    weights = Weights(FOLDER / name)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    config = json.loads((FOLDER / name / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    tensors = load_file(FOLDER / name / "model.safetensors")
    for module in weights.modules:
        own = {
            key.removeprefix(f"{module}."): tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{module}.")
        }
        theirs = compressor.decompress(own, scheme)["weight"]
        # It multiplies in the scales' dtype: a small integer, which bf16 holds, by a scale, rounded
        # once.
        assert theirs.dtype == torch.bfloat16
        assert bits(weights.quantized(module).dequantize(torch.bfloat16)) == bits(theirs), module


@pytest.mark.parametrize("name", STORED)
def test_their_own_reading_is_ours(name: str) -> None:
    weights = Weights(FOLDER / name)
    stored = json.loads((FOLDER / name / "dequantised.json").read_text())
    assert stored.keys() == weights.modules
    for module, (dtype, digest) in stored.items():
        ours = weights.quantized(module).dequantize(getattr(torch, dtype))
        # symmetric, it makes scales below 0; and a sum, as its digests are of, knows no -0
        if name.startswith("autoround"):
            ours = ours + 0.0
        assert hashlib.sha256(bits(ours)).hexdigest() == digest, module


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        # bf16 scales of this size are exact in fp16, and fp16 scales stay what they are in a
        # checkpoint of fp16 scales.
        ("llmcompressor_w4_asymmetric", ("gptq_v2", "compressed-tensors")),
        ("llmcompressor_w4_asymmetric", ("awq", "gptq_v2", "compressed-tensors")),
        ("llmcompressor_w4_static", ("awq", "gptq", "compressed-tensors")),
        ("llmcompressor_w8_channel", ("gptq", "gptq_v2", "compressed-tensors")),
        ("llmcompressor_older_w4_group", ("gptq", "gptq_v2")),
        ("gptqmodel_v1_asymmetric", ("awq", "gptq_v2")),
        ("autoround_v1_symmetric", ("awq", "gptq", "gptq_v2")),
        ("autoround_v2_mixed", ("gptq_v2",)),
        ("autoround_awq", ("gptq_v2", "awq")),
    ],
)
def test_export_and_back(name: str, formats: tuple[str, ...], tmp_path: Path) -> None:
    source, first = whole(name, tmp_path / "source"), everything(FOLDER / name)
    for format_name in formats:
        target = tmp_path / format_name
        export(source, format_name, target)
        assert everything(target) == first, format_name
        source = target
    before, after = Weights(FOLDER / name), Weights(source)
    for tensor in before.checkpoint.expected:
        if not before.is_quantised(tensor):
            assert torch.equal(before.tensor(tensor), after.tensor(tensor))


@pytest.mark.parametrize(
    ("name", "format_name", "message"),
    [
        ("llmcompressor_w4_asymmetric", "gptq", r"proj\.qzeros: \d+ zero points are 0"),
        ("llmcompressor_w8_channel", "awq", "8 bits; expected 4 bits"),
        ("llmcompressor_older_w4_group", "compressed-tensors", "a group index"),
        ("llmcompressor_older_w4_group", "awq", "a group index"),
        ("gptqmodel_v1_asymmetric", "gptq", r"proj\.qzeros: \d+ zero points are 0"),
        (
            "gptqmodel_v1_asymmetric",
            "compressed-tensors",
            r"proj\.weight_scale: \d+ of \d+ scales are no exact bfloat16",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    name: str, format_name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        export(whole(name, tmp_path / "source"), format_name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bf16_scale_that_fp16_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    source = whole("llmcompressor_w4_static", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    # fp16 has five bits left there
    tensors["model.layers.1.mlp.up_proj.weight_scale"][5, 1] = 1.0078125 * 2**-20
    save_file(tensors, source / "model.safetensors")
    for format_name in ("awq", "gptq_v2"):
        with pytest.raises(
            FormatError,
            match=r"model\.layers\.1\.mlp\.up_proj\.scales: 1 of 128 scales are no exact float16",
        ):
            export(source, format_name, tmp_path / "out")
    export(source, "compressed-tensors", tmp_path / "out")
