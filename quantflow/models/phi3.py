"""Phi-3 and Phi-4: q, k and v are one linear, and so are gate and up; in Phi-4-mini a head turns in
part."""

from __future__ import annotations

from quantflow.models.architecture import Architecture, Json, Layer
from quantflow.models.config import DecoderConfig, layer_count, number, read_partial_rope
from quantflow.models.llama import read_llama_like


def _read(config: Json) -> DecoderConfig:
    window = config.get("sliding_window")
    if window is not None:
        window = number(config, "sliding_window")
    return read_llama_like(
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, **config},
        family="phi3",
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        rope=read_partial_rope(config, 1.0),
        sliding_windows=(window,) * layer_count(config) if window else (),
        uncut="its q, k and v are one linear, and so are gate and up",
    )


PHI3 = Architecture(
    "Phi-3",
    ("phi3",),
    _read,
    layer=Layer(qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj"),
    hosted_else=True,
)
