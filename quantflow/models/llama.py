"""Llama and the families that share its decoder: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from typing import Any

from quantflow.models.architecture import Architecture, Json
from quantflow.models.config import (
    ConfigProblem,
    DecoderConfig,
    check_head,
    flag,
    layer_count,
    number,
    read_dtype,
    read_rope,
)

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}

# What transformers takes for keys that config.json has not, where that differs from Llama's.
MISTRAL_ABSENT = {"max_position_embeddings": 131072, "num_key_value_heads": 8}
_QWEN_ABSENT = {"max_position_embeddings": 32768, "num_key_value_heads": 32}


def read_activation(config: Json, key: str = "hidden_act", default: str = "silu") -> str:
    name = config.get(key, default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigProblem(f"{key} is {name!r}; QuantFlow knows {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def read_llama_like(config: Json, **changes: Any) -> DecoderConfig:
    """The decoder of a Llama-like config.json; `changes` overrides single fields."""
    hidden, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    if config.get("head_dim") is None and hidden % heads:
        raise ConfigProblem(
            f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and there is no"
            " head_dim"
        )
    kv_heads = number(config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ConfigProblem(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    layers = layer_count(config)
    bias = flag(config, "attention_bias")
    fields: dict[str, Any] = {
        "family": "llama",
        "hidden": hidden,
        "intermediate": number(config, "intermediate_size"),
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": number(config, "head_dim", default=hidden // heads),
        "vocabulary": number(config, "vocab_size"),
        "max_positions": number(config, "max_position_embeddings", default=2048),
        "norm_eps": number(config, "rms_norm_eps", float, 1e-6),
        "activation": read_activation(config),
        "dtype": read_dtype(config),
        "rope": changes["rope"] if "rope" in changes else read_rope(config),
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": flag(config, "mlp_bias"),
        "tied": flag(config, "tie_word_embeddings"),
    }
    decoder = DecoderConfig(**{**fields, **changes})
    check_head(decoder.head_dim, decoder.rope)
    return decoder


def read_windows(
    config: Json, first: int = 0, *, absent: int | None = 4096
) -> tuple[int | None, ...]:
    """The sliding window of every layer from `first` on; () without one. absent: the family's where
    config.json says nothing."""
    if config.get("sliding_window", absent) is None:
        return _no_windows(config, "sliding_window is null")
    window, layers = number(config, "sliding_window", default=absent), layer_count(config)
    if kinds := config.get("layer_types"):
        if not isinstance(kinds, list):
            raise ConfigProblem(f"layer_types is {kinds!r}, expected a list")
        if len(kinds) != layers:
            raise ConfigProblem(
                f"layer_types has {len(kinds)} entries, num_hidden_layers is {layers}"
            )
        if strange := [
            kind for kind in kinds if kind not in ("full_attention", "sliding_attention")
        ]:
            raise ConfigProblem(
                f"layer_types has {strange[0]!r}; QuantFlow knows full_attention and"
                " sliding_attention"
            )
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return tuple(window if i >= first else None for i in range(layers))


def _no_windows(config: Json, why: str) -> tuple[int | None, ...]:
    if "sliding_attention" in (config.get("layer_types") or ()):
        raise ConfigProblem(f"layer_types has sliding_attention, and {why}")
    return ()


def _read_mistral(config: Json) -> DecoderConfig:
    windows = read_windows(config)
    if None in windows:  # transformers' Mistral leaves layer_types out, others follow it
        raise ConfigProblem(
            "layer_types has full_attention, and sliding_window is one for all layers of this"
            " family"
        )
    return read_llama_like(
        {**MISTRAL_ABSENT, **config},
        sliding_windows=windows,
        attention_bias=False,
        output_bias=False,
    )


def _qwen_windows(config: Json) -> tuple[int | None, ...]:
    if not flag(config, "use_sliding_window"):
        return _no_windows(config, "use_sliding_window is not true")
    first = config.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise ConfigProblem(f"max_window_layers is {first!r}, expected an integer")
    return read_windows(config, first)


def _read_qwen2(config: Json) -> DecoderConfig:
    return read_llama_like(
        {**_QWEN_ABSENT, **config},
        attention_bias=True,
        output_bias=False,
        sliding_windows=_qwen_windows(config),
    )


def _read_qwen3(config: Json) -> DecoderConfig:
    head_dim = number(config, "head_dim", default=128)
    return read_llama_like(
        {**_QWEN_ABSENT, **config},
        qk_norm=True,
        head_dim=head_dim,
        sliding_windows=_qwen_windows(config),
    )


LLAMA = Architecture("Llama", ("llama",), read_llama_like)
MISTRAL = Architecture("Mistral", ("mistral",), _read_mistral)
QWEN2 = Architecture("Qwen2", ("qwen2",), _read_qwen2)
QWEN3 = Architecture("Qwen3", ("qwen3",), _read_qwen3)
