"""Gemma 2 and the language model of Gemma 3: norms multiply by 1 + their weight and stand on both
sides of attention and MLP; the embedding is scaled; sliding windows alternate with full attention.

Gemma 2 caps scores and logits. Gemma 3 has norms on q and k, and another rotary embedding in the
layers with a window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from quantflow.models.architecture import Architecture, Json, Layer
from quantflow.models.config import (
    ConfigProblem,
    DecoderConfig,
    Rope,
    flag,
    layer_count,
    number,
    read_rope,
)
from quantflow.models.llama import read_activation, read_llama_like, read_windows

_LAYER = Layer(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)


def _read(config: Json, family: str, every: int, **changes: Any) -> DecoderConfig:
    """every: which layer has full attention, where config.json does not list them."""
    if flag(config, "use_bidirectional_attention"):
        raise ConfigProblem("use_bidirectional_attention is true: expected a causal decoder")
    layers = layer_count(config)
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    config = {"max_position_embeddings": 8192, "num_key_value_heads": 4, **config}
    config["layer_types"] = config.get("layer_types") or kinds
    return read_llama_like(
        config,
        family=family,
        head_dim=number(config, "head_dim", default=256),
        activation=read_activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        mlp_bias=False,
        tied=flag(config, "tie_word_embeddings", True),
        sliding_windows=read_windows(config),
        norm_offset=1.0,
        embedding_scale=math.sqrt(number(config, "hidden_size")),
        attention_scale=number(config, "query_pre_attn_scalar", float, 256.0) ** -0.5,
        **changes,
    )


def _cap(config: Json, name: str, absent: float | None) -> float | None:
    if config.get(name, absent) is None:
        return None
    value: float = number(config, name, float, absent)
    return value


def _read_gemma2(config: Json) -> DecoderConfig:
    return _read(
        config,
        "gemma2",
        2,
        attention_cap=_cap(config, "attn_logit_softcapping", 50.0),
        logit_cap=_cap(config, "final_logit_softcapping", 30.0),
    )


def _read_gemma3(config: Json) -> DecoderConfig:
    if config.get("attn_logit_softcapping") is not None:
        raise ConfigProblem(
            f"attn_logit_softcapping is {config['attn_logit_softcapping']!r}, expected null"
        )
    rope, local = _ropes(config)
    return _read(
        {"max_position_embeddings": 131072, **config},
        "gemma3",
        number(config, "sliding_window_pattern", default=6),
        logit_cap=_cap(config, "final_logit_softcapping", None),
        qk_norm=True,
        rope=rope,
        local_rope=local,
    )


def _ropes(config: Json) -> tuple[Rope, Rope]:
    """Of layers with full attention, and of those with a window: `rope_parameters` with one object
    for each (transformers 5), or rope_theta, rope_scaling and rope_local_base_freq."""
    nested = config.get("rope_parameters") or {}
    if not isinstance(nested, Mapping):
        raise ConfigProblem(f"rope_parameters is {nested!r}, expected an object")
    kinds = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
    if strange := [kind for kind in nested if kind not in kinds]:
        raise ConfigProblem(
            f"rope_parameters has {strange[0]!r}, expected full_attention and sliding_attention"
        )
    ropes = []
    for (kind, theta), absent in zip(kinds.items(), (1e6, 1e4), strict=True):
        own = dict(nested.get(kind) or {})
        if kind == "full_attention" and isinstance(config.get("rope_scaling"), Mapping):
            own |= config["rope_scaling"]
        stated = number({theta: config.get(theta)}, theta, float, absent)
        positions = {key: config[key] for key in ("max_position_embeddings",) if key in config}
        ropes.append(read_rope({**positions, "rope_theta": stated, "rope_parameters": own}))
    return ropes[0], ropes[1]


GEMMA2 = Architecture("Gemma 2", ("gemma2",), _read_gemma2, layer=_LAYER, hosted_else=True)
GEMMA3 = Architecture(
    "Gemma 3", ("gemma3_text",), _read_gemma3, layer=_LAYER, hosted_else=True, layered_rope=True
)
