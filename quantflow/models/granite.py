"""Granite 3, dense: Llama's decoder with four multipliers."""

from __future__ import annotations

from quantflow.models.architecture import Architecture, Json
from quantflow.models.config import DecoderConfig, number
from quantflow.models.llama import read_llama_like


def _read(config: Json) -> DecoderConfig:
    def multiplier(name: str) -> float:
        value: float = number(config, name, float, 1.0)
        return value

    return read_llama_like(
        config,
        family="granite",
        embedding_scale=multiplier("embedding_multiplier"),
        residual_scale=multiplier("residual_multiplier"),
        attention_scale=multiplier("attention_multiplier"),
        logit_divisor=multiplier("logits_scaling"),
    )


GRANITE = Architecture("Granite", ("granite",), _read, hosted_else=True)
