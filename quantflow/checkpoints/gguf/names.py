"""llama.cpp's names of architectures and modules."""

from __future__ import annotations

import re

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

# model_type of config.json -> the architecture's name, and whether q and k lie in the order of
# llama.cpp's rotary pairs
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def to_gguf_name(module: str) -> str:
    """llama.cpp's name of a module: `blk.0.attn_q` for `model.layers.0.self_attn.q_proj`. KeyError
    for one that it has not."""
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"blk.{match[1]}.{_INNER[match[2]]}"
    return _OUTER[module]


def from_gguf_name(name: str) -> str | None:
    """The inverse of `to_gguf_name`; None for a name that is not known."""
    if match := re.fullmatch(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)", name):
        inner = next((ours for ours, theirs in _INNER.items() if theirs == match[2]), None)
        return inner and f"model.layers.{match[1]}.{inner}"
    return next((ours for ours, theirs in _OUTER.items() if theirs == name), None)
