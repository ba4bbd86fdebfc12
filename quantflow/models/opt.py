"""OPT: LayerNorm before each block, learned positions, a plain MLP with biases."""

from __future__ import annotations

from quantflow.models.architecture import Architecture, Json, Layer, Source
from quantflow.models.config import (
    ConfigProblem,
    DecoderConfig,
    flag,
    layer_count,
    number,
    read_dtype,
)
from quantflow.models.llama import read_activation


def _sources(name: str, shape: tuple[int, ...], config: DecoderConfig) -> dict[str, Source]:
    # The hub's older files leave out the "model." in front.
    return {f"model.{name}" if name.startswith("decoder.") else name: Source(name)}


def _read(config: Json) -> DecoderConfig:
    hidden, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    if hidden % heads:
        raise ConfigProblem(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    if not flag(config, "do_layer_norm_before", True) or flag(config, "_remove_final_layer_norm"):
        raise ConfigProblem(
            "do_layer_norm_before is false (OPT-350m); QuantFlow knows the pre-norm OPT models"
        )
    if config.get("word_embed_proj_dim", hidden) != hidden:
        raise ConfigProblem(
            "word_embed_proj_dim differs from hidden_size; QuantFlow knows OPT without projections"
        )
    if not flag(config, "enable_bias", True) or not flag(
        config, "layer_norm_elementwise_affine", True
    ):
        raise ConfigProblem(
            "enable_bias or layer_norm_elementwise_affine is false; QuantFlow knows OPT with both"
        )
    return DecoderConfig(
        family="opt",
        hidden=hidden,
        intermediate=number(config, "ffn_dim"),
        layers=layer_count(config),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=number(config, "vocab_size"),
        max_positions=number(config, "max_position_embeddings"),
        norm_eps=1e-5,
        activation=read_activation(config, "activation_function", "relu"),
        dtype=read_dtype(config),
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=flag(config, "tie_word_embeddings", True),
    )


OPT = Architecture(
    "OPT",
    ("opt",),
    _read,
    sources=_sources,
    layer=Layer(
        o="self_attn.out_proj",
        gate="",
        up="fc1",
        down="fc2",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
    ),
    prefix="model.decoder.layers.{i}",
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    # _sources knows the names without the prefix
    final_norm="model.decoder.final_layer_norm",
    base_parts=(),
)
