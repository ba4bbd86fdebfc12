"""One thing under several names in a config.json: which value counts.

Where transformers reads both names, its choice counts and is reported; elsewhere they must agree.
What is settled says each thing once, so that whoever reads the config that is written reads the
same model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from quantflow.models.config import ConfigProblem, default_theta

Json = dict[str, Any]

# Names that families have for one thing. No reader knows which is meant where two of them differ.
SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    ("hidden_size", "n_embd", "n_embed", "d_model"),
    ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "multi_query_group_num"),
    ("head_dim", "kv_channels", "attention_head_dim"),
    ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "d_ff"),
    ("max_position_embeddings", "n_positions"),
    (
        "rms_norm_eps",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "layernorm_epsilon",
        "norm_eps",
        "norm_epsilon",
    ),
    ("hidden_act", "activation_function", "hidden_activation"),
    ("rope_theta", "rotary_emb_base", "rotary_base", "rope_base"),
    ("partial_rotary_factor", "rotary_pct", "rotary_percent", "rope_pct"),
    ("attention_bias", "bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias"),
    ("num_experts", "num_local_experts", "n_routed_experts"),
    ("num_experts_per_tok", "num_experts_per_token", "num_selected_experts", "moe_topk"),
    ("tie_word_embeddings", "tie_embeddings"),
    ("quantization_config", "compression_config"),
)
_SAME = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}  # values that mean one thing


def settled(config: Json, *, layered_rope: bool = False) -> tuple[Json, tuple[str, ...]]:
    """The config with one value for everything, and what was overruled, in words. layered_rope: the
    rotary numbers, which are one for each kind of layer, are left to the family. Raises
    ConfigProblem where no reader could know."""
    for names in SYNONYMS:
        first, *others = [
            (name, config[name]) for name in names if config.get(name) is not None
        ] or [("", None)]
        for name, value in others:
            if isinstance(value, bool) == isinstance(first[1], bool) and not _alike(
                first[1], value
            ):
                raise ConfigProblem(
                    f"{first[0]} is {_short(first[1])}, and {name}, which means the same, is"
                    f" {_short(value)}"
                )
    result, notes = dict(config), []
    old, new = result.get("torch_dtype"), result.get("dtype")
    if old is not None and new is not None and _plain(old) != _plain(new):
        notes.append(_overruled("torch_dtype", old, "dtype", new))
        result["torch_dtype"] = new
    if not layered_rope:
        notes += _settle_rope(result)
    return result, tuple(notes)


def untied(config: Json) -> Json:
    """The config, saying that the head is no copy of the embedding; so does what it says of a
    language model inside."""
    result = {**config, "tie_word_embeddings": False}
    if isinstance(text := config.get("text_config"), Mapping):
        result["text_config"] = {**text, "tie_word_embeddings": False}
    return result


def _settle_rope(config: Json) -> list[str]:
    """Brings the rotary numbers of `config` into one form, as transformers merges them; returns
    what was overruled."""
    # Both objects must be understood.
    notes = []
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    for key, part in (("rope_scaling", old), ("rope_parameters", new)):
        if part is not None and not isinstance(part, Mapping):
            raise ConfigProblem(f"{key} is {_short(part)}, expected an object")
        if kinds := [kind for kind, value in (part or {}).items() if isinstance(value, Mapping)]:
            raise ConfigProblem(
                f"{key} has one object for each kind of layer ({', '.join(kinds)}); QuantFlow knows"
                " one for all layers"
            )
    # Where only one is there, it counts; of two the older, as in transformers.
    if not old and not new:
        return []
    key = "rope_scaling" if old else "rope_parameters"
    rope = dict(old or new or {})
    if old and new:
        names = ("rope_type", *(name for name in new if name not in _APART))
        if lost := next(
            (name for name in names if not _alike(_rope_value(old, name), _rope_value(new, name))),
            None,
        ):
            notes.append(
                _overruled(
                    f"rope_parameters {lost}",
                    _rope_value(new, lost),
                    f"rope_scaling {lost}",
                    _rope_value(old, lost),
                )
            )
        theta, kept = new.get("rope_theta"), rope.get("rope_theta") or config.get("rope_theta")
        if theta is not None and kept is None:
            if not _alike(theta, default_theta(config)):  # to which transformers falls back
                hint = (
                    f"transformers then takes {default_theta(config)}; write rope_theta into"
                    " rope_scaling"
                )
                raise ConfigProblem(
                    "rope_scaling replaces rope_parameters, and with it its rope_theta"
                    f" {_short(theta)}: {hint}"
                )
            config["rope_theta"] = theta
        elif theta is not None and not _alike(theta, kept):
            notes.append(_overruled("rope_parameters rope_theta", theta, "rope_theta", kept))
        del config["rope_parameters"]
    # Names that stand twice within the object, or inside and outside it.
    kind = rope.get("rope_type")
    if kind is not None and rope.get("type") not in (None, kind):
        notes.append(_overruled(f"{key} type", rope["type"], "rope_type", kind))
        rope["type"] = kind
    for name in ("rope_theta", "partial_rotary_factor"):
        if (
            rope.get(name) is not None
            and config.get(name) is not None
            and not _alike(rope[name], config[name])
        ):
            notes.append(_overruled(name, config[name], f"{name} in {key}", rope[name]))
            config[name] = rope[name]
    trained, inside = (
        config.get("original_max_position_embeddings"),
        rope.get("original_max_position_embeddings"),
    )
    if (
        (kind or rope.get("type")) in ("llama3", "yarn")
        and trained is not None
        and inside is not None
        and trained != inside
    ):
        name = "original_max_position_embeddings"
        notes.append(_overruled(f"{key} {name}", inside, f"{name} outside it", trained))
        rope[name] = trained
    config[key] = rope
    return notes


_APART = ("rope_theta", "rope_type", "type", "partial_rotary_factor")  # compared by themselves


def _rope_value(rope: Mapping[str, Any], name: str) -> Any:
    value = rope.get(name)
    return (value or rope.get("type") or "default") if name == "rope_type" else value


def _overruled(name: str, value: Any, by: str, other: Any) -> str:
    return (
        f"{name} {_short(value)} in config.json is not followed: {by} {_short(other)} goes first,"
        " as in transformers"
    )


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    if isinstance(one, int | float) and isinstance(other, int | float):
        try:
            return one == other or math.isclose(one, other, rel_tol=1e-9)
        except OverflowError:  # JSON's integers have any length
            return False
    return bool(_plain(one) == _plain(other))


def _plain(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = value.removeprefix("torch.")
    return _SAME.get(value, value)


def _short(value: Any) -> str:
    return f"{value!r}"[:80]
