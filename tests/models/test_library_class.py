"""A class of transformers is built without memory for its weights."""

from __future__ import annotations

import torch
import transformers

from quantflow.models.library_class import build


def test_experts_that_fit_no_memory_are_described() -> None:
    """The largest parameter of DeepSeek-V3 and one of a terabyte; buffers have their numbers."""
    config = transformers.DeepseekV3Config(num_hidden_layers=4, n_routed_experts=2**14)
    model, _ = build(config.to_dict())
    experts = model.model.layers[3].mlp.experts.gate_up_proj
    assert experts.shape == (2**14, 4096, 7168) and experts.is_meta
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    base = config.rope_parameters["rope_theta"]
    expected = base ** -(torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
