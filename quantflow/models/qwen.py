"""The first generation of Qwen (`Qwen-7B-Chat`), without its remote code: the decoder is Qwen2's
under other names."""

from __future__ import annotations

from quantflow.models.architecture import Architecture, Json, Source, renamed, split_rows
from quantflow.models.config import (
    ConfigProblem,
    DecoderConfig,
    Rope,
    check_head,
    flag,
    layer_count,
    number,
    read_dtype,
)

_NAMES = renamed(
    {
        r"transformer\.wte\.weight": "model.embed_tokens.weight",
        r"transformer\.ln_f\.weight": "model.norm.weight",
        r"transformer\.h\.(\d+)\.ln_1\.weight": r"model.layers.\1.input_layernorm.weight",
        r"transformer\.h\.(\d+)\.ln_2\.weight": r"model.layers.\1.post_attention_layernorm.weight",
        r"transformer\.h\.(\d+)\.attn\.c_proj\.weight": r"model.layers.\1.self_attn.o_proj.weight",
        # Qwen's MLP is c_proj(w1(x) * silu(w2(x))): w2 is the gate.
        r"transformer\.h\.(\d+)\.mlp\.w2\.weight": r"model.layers.\1.mlp.gate_proj.weight",
        r"transformer\.h\.(\d+)\.mlp\.w1\.weight": r"model.layers.\1.mlp.up_proj.weight",
        r"transformer\.h\.(\d+)\.mlp\.c_proj\.weight": r"model.layers.\1.mlp.down_proj.weight",
    }
)
_FUSED = renamed(
    {r"transformer\.h\.(\d+)\.attn\.c_attn\.(weight|bias)": r"model.layers.\1.self_attn.{}_proj.\2"}
)


def _sources(name: str, shape: tuple[int, ...], config: DecoderConfig) -> dict[str, Source]:
    fused = _FUSED(name)
    if fused == name:
        return {_NAMES(name): Source(name)}
    rows = config.heads * config.head_dim
    return split_rows(
        name, shape, (3, rows), {fused.format(role): (i,) for i, role in enumerate("qkv")}
    )


def _read(config: Json) -> DecoderConfig:
    hidden, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    head_dim = number(config, "kv_channels", default=hidden // heads)
    if number(config, "rotary_pct", float, 1.0) != 1.0:
        raise ConfigProblem("rotary_pct is not 1; QuantFlow rotates whole heads only")
    if not flag(config, "no_bias", True):
        raise ConfigProblem("no_bias is false; QuantFlow knows Qwen with a bias on c_attn alone")
    trained = number(config, "seq_length", default=2048)
    if flag(config, "bf16") and flag(config, "fp16"):
        raise ConfigProblem("bf16 and fp16 are both true: which is meant?")
    if other := next((key for key in ("rope_scaling", "rope_parameters") if config.get(key)), None):
        raise ConfigProblem(
            f"{other} is {config[other]!r}; the first Qwen has use_dynamic_ntk, and nothing that"
            " reads it looks at that"
        )
    dtype = (
        "bfloat16"
        if flag(config, "bf16")
        else "float16"
        if flag(config, "fp16")
        else read_dtype(config)
    )
    rope = Rope(
        number(config, "rotary_emb_base", float, 10000.0),
        "qwen" if flag(config, "use_dynamic_ntk") else "default",
    )
    if rope.theta < 1:
        raise ConfigProblem(f"rotary_emb_base is {rope.theta}, expected at least 1")
    check_head(head_dim, rope)
    return DecoderConfig(
        family="llama",
        hidden=hidden,
        intermediate=number(config, "intermediate_size") // 2,  # Qwen counts gate and up together
        layers=layer_count(config),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        vocabulary=number(config, "vocab_size"),
        max_positions=trained,
        norm_eps=number(config, "layer_norm_epsilon", float, 1e-6),
        activation="silu",
        dtype=dtype,
        rope=rope,
        attention_bias=True,
        tied=flag(config, "tie_word_embeddings"),
        logn_length=trained if flag(config, "use_logn_attn") else None,
    )


def _native_config(config: Json) -> Json:
    read = _read(config)
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": read.hidden,
        "intermediate_size": read.intermediate,
        "num_hidden_layers": read.layers,
        "num_attention_heads": read.heads,
        "num_key_value_heads": read.kv_heads,
        "vocab_size": read.vocabulary,
        "max_position_embeddings": read.max_positions,
        "rms_norm_eps": read.norm_eps,
        "hidden_act": "silu",
        "rope_theta": read.rope.theta,
        "tie_word_embeddings": read.tied,
        "use_sliding_window": False,
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": config.get("eos_token_id"),
        "torch_dtype": read.dtype,
    }


QWEN = Architecture(
    "Qwen",
    ("qwen",),
    _read,
    _native_config,
    _sources,
    base="transformer",
    base_parts=("wte", "h", "ln_f"),
    notes=(
        (
            "written as Qwen2: no remote code; dynamic NTK and logn scaling beyond the trained"
            " length have no place there"
        ),
    ),
)
