"""OLMo 2: norms stand behind attention and MLP, and one norm is over all heads of q, or of k."""

from __future__ import annotations

from quantflow.models.architecture import Architecture, Json, Layer
from quantflow.models.config import DecoderConfig
from quantflow.models.llama import read_llama_like


def _read(config: Json) -> DecoderConfig:
    return read_llama_like(
        {"rms_norm_eps": 1e-5, **config},
        family="olmo2",
        qk_norm=True,
        qk_norm_whole=True,
        mlp_bias=False,
        uncut="its norms are over all heads of q, and of k, together",
    )


OLMO2 = Architecture(
    "OLMo 2",
    ("olmo2",),
    _read,
    layer=Layer(
        attention_norm="",
        attention_out_norm="post_attention_layernorm",
        mlp_norm="",
        mlp_out_norm="post_feedforward_layernorm",
    ),
    hosted_else=True,
)
