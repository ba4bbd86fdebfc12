"""ChatGLM2, ChatGLM3 and GLM-4-9B under their old names, without their remote code: GLM's class in
transformers computes the same, with q, k and v apart."""

from __future__ import annotations

from quantflow.models.architecture import Json, Source, renamed, split_rows
from quantflow.models.config import ConfigProblem, flag, number
from quantflow.models.translation import Translation

_GLM4_VOCABULARY = 151552
_NAMES = renamed(
    {
        r"transformer\.embedding\.word_embeddings\.weight": "model.embed_tokens.weight",
        r"transformer\.encoder\.final_layernorm\.weight": "model.norm.weight",
        r"transformer\.output_layer\.weight": "lm_head.weight",
        r"transformer\.encoder\.layers\.(\d+)\.(\w+_layernorm)\.weight": (
            r"model.layers.\1.\2.weight"
        ),
        r"transformer\.encoder\.layers\.(\d+)\.self_attention\.dense\.weight": (
            r"model.layers.\1.self_attn.o_proj.weight"
        ),
        # the gate's rows, then those of up
        r"transformer\.encoder\.layers\.(\d+)\.mlp\.dense_h_to_4h\.weight": (
            r"model.layers.\1.mlp.gate_up_proj.weight"
        ),
        r"transformer\.encoder\.layers\.(\d+)\.mlp\.dense_4h_to_h\.weight": (
            r"model.layers.\1.mlp.down_proj.weight"
        ),
    }
)
_FUSED = renamed(
    {
        r"transformer\.encoder\.layers\.(\d+)\.self_attention\.query_key_value\.(weight|bias)": (
            r"model.layers.\1.self_attn.{}_proj.\2"
        )
    }
)
# What GLM's class computes, of what the old config leaves open. Absent keys have these values.
_FIXED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "interleaved_qkv": False,
    "original_rope": True,
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _kv_heads(config: Json) -> int:
    heads: int = number(config, "num_attention_heads")
    if not flag(config, "multi_query_attention"):
        return heads
    groups: int = number(config, "multi_query_group_num", default=1)
    return groups


def _rope(config: Json) -> Json:
    """`rope_ratio` multiplies the base, but in ChatGLM2, where positions are divided by it."""
    ratio = number(config, "rope_ratio", float, 1.0)
    rope: Json = {"rope_type": "default", "rope_theta": 10000.0 * ratio}
    if ratio != 1.0 and config.get("padded_vocab_size") != _GLM4_VOCABULARY:
        # The config of the second and of the third generation have the same keys.
        name = str(config.get("_name_or_path")).lower()
        if "chatglm2" in name:
            rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": ratio}
        elif "chatglm3" not in name:
            raise ConfigProblem(
                f"rope_ratio is {ratio:g}, by which ChatGLM2 divides positions and ChatGLM3"
                " multiplies the base: expected a _name_or_path that says chatglm2 or chatglm3"
            )
    return {**rope, "partial_rotary_factor": 0.5}


def _config(config: Json) -> Json:
    if flag(config, "position_encoding_2d") or "inner_hidden_size" in config:
        raise ConfigProblem(
            "the first ChatGLM-6B (position_encoding_2d) reads its prompt in both directions, which"
            " no class of transformers does; QuantFlow knows ChatGLM2, ChatGLM3 and GLM-4-9B"
        )
    if "vision_config" in config:
        raise ConfigProblem(
            "GLM-4V under its old names (vision_config) has a tower that no class of transformers"
            " knows; GLM-4.1V and later are known to it"
        )
    for key, value in _FIXED.items():
        if flag(config, key, value) is not value:
            raise ConfigProblem(
                f"{key} is {config[key]}; GLM's class in transformers has it {value}"
            )
    hidden, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    tokens = {key: config[key] for key in _TOKENS if config.get(key) is not None}
    return {
        **tokens,
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "hidden_size": hidden,
        "intermediate_size": number(config, "ffn_hidden_size"),
        "num_hidden_layers": number(config, "num_layers", default=config.get("num_hidden_layers")),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(config),
        "head_dim": number(config, "kv_channels", default=hidden // heads),
        "vocab_size": number(config, "padded_vocab_size", default=config.get("vocab_size")),
        "max_position_embeddings": number(config, "seq_length", default=2048),
        "rms_norm_eps": number(config, "layernorm_epsilon", float, 1e-5),
        "hidden_act": "silu",
        "attention_bias": flag(config, "add_qkv_bias"),
        "rope_parameters": _rope(config),
        "tie_word_embeddings": flag(config, "tie_word_embeddings"),
        "torch_dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
    }


def _sources(name: str, shape: tuple[int, ...], values: Json) -> dict[str, Source]:
    fused = _FUSED(name)
    if fused == name:
        return {_NAMES(name): Source(name)}
    glm = _config(values)
    queries, keys = (
        glm[heads] * glm["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads")
    )
    rows = (slice(0, queries), slice(queries, queries + keys), slice(queries + keys, None))
    parts = {fused.format(letter): (part,) for letter, part in zip("qkv", rows, strict=True)}
    return split_rows(name, shape, (queries + 2 * keys,), parts)


CHATGLM = Translation(
    "ChatGLM",
    _config,
    "written as GLM, under the names of transformers' class: no remote code",
    _sources,
    base="transformer",
    base_parts=("embedding", "encoder", "output_layer"),
)
