"""Tiny random checkpoints of families that have no table, made from their own config classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from quantflow.checkpoints.tensor_file import save_tensors
from tests.helpers.tiny import write_tokenizer
from tests.helpers.zoo import HEADS, HIDDEN, INNER, KV_HEADS, VOCABULARY, WINDOW


def write_gemma3(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Gemma 3's text model of three layers: a sliding window, full attention, a sliding window;
    norms on q and k, four norms a layer, a scaled embedding that is the head too. It has a number
    that transformers passes over and no table follows, so that it is hosted."""
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        attn_logit_softcapping=50.0,
        **changes,
    )
    return write_random(folder, transformers.Gemma3ForCausalLM, config, dtype)


def write_other(folder: Path, model_type: str, dtype: torch.dtype = torch.float32) -> Path:
    """Two layers of any family whose config has the usual names."""
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    return write_random(folder, type(model), config, dtype)


def write_random(folder: Path, kind: type[Any], config: Any, dtype: torch.dtype) -> Path:
    """A checkpoint of the class with random weights, whose channels differ in size: else AWQ finds
    nothing to do."""
    folder.mkdir(parents=True, exist_ok=True)
    assert write_tokenizer(folder) <= VOCABULARY
    generator = torch.Generator().manual_seed(3)
    model = kind(config)
    tensors = {}
    for name, value in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        random = torch.randn(value.shape, generator=generator)
        if value.dim() == 1:
            random = random.mul(0.4).exp() - (1.0 if "norm" in name and _adds_one(config) else 0.0)
        else:
            sizes = torch.randn(*value.shape[:-1], 1, generator=generator).mul(0.5).exp()
            random = random * sizes * 0.1
        tensors[name] = random.to(dtype)
    values = {**config.to_dict(), "architectures": [kind.__name__]}
    values["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(values))
    save_tensors(folder / "model.safetensors", tensors)
    return folder


def _adds_one(config: Any) -> bool:
    return str(config.model_type).startswith("gemma")
