"""Model types that compute what a class of another name computes: little more than the config has
to be spelled as that class spells it."""

from __future__ import annotations

import math

from quantflow.models.architecture import Json, Source, renamed
from quantflow.models.config import ConfigProblem, flag, number
from quantflow.models.translation import Translation

_REMOTE_KEYS = ("auto_map", "tokenizer_class", "attn_implementation", "_attn_implementation")


def _as(config: Json, model_type: str, kind: str, **changes: object) -> Json:
    """The config as one of the class `kind` of transformers; what has become another key goes."""
    kept = {key: value for key, value in config.items() if key not in _REMOTE_KEYS}
    return {**kept, "architectures": [kind], "model_type": model_type, **changes}


def _llama(config: Json) -> Json:
    return _as(config, "llama", "LlamaForCausalLM")


def _required(config: Json, key: str, value: object, what: str) -> None:
    """Raises ConfigProblem for a key that is there and says something else than `value`."""
    if config.get(key, value) != value:
        raise ConfigProblem(f"{key} is {config[key]!r}; {what} knows {value!r}")


# Kimi-K2: DeepSeek-V3's class with other numbers; its makers say so.


def _kimi(config: Json) -> Json:
    for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        _required(config, key, value, "DeepSeek-V3")
    return _as(config, "deepseek_v3", "DeepseekV3ForCausalLM")


# EXAONE 3: Llama under GPT-2's names.

_EXAONE_NAMES = renamed(
    {
        r"transformer\.wte\.weight": "model.embed_tokens.weight",
        r"transformer\.ln_f\.weight": "model.norm.weight",
        r"transformer\.h\.(\d+)\.ln_1\.weight": r"model.layers.\1.input_layernorm.weight",
        r"transformer\.h\.(\d+)\.ln_2\.weight": r"model.layers.\1.post_attention_layernorm.weight",
        r"transformer\.h\.(\d+)\.attn\.attention\.([qkv])_proj\.weight": (
            r"model.layers.\1.self_attn.\2_proj.weight"
        ),
        r"transformer\.h\.(\d+)\.attn\.attention\.out_proj\.weight": (
            r"model.layers.\1.self_attn.o_proj.weight"
        ),
        r"transformer\.h\.(\d+)\.mlp\.c_fc_0\.weight": r"model.layers.\1.mlp.gate_proj.weight",
        r"transformer\.h\.(\d+)\.mlp\.c_fc_1\.weight": r"model.layers.\1.mlp.up_proj.weight",
        r"transformer\.h\.(\d+)\.mlp\.c_proj\.weight": r"model.layers.\1.mlp.down_proj.weight",
    }
)
_EXAONE_KEYS = {
    "num_layers": "num_hidden_layers",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}


def _exaone(config: Json) -> Json:
    return _llama({_EXAONE_KEYS.get(key, key): value for key, value in config.items()})


# MiniCPM: Granite's class, whose multipliers it calls otherwise.


def _minicpm(config: Json) -> Json:
    if config.get("num_experts"):
        raise ConfigProblem(
            "num_experts is there; Granite's class, which MiniCPM is written as, has no experts"
        )
    _required(config, "hidden_act", "silu", "Granite, which MiniCPM is written as,")
    hidden, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    depth = number(config, "scale_depth", float, 1.0) / math.sqrt(
        number(config, "num_hidden_layers")
    )
    kept = {k: v for k, v in config.items() if k not in ("scale_emb", "scale_depth")}
    return _as(
        {key: value for key, value in kept.items() if key != "dim_model_base"},
        "granite",
        "GraniteForCausalLM",
        embedding_multiplier=number(config, "scale_emb", float, 1.0),
        residual_multiplier=depth,
        logits_scaling=hidden / number(config, "dim_model_base", default=hidden),
        attention_multiplier=1 / math.sqrt(number(config, "head_dim", default=hidden // heads)),
        tie_word_embeddings=flag(config, "tie_word_embeddings", True),
    )


# Orion, and StableLM's first config: StableLM's class, which has LayerNorm where Llama has RMSNorm.


def _orion(config: Json) -> Json:
    return _as(
        {key: value for key, value in config.items() if key != "rms_norm_eps"},
        "stablelm",
        "StableLmForCausalLM",
        layer_norm_eps=number(config, "rms_norm_eps", float, 1e-5),
        partial_rotary_factor=1.0,
        use_qkv_bias=flag(config, "attention_bias"),
        qk_layernorm=False,
        use_parallel_residual=False,
    )


def _stablelm_epoch(config: Json) -> Json:
    keys = {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}
    return _as(
        {keys.get(key, key): value for key, value in config.items()},
        "stablelm",
        "StableLmForCausalLM",
    )


# Yi's first files have Llama's norms under short names.

_YI_NAMES = renamed(
    {
        r"(model\.layers\.\d+)\.ln1\.weight": r"\1.input_layernorm.weight",
        r"(model\.layers\.\d+)\.ln2\.weight": r"\1.post_attention_layernorm.weight",
    }
)

_AS_LLAMA = "written as Llama: no remote code"
_AS_STABLELM = "written as StableLM: no remote code"

ALIASES: dict[str, Translation] = {
    "kimi_k2": Translation("Kimi-K2", _kimi, "written as DeepSeek-V3: no remote code"),
    "exaone": Translation(
        "EXAONE 3",
        _exaone,
        _AS_LLAMA,
        lambda name, shape, values: {_EXAONE_NAMES(name): Source(name)},
        base="transformer",
        base_parts=("wte", "h", "ln_f"),
    ),
    "minicpm": Translation("MiniCPM", _minicpm, "written as Granite: no remote code"),
    "orion": Translation("Orion", _orion, _AS_STABLELM),
    "stablelm_epoch": Translation("StableLM", _stablelm_epoch, _AS_STABLELM),
    "Yi": Translation(
        "Yi", _llama, _AS_LLAMA, lambda name, shape, values: {_YI_NAMES(name): Source(name)}
    ),
    "aquila": Translation("Aquila", _llama, _AS_LLAMA),
    "xverse": Translation("XVERSE", _llama, _AS_LLAMA),
}
"""By config.json's model_type."""
