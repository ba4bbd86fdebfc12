"""In which format a checkpoint is: said by its config in the words of many writers, by its tensors,
or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.errors import FormatError, UserError
from quantflow.formats import FORMATS
from quantflow.formats.reader import Weights
from quantflow.formats.recognise import recognise
from quantflow.quant.numbers.integer import IntegerTensor
from quantflow.quant.scheme import Scheme
from tests.formats.helpers import random_tensor
from tests.helpers.tiny import write_llama


def written(
    folder: Path,
    name: str,
    scheme: Scheme,
    config: dict[str, Any] | None,
    *,
    beside: str = "",
    zero: int | None = None,
) -> Path:
    """A tiny model whose linears are in the format `name`, with `config` in place of what the
    format would say; `beside` is the file that says it instead of config.json. zero: every zero
    point."""
    write_llama(folder, intermediate_size=128)
    checkpoint = Checkpoint(folder)
    tensors = {n: checkpoint.tensor(n) for n in checkpoint.expected}
    form = FORMATS[name]
    for index in range(checkpoint.config.layers):
        for linear, shape in (
            (name, spec.shape) for name, spec in checkpoint.linears(index).items()
        ):
            module = f"{checkpoint.architecture.layer_prefix(index)}.{linear}"
            tensor = random_tensor(*shape, scheme, seed=index, smallest_zero=1)
            if zero is not None:
                tensor = IntegerTensor(
                    scheme, tensor.codes, tensor.scales, torch.full_like(tensor.zeros, zero)
                )
            tensors.pop(f"{module}.weight")
            tensors |= form.encode(module, tensor, torch.float16)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    if config is not None and not beside:
        raw["quantization_config"] = config
    if beside:
        (folder / beside).write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def found(folder: Path) -> str:
    result = recognise(Checkpoint(folder))
    assert result is not None
    Weights(folder).quantized("model.layers.0.self_attn.q_proj")  # and it reads
    return result[0]


GPTQ = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "awq",
            {
                "quant_method": "awq",
                "bits": 4,
                "group_size": 32,
                "version": "GEMM",
                "zero_point": True,
            },
        ),
        # AutoAWQ's own words
        ("awq", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
        ("awq", {"quant_method": "AWQ", "bits": 4, "group_size": 32}),
        ("gptq", {"quant_method": "gptq", **GPTQ}),
        ("gptq", GPTQ),  # AutoGPTQ's older quantize_config.json
        ("gptq", {"method": "gptq", "format": "gptq", **GPTQ}),
        # no sym: the zero points say it
        ("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}),
        ("gptq_v2", {"quant_method": "gptq", "checkpoint_format": "gptq_v2", **GPTQ}),
        ("gptq_v2", {"quant_method": "gptq", "format": "gptq_v2", **GPTQ}),
        ("gptq_v2", {"quant_method": "gptq_v2", **GPTQ}),
    ],
)
def test_in_the_words_of_many_writers(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    assert found(written(tmp_path, name, Scheme(4, 32, True), config)) == name


@pytest.mark.parametrize(
    ("name", "beside"), [("gptq", "quantize_config.json"), ("awq", "quant_config.json")]
)
def test_the_older_files_beside_the_config(tmp_path: Path, name: str, beside: str) -> None:
    config = (
        GPTQ
        if name == "gptq"
        else {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    )
    assert found(written(tmp_path, name, Scheme(4, 32, True), config, beside=beside)) == name


@pytest.mark.parametrize(
    ("name", "bits"),
    [("awq", 4), *((name, bits) for name in ("gptq", "gptq_v2") for bits in (2, 3, 4, 8))],
)
@pytest.mark.parametrize("group", [32, -1])
def test_by_the_tensors_alone(tmp_path: Path, name: str, bits: int, group: int) -> None:
    scheme = Scheme(bits, group, True)
    folder = written(tmp_path, name, scheme, None)
    assert found(folder) == name
    tensor = Weights(folder).quantized("model.layers.1.mlp.down_proj")
    expected = random_tensor(*tensor.shape, scheme, seed=1, smallest_zero=1)
    assert torch.equal(tensor.codes, expected.codes) and torch.equal(
        tensor.dequantize(), expected.dequantize()
    )


def test_what_leaves_a_choice_is_refused(tmp_path: Path) -> None:
    asymmetric = Scheme(4, 32, False)
    with pytest.raises(
        FormatError, match=r"zero points of either version of GPTQ.*checkpoint_format"
    ):
        found(written(tmp_path / "a", "gptq_v2", asymmetric, None))
    with pytest.raises(FormatError, match="missing its quantization_config"):
        found(written(tmp_path / "b", "compressed-tensors", Scheme(4, 32, True), None))


@pytest.mark.parametrize(("written_as", "said"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
@pytest.mark.parametrize("sym", [True, False])
def test_a_version_that_the_zero_points_contradict(
    tmp_path: Path, written_as: str, said: str, sym: bool
) -> None:
    config = {**GPTQ, "quant_method": "gptq", "checkpoint_format": said, "sym": sym}
    folder = written(tmp_path, written_as, Scheme(4, 32, sym), config, zero=8)
    with pytest.raises(FormatError, match=r"qzeros.*(other GPTQ version|as " + written_as + ")"):
        Weights(folder).quantized("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "hqq"},
        {"quant_method": None},
        {"quant_method": ["awq"]},
        {"bits": 4},
        "awq",
        [1],
        {"quant_method": "gptq"},
        {"quant_method": "gptq", **GPTQ, "is_marlin_format": True},
        {"quant_method": "gptq", **GPTQ, "bits": 5},
        {"quant_method": "gptq", **GPTQ, "group_size": "x"},
        {"quant_method": "gptq", **GPTQ, "checkpoint_format": "marlin"},
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "huggingface"},
    ],
)
def test_what_is_not_read_is_refused_with_its_place(tmp_path: Path, config: Any) -> None:
    folder = written(tmp_path, "gptq", Scheme(4, 32, True), config)
    with pytest.raises(
        UserError, match=r"quantization_config|is_marlin_format|qweight|q_proj|g_idx"
    ):
        Weights(folder).quantized("model.layers.0.self_attn.q_proj")
