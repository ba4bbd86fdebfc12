"""The tiny checkpoints that other tests are made of: what is in them is the library's to say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.helpers.library import tiny_config, write_tiny


def test_experts_have_the_names_of_the_hub(tmp_path: Path) -> None:
    """In the class they are one tensor of three dimensions."""
    names = set(load_file(write_tiny(tmp_path, "deepseek_v3") / "model.safetensors"))
    mlp = "model.layers.1.mlp"
    assert {f"{mlp}.experts.3.down_proj.weight", f"{mlp}.shared_experts.up_proj.weight"} <= names
    assert f"{mlp}.experts.4.down_proj.weight" not in names
    assert "model.layers.0.mlp.down_proj.weight" in names


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "qwen3_next", "bloom"])
def test_a_checkpoint_loads_and_says_something(model_type: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, model_type, torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.model_type == model_type
    with torch.inference_mode():
        logits = model(torch.arange(3, 30)[None]).logits
    assert logits.isfinite().all() and 0.1 < logits.std() < 100
    assert sum(value.numel() for value in model.parameters()) < 1_000_000


def test_every_kind_of_layer_is_there() -> None:
    assert set(tiny_config("qwen3_next").layer_types) == {"linear_attention", "full_attention"}
    assert tiny_config("qwen3_next", num_experts=8).num_experts == 8
