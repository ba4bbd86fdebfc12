"""InternLM, InternLM2 and InternLM3, without their remote code: they compute what Llama computes,
under other names of tensors or config keys."""

from __future__ import annotations

from quantflow.models.architecture import Json, Source, renamed, split_rows
from quantflow.models.config import ConfigProblem, flag, number, read_rope
from quantflow.models.llama import read_llama_like
from quantflow.models.translation import Translation

_REMOTE_KEYS = (
    "auto_map",
    "bias",
    "qkv_bias",
    "attn_implementation",
    "_attn_implementation_autoset",
    "tokenizer_class",
    "rotary",
)


def as_llama_config(config: Json, **changes: object) -> Json:
    """The same decoder as a Llama config.json: no remote code, one kind of rope scaling, biases as
    Llama names them."""
    native = {k: v for k, v in config.items() if k not in _REMOTE_KEYS}
    return {
        **native,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "mlp_bias": False,
        **changes,
    }


def _with_llama_rope(config: Json) -> Json:
    """InternLM's `rotary` as `rope_theta` and `rope_scaling`. Its dynamic kind is Llama's, the
    factor 1 if it has none."""
    rotary = config.get("rotary")
    if not rotary:
        return config
    rotary = rotary if isinstance(rotary, dict) else {"type": rotary}
    kind = rotary.get("type")
    if kind not in ("origin", "dynamic"):
        raise ConfigProblem(f"rotary of type {kind!r}; QuantFlow knows origin and dynamic")
    base = number(rotary, "base", float, 10000.0)
    if config.get("rope_theta") not in (None, base):
        raise ConfigProblem(
            f"rotary has base {base}, and rope_theta is {config['rope_theta']!r}: which is meant?"
        )
    scaling = (
        {"rope_type": "dynamic", "factor": number(rotary, "scaling_factor", float, 1.0)}
        if kind == "dynamic"
        else None
    )
    result = {
        **{k: v for k, v in config.items() if k != "rope_parameters"},
        "rope_theta": base,
        "rope_scaling": scaling,
    }
    other = config.get("rope_scaling") or config.get("rope_parameters")
    if other and read_rope({"rope_theta": base, **config}) != read_rope(result):
        raise ConfigProblem(
            f"rotary is {config['rotary']!r}, and rope_scaling or rope_parameters {other!r}: which"
            " is meant?"
        )
    return result


def _internlm_config(config: Json) -> Json:
    return as_llama_config(_with_llama_rope(config), attention_bias=flag(config, "bias", True))


def _internlm2_config(config: Json) -> Json:
    return as_llama_config(config, attention_bias=flag(config, "bias"))


# What InternLM3's class takes for keys that config.json has not.
_INTERNLM3_ABSENT = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
}


def _internlm3_config(config: Json) -> Json:
    """`qkv_bias` is on q, k and v, `bias` on o and in the MLP: Llama has one flag for attention."""
    # transformers' own class writes them as Llama does.
    old = {"attention_bias": "qkv_bias", "mlp_bias": "bias"}
    biases = {new: flag(config, new if config.get(new) is not None else old[new]) for new in old}
    if len(set(biases.values())) > 1:
        raise ConfigProblem(
            f"qkv_bias is {biases['attention_bias']} and bias {biases['mlp_bias']}; Llama, which it"
            " is written as, has one for q, k, v and o"
        )
    return as_llama_config({**_INTERNLM3_ABSENT, **config}, **biases)


_INTERNLM2_NAMES = renamed(
    {
        r"model\.tok_embeddings\.weight": "model.embed_tokens.weight",
        r"output\.weight": "lm_head.weight",
        r"(model\.layers\.\d+)\.attention\.wo\.(\w+)": r"\1.self_attn.o_proj.\2",
        r"(model\.layers\.\d+)\.feed_forward\.w1\.(\w+)": r"\1.mlp.gate_proj.\2",
        r"(model\.layers\.\d+)\.feed_forward\.w3\.(\w+)": r"\1.mlp.up_proj.\2",
        r"(model\.layers\.\d+)\.feed_forward\.w2\.(\w+)": r"\1.mlp.down_proj.\2",
        r"(model\.layers\.\d+)\.attention_norm\.weight": r"\1.input_layernorm.weight",
        r"(model\.layers\.\d+)\.ffn_norm\.weight": r"\1.post_attention_layernorm.weight",
    }
)


def _internlm2_sources(name: str, shape: tuple[int, ...], values: Json) -> dict[str, Source]:
    head, mark, part = name.rpartition(".attention.wqkv.")
    if not mark:
        return {_INTERNLM2_NAMES(name): Source(name)}
    # Grouped by KV head: the queries that share it, then its key, then its value.
    config = read_llama_like(_internlm2_config(values))
    queries = config.heads // config.kv_heads
    whole = slice(None)
    parts: dict[str, tuple[int | slice, ...]] = {
        f"{head}.self_attn.q_proj.{part}": (whole, slice(0, queries)),
        f"{head}.self_attn.k_proj.{part}": (whole, queries),
        f"{head}.self_attn.v_proj.{part}": (whole, queries + 1),
    }
    return split_rows(name, shape, (config.kv_heads, queries + 2, config.head_dim), parts)


INTERNLM = Translation("InternLM", _internlm_config, "written as Llama with biases: no remote code")
INTERNLM2 = Translation(
    "InternLM2",
    _internlm2_config,
    "written as Llama: no remote code",
    _internlm2_sources,
    base_parts=("tok_embeddings", "layers", "norm"),
)
INTERNLM3 = Translation("InternLM3", _internlm3_config, "written as Llama: no remote code")
