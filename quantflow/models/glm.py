"""GLM-4, dense: half of a head turns, each channel into its neighbour; gate and up are one linear;
GLM-4-0414 (`glm4`) has norms behind attention and MLP too."""

from __future__ import annotations

from quantflow.models.architecture import Architecture, Json, Layer
from quantflow.models.config import DecoderConfig, flag, number, read_partial_rope
from quantflow.models.llama import read_llama_like

# What transformers takes for keys that config.json has not.
_ABSENT = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
}


def _read(config: Json) -> DecoderConfig:
    config = {**_ABSENT, **{key: value for key, value in config.items() if value is not None}}
    return read_llama_like(
        config,
        family="glm",
        head_dim=number(config, "head_dim"),
        attention_bias=flag(config, "attention_bias", True),
        output_bias=False,
        mlp_bias=False,
        rope=read_partial_rope(config, 0.5, interleaved=True),
        uncut="its gate and up are one linear",
    )


GLM = Architecture(
    "GLM-4", ("glm",), _read, layer=Layer(gate_up="mlp.gate_up_proj"), hosted_else=True
)
GLM4 = Architecture(
    "GLM-4-0414",
    ("glm4",),
    _read,
    layer=Layer(
        gate_up="mlp.gate_up_proj",
        attention_out_norm="post_self_attn_layernorm",
        mlp_out_norm="post_mlp_layernorm",
    ),
    hosted_else=True,
)
