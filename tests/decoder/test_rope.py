"""Rotary embedding against transformers' `ROPE_INIT_FUNCTIONS`, and the first Qwen's steps by
hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from quantflow.decoder.rope import inverse_frequencies, rotary_table, rotate
from quantflow.models.config import DecoderConfig, Rope
from quantflow.models.llama import read_llama_like

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}

# name, rope_scaling, trained length, sequence length
CASES: list[tuple[str, dict[str, Any], int, int]] = [
    ("linear", {"type": "linear", "factor": 4.0}, 128, 64),
    ("linear beyond", {"rope_type": "linear", "factor": 2.5}, 128, 300),
    ("dynamic within", {"type": "dynamic", "factor": 2.0}, 128, 128),
    ("dynamic just beyond", {"type": "dynamic", "factor": 2.0}, 128, 129),
    ("dynamic far beyond", {"rope_type": "dynamic", "factor": 3.0}, 128, 1000),
    ("dynamic of factor 1", {"rope_type": "dynamic", "factor": 1.0}, 128, 200),
    (
        "dynamic, original length",
        {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64},
        128,
        200,
    ),
    ("llama3", LLAMA3, 2048, 64),
    ("llama3 beyond", LLAMA3, 2048, 4096),
    (
        "llama3, other factors",
        {**LLAMA3, "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0},
        2048,
        64,
    ),
    (
        "llama3 without original length",
        {k: v for k, v in LLAMA3.items() if "original" not in k},
        256,
        64,
    ),
    ("yarn", YARN, 2048, 64),
    ("yarn beyond", YARN, 2048, 4096),
    ("yarn, betas", {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}, 2048, 64),
    ("yarn, attention factor", {**YARN, "attention_factor": 0.75}, 2048, 64),
    ("yarn, mscale", {**YARN, "mscale": 0.707, "mscale_all_dim": 1.2}, 2048, 64),
    ("yarn, not truncated", {**YARN, "truncate": False}, 2048, 64),
    ("yarn of factor 1", {**YARN, "factor": 1.0}, 512, 64),
    ("yarn without original length", {"type": "yarn", "factor": 2.0}, 512, 64),
]


def _hub_config(
    scaling: dict[str, Any] | None, trained: int, theta: float = 50000.0
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 10,
        "max_position_embeddings": trained,
        "rope_theta": theta,
        "rope_scaling": scaling,
    }


@pytest.mark.parametrize(
    ("scaling", "trained", "length"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_inverse_frequencies_are_those_of_transformers(
    scaling: dict[str, Any], trained: int, length: int
) -> None:
    raw = _hub_config(scaling, trained)
    theirs = LlamaConfig(**{k: dict(v) if isinstance(v, dict) else v for k, v in raw.items()})
    kind = theirs.rope_parameters["rope_type"]
    expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=length)
    found, factor = inverse_frequencies(read_llama_like(raw), length)
    assert found.shape == (16,) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_the_cases_differ_from_plain_rotary_embedding() -> None:
    """A comparison of two things that both do nothing would prove nothing."""
    plain, _ = inverse_frequencies(read_llama_like(_hub_config(None, 128)), 64)
    for name, scaling, trained, length in CASES:
        changed, _ = inverse_frequencies(read_llama_like(_hub_config(scaling, trained)), length)
        assert torch.allclose(changed, plain, rtol=1e-5, atol=0) == (
            name in ("dynamic within", "yarn of factor 1")
        ), name


def test_rope_parameters_of_transformers_5_say_the_same() -> None:
    old = _hub_config(LLAMA3, 2048)
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")} | {
        "rope_parameters": {**LLAMA3, "rope_theta": 50000.0}
    }
    assert read_llama_like(old).rope == read_llama_like(new).rope


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN, {"type": "dynamic", "factor": 2.0}])
def test_rotated_queries_are_those_of_transformers(scaling: dict[str, Any] | None) -> None:
    raw = _hub_config(scaling, 32)
    length = 48
    config = read_llama_like(raw)
    x = torch.randn(2, 4, length, 32, generator=torch.Generator().manual_seed(0))
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(**{k: dict(v) if isinstance(v, dict) else v for k, v in raw.items()})
    )
    cos, sin = theirs(x, torch.arange(length)[None])
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(
        rotate(x, *rotary_table(config, length)), expected, rtol=0, atol=1e-5
    )


def test_a_rotation_by_hand() -> None:
    """Head of four: channel 0 turns with channel 2 by the position, 1 with 3 by a hundredth of
    it."""
    config = DecoderConfig("llama", 4, 4, 1, 1, 1, 4, 4, 64, 1e-6, "silu", "float32", Rope(10000.0))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 3, 4)
    angle, slow = 2.0, 0.02
    expected = torch.tensor([
        math.cos(angle) - 3 * math.sin(angle), 2 * math.cos(slow) - 4 * math.sin(slow),
        3 * math.cos(angle) + math.sin(angle), 4 * math.cos(slow) + 2 * math.sin(slow),
    ])  # fmt: skip
    found = rotate(x, *rotary_table(config, 3))[0, 0]
    torch.testing.assert_close(found[0], x[0, 0, 0])
    torch.testing.assert_close(found[2], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("length", "alpha"), [(1, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (8192, 7), (8193, 15)]
)
def test_the_first_qwen_raises_its_base_in_steps(length: int, alpha: int) -> None:
    config = DecoderConfig(
        "llama", 128, 4, 1, 1, 1, 128, 4, 2048, 1e-6, "silu", "float32", Rope(10000.0, "qwen")
    )
    found, factor = inverse_frequencies(config, length)
    base = 10000.0 * alpha ** (128 / 126)
    torch.testing.assert_close(
        found, torch.tensor([base ** (-2 * i / 128) for i in range(64)]), rtol=1e-6, atol=0
    )
    assert factor == 1.0
