"""Every architecture against transformers: float32 logits of a two-layer random checkpoint under
the family's own tensor names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.errors import ModelError
from quantflow.formats.reader import Weights
from quantflow.models.registry import ARCHITECTURES, TRANSLATIONS, family
from tests.helpers.references import REMOTE, reference
from tests.helpers.zoo import (
    EXPERTS,
    HIDDEN,
    INNER,
    ZOO,
    Specimen,
    decoder_logits,
    random_tokens,
    specimen,
    write,
)

LENGTHS = (16, 40)  # within and beyond TRAINED; both more than WINDOW


@pytest.mark.parametrize("name", ZOO)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, specimen(name), shards=2 if name.startswith("mixtral") else 1)
    weights = Weights(folder)
    for length in LENGTHS:
        tokens = random_tokens(2, length)
        with torch.inference_mode():
            expected = reference(name, folder, length)(tokens).logits
        found = decoder_logits(weights, tokens)
        # the comparison is of something, and its tolerance a few of float32's steps
        assert 5 < expected.abs().max() < 50
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_the_zoo_has_every_architecture() -> None:
    """And the translations to a table; `test_translations.py` has the others."""
    there = {specimen(name).config["model_type"] for name in ZOO}
    assert there - set(TRANSLATIONS) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ZOO)
def test_a_whole_checkpoint_has_no_problems(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, specimen(name)))
    assert checkpoint.problems() == []
    expected = checkpoint.expected
    head = "lm_head.weight"  # a tied head may be there
    assert set(checkpoint.sources) - {head} == set(expected) - {head}
    for native, shape in expected.items():
        assert tuple(checkpoint.tensor(native).shape) == shape


# Of every family: a tensor of layer 1, to be lost, and the native tensors that its loss takes away.
LOST = {
    "llama3": ("model.layers.1.mlp.up_proj.weight", ["model.layers.1.mlp.up_proj.weight"]),
    "llama_bias": (
        "model.layers.1.self_attn.o_proj.bias",
        ["model.layers.1.self_attn.o_proj.bias"],
    ),
    "internlm": ("model.layers.1.self_attn.k_proj.bias", ["model.layers.1.self_attn.k_proj.bias"]),
    "internlm2": (
        "model.layers.1.attention.wqkv.weight",
        [f"model.layers.1.self_attn.{n}_proj.weight" for n in "qkv"],
    ),
    "internlm3": ("model.layers.1.mlp.down_proj.bias", ["model.layers.1.mlp.down_proj.bias"]),
    "baichuan2": (
        "model.layers.1.self_attn.W_pack.weight",
        [f"model.layers.1.self_attn.{n}_proj.weight" for n in "qkv"],
    ),
    "mistral": ("lm_head.weight", ["lm_head.weight"]),
    "qwen": (
        "transformer.h.1.attn.c_attn.bias",
        [f"model.layers.1.self_attn.{n}_proj.bias" for n in "qkv"],
    ),
    "qwen2": ("model.norm.weight", ["model.norm.weight"]),
    "qwen3": ("model.layers.1.self_attn.q_norm.weight", ["model.layers.1.self_attn.q_norm.weight"]),
    "mixtral": (
        "model.layers.1.block_sparse_moe.experts.3.w2.weight",
        ["model.layers.1.block_sparse_moe.experts.3.w2.weight"],
    ),
    "mixtral_fused": (
        "model.layers.1.mlp.experts.down_proj",
        [f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in range(EXPERTS)],
    ),
    "qwen3_moe": ("model.layers.1.mlp.gate.weight", ["model.layers.1.mlp.gate.weight"]),
    "qwen3_moe_fused": (
        "model.layers.1.mlp.experts.down_proj",
        [f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(EXPERTS)],
    ),
    "opt": ("decoder.layers.1.fc1.bias", ["model.decoder.layers.1.fc1.bias"]),
    "olmo2": (
        "model.layers.1.post_feedforward_layernorm.weight",
        ["model.layers.1.post_feedforward_layernorm.weight"],
    ),
    "granite": ("model.norm.weight", ["model.norm.weight"]),
    "phi3": (
        "model.layers.1.self_attn.qkv_proj.weight",
        ["model.layers.1.self_attn.qkv_proj.weight"],
    ),
    "phi4_mini": (
        "model.layers.1.mlp.gate_up_proj.weight",
        ["model.layers.1.mlp.gate_up_proj.weight"],
    ),
    "glm": ("model.layers.1.self_attn.k_proj.bias", ["model.layers.1.self_attn.k_proj.bias"]),
    "glm4": (
        "model.layers.1.post_self_attn_layernorm.weight",
        ["model.layers.1.post_self_attn_layernorm.weight"],
    ),
    "gemma2": (
        "model.layers.1.pre_feedforward_layernorm.weight",
        ["model.layers.1.pre_feedforward_layernorm.weight"],
    ),
    "gemma3": (
        "model.layers.1.self_attn.q_norm.weight",
        ["model.layers.1.self_attn.q_norm.weight"],
    ),
    "opt_prefixed": (
        "model.decoder.embed_positions.weight",
        ["model.decoder.embed_positions.weight"],
    ),
}


@pytest.mark.parametrize("name", ZOO)
def test_lost_misshapen_and_unknown_tensors_are_problems(name: str, tmp_path: Path) -> None:
    lost, natives = LOST[name]
    found = specimen(name)
    tensors = dict(found.tensors)
    del tensors[lost]
    problems = Checkpoint(write(tmp_path / "lost", Specimen(found.config, tensors))).problems()
    assert [p.found for p in problems] == [f"missing tensors: {', '.join(natives)}"]

    # One row (of each expert) too few: no view fits, or the shape is another one.
    odd = found.tensors[lost]
    cut = odd[:, :-1] if odd.dim() == 3 else odd[:-1]
    misshapen = Checkpoint(
        write(
            tmp_path / "misshapen", Specimen(found.config, found.tensors | {lost: cut.contiguous()})
        )
    )
    (problem,) = misshapen.problems()  # one, however many native tensors lie in it
    assert lost in problem.where and problem.hint == "config.json and weights disagree"

    extra = {"model.vision.patch.weight": torch.zeros(2)}
    problems = Checkpoint(
        write(tmp_path / "unknown", Specimen(found.config, found.tensors | extra))
    ).problems()
    assert len(problems) == 1
    assert "model.vision.patch.weight" in problems[0].found and "does not have" in problems[0].found


def test_a_tensor_of_integers_is_a_problem(tmp_path: Path) -> None:
    found = specimen("llama3")
    name = "model.layers.0.mlp.up_proj.weight"
    whole = found.tensors | {name: torch.zeros(INNER, HIDDEN, dtype=torch.int32)}
    (problem,) = Checkpoint(write(tmp_path, Specimen(found.config, whole))).problems()
    assert name in problem.where and problem.found == "dtype I32"


@pytest.mark.parametrize("model_type", ["chameleon9", None, ["llama"]])
def test_an_unknown_model_type_is_refused_with_what_is_missing(
    model_type: object, tmp_path: Path
) -> None:
    found = specimen("llama3")
    with pytest.raises(ModelError) as caught:
        Checkpoint(
            write(tmp_path, Specimen(found.config | {"model_type": model_type}, found.tensors))
        )
    (problem,) = caught.value.problems
    assert problem.found == repr(model_type)
    for known in (*ARCHITECTURES, *TRANSLATIONS):
        assert known in problem.expected
    assert "tensor names" in problem.hint and "what its decoder computes" in problem.hint


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama3", {"hidden_act": "xielu"}, "hidden_act is 'xielu'"),
        ("llama3", {"num_attention_heads": 3, "head_dim": None}, "num_attention_heads 3"),
        ("llama3", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ("llama3", {"vocab_size": "many"}, "vocab_size is 'many'"),
        ("llama3", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'"),
        ("llama3", {"rope_scaling": {"type": "linear"}}, "no positive factor"),
        ("llama3", {"rope_scaling": {"type": "dynamic", "factor": 0}}, "no positive factor"),
        (
            "llama3",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "no positive low_freq_factor and high_freq_factor",
        ),
        ("llama3", {"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ("llama3", {"rope_theta": "big"}, "rope_theta is 'big'"),
        ("llama3", {"torch_dtype": "float8_e4m3fn"}, "'float8_e4m3fn'"),
        ("llama3", {"hidden_act": ["silu"]}, "hidden_act is ['silu']"),
        ("mistral", {"sliding_window": "wide"}, "sliding_window is 'wide'"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ("llama3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("internlm", {"rotary": {"base": 10000, "type": "spiral"}}, "'spiral'"),
        ("qwen", {"rotary_pct": 0.25}, "rotary_pct"),
        ("qwen", {"no_bias": False}, "no_bias"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok 5"),
        ("qwen3_moe", {"num_experts": None}, "num_experts"),
    ],
)
def test_a_config_that_cannot_be_followed_names_its_key(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    found = specimen(name)
    with pytest.raises(ModelError) as caught:
        Checkpoint(write(tmp_path, Specimen(found.config | changes, found.tensors)))
    (problem,) = caught.value.problems
    assert problem.where.endswith("config.json") and said in problem.found


@pytest.mark.parametrize("name", ZOO)
def test_the_native_config_is_plain_and_reads_back_the_same(name: str) -> None:
    """transformers builds its own class from it, without remote code, and the tensors it wants are
    the native ones."""
    raw = specimen(name).config
    architecture = family(raw, Path())
    native = architecture.native_config(json.loads(json.dumps(raw)))
    assert "auto_map" not in native if name in REMOTE else native == raw
    read, again = (
        architecture.read_config(raw),
        ARCHITECTURES[native["model_type"]].read_config(native),
    )
    for field in (
        "hidden",
        "intermediate",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "vocabulary",
        "norm_eps",
        "dtype",
        "tied",
        "attention_bias",
        "output_bias",
        "mlp_bias",
        "qk_norm",
        "experts",
        "sliding_windows",
    ):
        assert getattr(read, field) == getattr(again, field), field
    # Qwen2 has no place for the first Qwen's way beyond the trained length; the notes say so
    if name != "qwen":
        assert (read.rope, read.max_positions) == (again.rope, again.max_positions)
