"""llama.cpp's names of architectures and modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Family:
    """What llama.cpp calls a family. pairs: whether q and k lie in the order of its rotary pairs.
    names: of modules, where they are other than Llama's. adds_one: norms are stored with the 1 that
    they add to their weight. activation: of the MLP, which its graph has fixed."""

    architecture: str
    pairs: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    adds_one: bool = False
    activation: str = "silu"

    @property
    def inner(self) -> dict[str, str]:
        return {**_INNER, **self.names}


_BOTH_SIDES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_FUSED = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up", "mlp.up_proj": ""}
_GLM4 = {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"}

FAMILIES = {
    "llama": Family("llama", pairs=True),
    "mistral": Family("llama", pairs=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3", names=_FUSED),
    "glm4": Family("glm4", names=_FUSED | _GLM4),
    "gemma2": Family("gemma2", names=_BOTH_SIDES, adds_one=True, activation="gelu_tanh"),
    "gemma3_text": Family("gemma3", names=_BOTH_SIDES, adds_one=True, activation="gelu_tanh"),
}
"""By model_type of config.json."""

# whose files are read without a config of our own
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def to_gguf_name(module: str, family: Family = FAMILIES["llama"]) -> str:
    """llama.cpp's name of a module: `blk.0.attn_q` for `model.layers.0.self_attn.q_proj`. KeyError
    for one that it has not."""
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"blk.{match[1]}.{family.inner[match[2]]}"
    return _OUTER[module]


def from_gguf_name(name: str, architecture: str) -> str | None:
    """The inverse of `to_gguf_name`; None for a name that is not known."""
    family = next(f for f in FAMILIES.values() if f.architecture == architecture)
    if match := re.fullmatch(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)", name):
        inner = next((ours for ours, theirs in family.inner.items() if theirs == match[2]), None)
        return inner and f"model.layers.{match[1]}.{inner}"
    return next((ours for ours, theirs in _OUTER.items() if theirs == name), None)
