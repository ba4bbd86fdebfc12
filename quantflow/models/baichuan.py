"""Baichuan and Baichuan 2 with 7 billion weights, without their remote code: Llama with q, k and v
in one tensor. Those with 13 billion have ALiBi, which no class of transformers computes beside the
rest of what they do."""

from __future__ import annotations

from quantflow.models.architecture import Json, Source, split_rows
from quantflow.models.config import ConfigProblem, flag, number
from quantflow.models.internlm import as_llama_config
from quantflow.models.translation import Translation

_BAICHUAN2_VOCABULARY = 125696
# What its class takes for keys that config.json has not, or what only training looks at.
_ABSENT = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
_OF_TRAINING = ("z_loss_weight", "gradient_checkpointing", "model_max_length")


def _normalises_head(values: Json) -> bool:
    """Whether it is a Baichuan 2, whose head's rows are brought to length 1 wherever it is used. No
    key says so: its configs have a `z_loss_weight`, and other tools look at its vocabulary."""
    return "z_loss_weight" in values or values.get("vocab_size") == _BAICHUAN2_VOCABULARY


def _config(config: Json) -> Json:
    # The class of the 13B models has no rotary embedding, and calls its longest text otherwise.
    if config.get("hidden_size") == 5120 or (
        "model_max_length" in config and config.get("max_position_embeddings") is None
    ):
        raise ConfigProblem(
            "Baichuan with 13B weights has ALiBi, RMSNorm and a gated MLP, which no class of"
            " transformers has together; QuantFlow knows Baichuan and Baichuan 2 with 7B weights"
        )
    if _normalises_head(config) and flag(config, "tie_word_embeddings"):
        raise ConfigProblem(
            "tie_word_embeddings is true; the head of Baichuan 2 is normalised, and its embedding"
            " is not"
        )
    kept = {key: value for key, value in config.items() if key not in _OF_TRAINING}
    heads = number(config, "num_attention_heads")
    return as_llama_config({**_ABSENT, **kept}, num_key_value_heads=heads, attention_bias=False)


def _sources(name: str, shape: tuple[int, ...], values: Json) -> dict[str, Source]:
    if name == "lm_head.weight":
        return {name: Source(name, unit_rows=_normalises_head(values))}
    head, mark, part = name.rpartition(".self_attn.W_pack.")
    if not mark:
        return {name: Source(name)}
    rows = number(values, "hidden_size")
    parts = {f"{head}.self_attn.{letter}_proj.{part}": (i,) for i, letter in enumerate("qkv")}
    return split_rows(name, shape, (3, rows), parts)


BAICHUAN = Translation(
    "Baichuan",
    _config,
    "written as Llama: no remote code; the head of Baichuan 2 is written normalised, as it is used",
    _sources,
)
