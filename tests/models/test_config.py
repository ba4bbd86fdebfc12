"""config.json as nobody should write it: what cannot be followed is refused by name, and nothing
else comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantflow.decoder.rope import inverse_frequencies
from quantflow.models.config import ConfigProblem
from quantflow.models.registry import family
from tests.helpers.zoo import specimen


def read(name: str, **changes: Any) -> Any:
    config = {**specimen(name).config, **changes}
    return family(config, Path()).read_config(config)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (
            "qwen",
            {"rotary_pct": None, "kv_channels": 15},
            "head_dim is 15, expected an even number",
        ),
        ("qwen", {"rotary_pct": [1.0]}, "rotary_pct is"),
        ("qwen", {"rotary_pct": "all"}, "rotary_pct is 'all'"),
        ("qwen", {"bf16": "false"}, "bf16 is 'false', expected true or false"),
        ("qwen", {"use_dynamic_ntk": "no"}, "use_dynamic_ntk is 'no'"),
        ("qwen", {"rotary_emb_base": 1e-320}, "expected at least 1"),
        ("qwen", {"kv_channels": 2}, "head_dim is 2, expected more with rope scaling of type qwen"),
        ("qwen2", {"use_sliding_window": "false"}, "use_sliding_window is 'false'"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types has 'chunked_attention'",
        ),
        ("qwen2", {"layer_types": ["full_attention", {}]}, "layer_types has {}"),
        ("qwen3", {"head_dim": 25}, "head_dim is 25, expected an even number"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers is 1, expected a list of layers"),
        ("qwen3_moe", {"mlp_only_layers": [[0]]}, "mlp_only_layers is"),
        ("qwen3_moe", {"num_experts": 2**40}, "expected at most 100000 experts in all layers"),
        ("mixtral", {"num_local_experts": 2**62}, "expected at most 100000 experts in all layers"),
        ("opt", {"enable_bias": "false"}, "enable_bias is 'false'"),
        ("opt", {"do_layer_norm_before": 0}, "do_layer_norm_before is 0"),
        ("llama3", {"rope_theta": 1e-320}, "rope_theta is 1e-320, expected at least 1"),
        (
            "llama3",
            {"rope_scaling": {"rope_type": "linear", "factor": 1e-300}},
            "factor 1e-300, expected at least 1",
        ),
        (
            "llama3",
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "not above",
        ),
        (
            "internlm2",
            {"head_dim": 2},
            "head_dim is 2, expected more with rope scaling of type dynamic",
        ),
        ("internlm", {"rotary": "linear"}, "rotary of type 'linear'"),
        ("internlm", {"rotary": ["dynamic"]}, "rotary of type"),
    ],
)
def test_what_cannot_be_followed_is_named(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigProblem) as refused:
        read(name, **changes)
    assert said in str(refused.value)


def test_a_rotary_kind_by_its_name_alone() -> None:
    assert (
        read("internlm", rotary="dynamic").rope
        == read("internlm", rotary={"type": "dynamic", "base": 10000}).rope
    )
    assert read("internlm", rotary="origin").rope.kind == "default"


def test_the_least_that_is_read_gives_finite_angles() -> None:
    least = {"rope_type": "llama3", "factor": 1, "low_freq_factor": 1, "high_freq_factor": 1.001}
    for changes in (
        {"rope_theta": 1},
        {"rope_scaling": least},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 1}, "head_dim": 4},
    ):
        frequencies, scale = inverse_frequencies(read("llama3", **changes), 4096)
        assert bool(torch.isfinite(frequencies).all()) and scale == 1.0
