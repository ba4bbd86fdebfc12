"""Quantised checkpoints that are not read are refused as what they are: by their config, or where
it is silent, by their tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors import CompressionFormat
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.errors import FormatError
from quantflow.formats import FORMATS
from quantflow.formats.reader import Weights
from quantflow.formats.recognise import refuse_quantised
from quantflow.formats.unread import HINT, unread_method
from tests.helpers.tiny import write_llama

Q = "model.layers.0.self_attn.q_proj"


def refused(folder: Path) -> str:
    """What is said, the same to who reads the weights and to who wants to quantise them."""
    messages: set[str] = set()
    reads: tuple[Callable[[], object], ...] = (
        lambda: Weights(folder),
        lambda: refuse_quantised(Checkpoint(folder)),
        lambda: refuse_quantised(Checkpoint(folder, config_only=True)),
    )
    for read in reads:
        with pytest.raises(FormatError) as error:
            read()
        messages.add(str(error.value))
    (message,) = messages
    assert HINT in message and "damaged" not in message and "does not have" not in message
    return message


def with_config(folder: Path, **config: Any) -> Path:
    raw = json.loads((write_llama(folder) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    return folder


def with_tensors(folder: Path, **tensors: torch.Tensor) -> Path:
    whole = load_file(write_llama(folder) / "model.safetensors")
    save_file(
        whole | {name.replace("__", "."): tensor for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "FP8 weights with a scale a block (quant_method 'fp8')",
        ),
        ({"quant_method": "fbgemm_fp8"}, "FP8 weights with a scale a row"),
        ({"quant_method": "HQQ"}, "weights of HQQ (quant_method 'hqq')"),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            "ModelOpt (quant_method 'modelopt', quant_algo 'NVFP4')",
        ),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "MXFP4 weights"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "INT8 weights of bitsandbytes"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {},
            },
            "FP8 weights (compressed-tensors",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mixed-precision",
                "config_groups": {
                    "group_0": {"format": "pack-quantized"},
                    "group_1": {"format": "nvfp4-pack-quantized"},
                },
            },
            "NVFP4 weights (compressed-tensors, format 'nvfp4-pack-quantized')",
        ),
    ],
)
def test_by_the_config(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    assert said in refused(with_config(tmp_path, quantization_config=config))


def test_by_what_stands_elsewhere(tmp_path: Path) -> None:
    assert "weights of MLX" in refused(
        with_config(tmp_path / "a", quantization={"group_size": 64, "bits": 4})
    )
    twice = {"group_size": 64, "bits": 4, "mode": "affine"}  # as mlx-lm writes it
    assert "weights of MLX" in refused(
        with_config(tmp_path / "b", quantization=twice, quantization_config=twice)
    )
    algorithm = {
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]},
    }
    (write_llama(tmp_path / "c") / "hf_quant_config.json").write_text(json.dumps(algorithm))
    assert "ModelOpt (quant_method 'modelopt', quant_algo 'FP8')" in refused(tmp_path / "c")


def test_every_method_that_transformers_loads_is_read_or_said() -> None:
    known = {
        "gptq",
        "awq",
        "compressed-tensors",
        "bitsandbytes_4bit",
        "bitsandbytes_8bit",
        "gguf",
        "auto-round",
    }
    for method in set(AUTO_QUANTIZATION_CONFIG_MAPPING) - known:
        assert unread_method("config.json", {"quant_method": method}) is not None, method
    for method in FORMATS:
        assert unread_method("config.json", {"quant_method": method}) is None, method


def test_every_layout_of_compressed_tensors_is_read_or_said() -> None:
    read = {"pack-quantized", "dense", "mixed-precision"}
    for layout in CompressionFormat:
        problem = unread_method(
            "config.json", {"quant_method": "compressed-tensors", "format": layout.value}
        )
        assert (problem is None) == (layout.value in read), layout


FP8 = torch.zeros(64, 64).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {f"{Q}.weight": FP8, f"{Q}.weight_scale_inv": torch.ones(1, 1)},
            "FP8 weights with a scale a block",
        ),
        (
            {f"{Q}.weight": FP8},
            (
                f"FP8 weights: 1 of 21 tensors, such as {Q}.weight of dtype F8_E4M3; expected F32,"
                " F16 or BF16"
            ),
        ),
        ({f"{Q}.weight": FP8.to(torch.float8_e5m2)}, "dtype F8_E5M2"),
        (
            {f"{Q}.weight": torch.zeros(64, 64, dtype=torch.int8), f"{Q}.SCB": torch.ones(64)},
            "INT8 weights of bitsandbytes",
        ),
        (
            {
                "model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(
                    2, 2, dtype=torch.uint8
                )
            },
            "MXFP4 weights",
        ),
        (
            {f"{Q}.weight": torch.zeros(64, 8).to(torch.uint32), f"{Q}.biases": torch.ones(64, 1)},
            "weights of MLX",
        ),
    ],
)
def test_by_the_tensors(tmp_path: Path, tensors: dict[str, torch.Tensor], said: str) -> None:
    folder = with_tensors(tmp_path, **tensors)
    with pytest.raises(FormatError) as error:
        Weights(folder)
    assert said in str(error.value)
    with pytest.raises(FormatError, match=HINT):
        refuse_quantised(Checkpoint(folder))
