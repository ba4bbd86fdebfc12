"""Mixtures of experts: Mixtral and Qwen3-MoE, with experts one by one or fused into 3-D tensors as
transformers 5 holds them."""

from __future__ import annotations

import re

from quantflow.models.architecture import Architecture, Json, Layer, Source
from quantflow.models.config import (
    MOST_EXPERTS,
    ConfigProblem,
    DecoderConfig,
    flag,
    layer_count,
    number,
)
from quantflow.models.llama import MISTRAL_ABSENT, read_llama_like, read_windows

_FUSED = re.compile(r"(.*)\.experts\.(gate_up_proj|down_proj)")


def _fused_experts(
    name: str, shape: tuple[int, ...], block: str, gate: str, up: str, down: str
) -> dict[str, Source] | None:
    match = _FUSED.fullmatch(name)
    if not match or len(shape) != 3:
        return None
    prefix = re.sub(r"\.(mlp|block_sparse_moe)$", f".{block}", match[1])
    experts, rows, _ = shape
    if match[2] == "down_proj":
        return {
            f"{prefix}.experts.{e}.{down}.weight": Source(name, shape, (e,)) for e in range(experts)
        }
    half = rows // 2
    sources = {}
    for e in range(experts):
        sources[f"{prefix}.experts.{e}.{gate}.weight"] = Source(name, shape, (e, slice(0, half)))
        sources[f"{prefix}.experts.{e}.{up}.weight"] = Source(name, shape, (e, slice(half, rows)))
    return sources


def _mixtral_sources(name: str, shape: tuple[int, ...], config: DecoderConfig) -> dict[str, Source]:
    fused = _fused_experts(name, shape, "block_sparse_moe", "w1", "w3", "w2")
    return fused or {name.replace(".mlp.gate.", ".block_sparse_moe.gate."): Source(name)}


def _qwen3_sources(name: str, shape: tuple[int, ...], config: DecoderConfig) -> dict[str, Source]:
    return _fused_experts(name, shape, "mlp", "gate_proj", "up_proj", "down_proj") or {
        name: Source(name)
    }


def _experts(config: Json, *names: str) -> dict[str, int]:
    """Their numbers, of all of them under the first of `names` that is there: transformers takes
    either."""
    key = next((name for name in names if config.get(name) is not None), names[0])
    experts, chosen = number(config, key), number(config, "num_experts_per_tok")
    if experts * layer_count(config) > MOST_EXPERTS:  # as of layers: it would take for ever to plan
        raise ConfigProblem(
            f"{key} is {experts}, expected at most {MOST_EXPERTS} experts in all layers together"
        )
    if chosen > experts:
        raise ConfigProblem(f"num_experts_per_tok {chosen} is more than {key} {experts}")
    return {"experts": experts, "experts_per_token": chosen}


def _read_mixtral(config: Json) -> DecoderConfig:
    return read_llama_like(
        {**MISTRAL_ABSENT, "rms_norm_eps": 1e-5, **config},
        attention_bias=False,
        output_bias=False,
        sliding_windows=read_windows(config, absent=None),
        **_experts(config, "num_local_experts", "num_experts"),
    )


def _read_qwen3_moe(config: Json) -> DecoderConfig:
    layers, step = layer_count(config), number(config, "decoder_sparse_step", default=1)
    listed = config.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(i) is int for i in listed):
        raise ConfigProblem(f"mlp_only_layers is {listed!r}, expected a list of layers")
    plain = set(listed)
    dense = frozenset(i for i in range(layers) if i in plain or (i + 1) % step)
    return read_llama_like(
        {"max_position_embeddings": 32768, "num_key_value_heads": 4, **config},
        qk_norm=True,
        intermediate=number(config, "moe_intermediate_size"),
        **_experts(config, "num_experts", "num_local_experts"),
        sliding_windows=read_windows(config) if flag(config, "use_sliding_window") else (),
        renormalize=flag(config, "norm_topk_prob"),
        dense_layers=dense,
        dense_intermediate=number(config, "intermediate_size"),
    )


MIXTRAL = Architecture(
    "Mixtral",
    ("mixtral",),
    _read_mixtral,
    sources=_mixtral_sources,
    layer=Layer(
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{e}",
        expert_gate="w1",
        expert_up="w3",
        expert_down="w2",
    ),
)
QWEN3_MOE = Architecture(
    "Qwen3-MoE",
    ("qwen3_moe",),
    _read_qwen3_moe,
    sources=_qwen3_sources,
    layer=Layer(router="mlp.gate", expert="mlp.experts.{e}"),
)
