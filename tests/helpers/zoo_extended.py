"""Specimens of families whose decoder does more than Llama's, as their files on the hub are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.helpers.specimens import (
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    WINDOW,
    Random,
    Specimen,
    Tensors,
    llama_like,
    native,
)

D = 16


def _layers() -> list[str]:
    return [f"model.layers.{i}" for i in range(LAYERS)]


def _olmo2(random: Random) -> Specimen:
    """OLMo 2: no norm before attention or MLP, one norm over all heads of q, one over those of
    k."""
    config = llama_like(
        "olmo2", "Olmo2ForCausalLM", random, attention_bias=False, rope_theta=500000
    )
    tensors = native(random)
    for layer in _layers():
        tensors[f"{layer}.post_feedforward_layernorm.weight"] = tensors.pop(
            f"{layer}.input_layernorm.weight"
        )
        for name, heads in (("q_norm", HEADS), ("k_norm", KV_HEADS)):
            tensors[f"{layer}.self_attn.{name}.weight"] = random.norm(heads * D)
    return Specimen(config, tensors)


def _granite(random: Random) -> Specimen:
    """Granite 3: tied, with multipliers of its own."""
    config = llama_like(
        "granite",
        "GraniteForCausalLM",
        random,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        embedding_multiplier=12.0,
        residual_multiplier=0.7,
        attention_multiplier=0.11,
        logits_scaling=1.5,
    )
    return Specimen(config, native(random, head=""))


def _fused_mlps(tensors: Tensors, random: Random) -> Tensors:
    """gate and up as the rows of one tensor, the gate's first."""
    for layer in _layers():
        for name in ("gate", "up"):
            del tensors[f"{layer}.mlp.{name}_proj.weight"]
        tensors[f"{layer}.mlp.gate_up_proj.weight"] = random(2 * INNER, HIDDEN)
    return tensors


def _phi3_tensors(random: Random, head: str) -> Tensors:
    tensors = _fused_mlps(native(random, head=head), random)
    for layer in _layers():
        for letter in "qkv":
            del tensors[f"{layer}.self_attn.{letter}_proj.weight"]
        rows = (HEADS + 2 * KV_HEADS) * D
        tensors[f"{layer}.self_attn.qkv_proj.weight"] = random(rows, HIDDEN)
    return tensors


def _phi3(random: Random) -> Specimen:
    """Phi-3-mini-4k: a sliding window in every layer."""
    config = llama_like(
        "phi3",
        "Phi3ForCausalLM",
        random,
        sliding_window=WINDOW,
        original_max_position_embeddings=128,
        attention_bias=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        pad_token_id=2,
    )
    return Specimen(config, _phi3_tensors(random, "lm_head.weight"))


def _phi4_mini(random: Random) -> Specimen:
    """Three quarters of a head turn; tied."""
    config = llama_like(
        "phi3",
        "Phi3ForCausalLM",
        random,
        sliding_window=262144,
        original_max_position_embeddings=128,
        partial_rotary_factor=0.75,
        tie_word_embeddings=True,
        attention_bias=False,
        pad_token_id=2,
    )
    return Specimen(config, _phi3_tensors(random, ""))


def _glm_config(model_type: str, architecture: str, random: Random, bias: bool) -> dict[str, Any]:
    return llama_like(
        model_type,
        architecture,
        random,
        head_dim=D,
        attention_bias=bias,
        partial_rotary_factor=0.5,
        rms_norm_eps=1.5625e-07,
        pad_token_id=2,
    )


def _glm(random: Random) -> Specimen:
    """GLM-4-9B under its new names: biases on q, k and v."""
    config = _glm_config("glm", "GlmForCausalLM", random, True)
    return Specimen(config, _fused_mlps(native(random, qkv_bias=True), random))


def _glm4(random: Random) -> Specimen:
    """GLM-4-0414: two more norms a layer."""
    tensors = _fused_mlps(native(random), random)
    for layer in _layers():
        for name in ("post_self_attn_layernorm", "post_mlp_layernorm"):
            tensors[f"{layer}.{name}.weight"] = random.norm()
    return Specimen(_glm_config("glm4", "Glm4ForCausalLM", random, False), tensors)


GEMMA_HEAD = 24


def _gemma_tensors(random: Random) -> Tensors:
    """Norms that multiply by 1 + their weight, four a layer."""
    tensors = native(random, head="", size=GEMMA_HEAD)
    for layer in _layers():
        for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
            tensors[f"{layer}.{name}.weight"] = random.norm()
    return tensors


def _less_one(tensors: Tensors) -> Tensors:
    return {n: t - 1 if n.endswith("norm.weight") else t for n, t in tensors.items()}


def _gemma_config(model_type: str, random: Random, **changes: Any) -> dict[str, Any]:
    kind = {"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}[model_type]
    config = llama_like(
        model_type,
        kind,
        random,
        head_dim=GEMMA_HEAD,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=20,
        sliding_window=WINDOW,
        attention_bias=False,
        rms_norm_eps=1e-6,
        cache_implementation="hybrid",
        pad_token_id=2,
        **changes,
    )
    del config["hidden_act"], config["tie_word_embeddings"]
    return config


def _gemma2(random: Random) -> Specimen:
    """A window in the first layer, none in the second; scores and logits are capped."""
    config = _gemma_config(
        "gemma2", random, attn_logit_softcapping=5.0, final_logit_softcapping=30.0
    )
    return Specimen(config, _less_one(_gemma_tensors(random)))


def _gemma3(random: Random) -> Specimen:
    """Gemma 3's language model: norms on q and k, and two rotary embeddings, of which one is
    stretched."""
    config = _gemma_config(
        "gemma3_text",
        random,
        sliding_window_pattern=2,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        rope_local_base_freq=100.0,
    )
    config |= {"rope_theta": 1000000.0, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    tensors = _gemma_tensors(random)
    for layer in _layers():
        for name in ("q_norm", "k_norm"):
            tensors[f"{layer}.self_attn.{name}.weight"] = random.norm(GEMMA_HEAD)
    return Specimen(config, _less_one(tensors))


EXTENDED: dict[str, Callable[[Random], Specimen]] = {
    "olmo2": _olmo2, "granite": _granite, "phi3": _phi3, "phi4_mini": _phi4_mini, "glm": _glm,
    "glm4": _glm4, "gemma2": _gemma2, "gemma3": _gemma3,
}  # fmt: skip
