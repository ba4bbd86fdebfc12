"""Single random decoder layers, for tests that need no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantflow.decoder.native import NativeBlock, sequences
from quantflow.models.architecture import Architecture
from quantflow.models.config import DecoderConfig
from quantflow.models.expected import expected_tensors
from quantflow.models.registry import ARCHITECTURES
from quantflow.stages.folding import Folding

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 16, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SIZES,  # grouped queries
    "qwen2": _SIZES,  # biases on q, k and v
    "qwen3": {**_SIZES, "head_dim": 12},  # norms on q and k, heads wider than hidden / heads
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 16,
        "max_position_embeddings": 64,
        "activation_function": "relu",
    },  # biases everywhere, LayerNorm
    "mixtral": {**_SIZES, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_SIZES,
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}


class TinyLayer:
    """A layer's architecture, config and random tensors, and what it computes."""

    def __init__(
        self, model_type: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
    ) -> None:
        self.architecture: Architecture = ARCHITECTURES[model_type]
        self.config: DecoderConfig = self.architecture.read_config(
            {"model_type": model_type, **CONFIGS[model_type], **changes}
        )
        generator = torch.Generator().manual_seed(seed)
        prefix = self.architecture.layer_prefix(0) + "."
        self.tensors: dict[str, torch.Tensor] = {}
        for name, shape in expected_tensors(self.architecture, self.config):
            if name.startswith(prefix):
                value = torch.randn(shape, generator=generator, dtype=torch.float64)
                value = (
                    1 + 0.3 * value
                    if name.endswith("norm.weight")
                    else value * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
                )
                self.tensors[name.removeprefix(prefix)] = value.to(dtype)

    def layer(
        self,
        tensors: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
        length: int = 16,
    ) -> NativeBlock:
        return NativeBlock(
            self.architecture,
            self.config,
            0,
            tensors or self.tensors,
            sequences(self.config, length),
            dtype,
        )

    def input(
        self, windows: int = 2, length: int = 8, dtype: torch.dtype = torch.float64, seed: int = 1
    ) -> torch.Tensor:
        """A residual stream `[B, L, H]`."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(
            windows, length, self.config.hidden, generator=generator, dtype=torch.float64
        ).to(dtype)

    def linears(self) -> list[str]:
        """Every linear of the layer but a router."""
        return [
            n.removesuffix(".weight")
            for n, t in self.tensors.items()
            if t.ndim == 2 and n != f"{self.architecture.layer.router}.weight"
        ]


def folded(tensors: Mapping[str, torch.Tensor], folding: Folding) -> dict[str, torch.Tensor]:
    """All tensors of the layer as they are after folding, linears as wide as `Folding.weight` makes
    them."""
    result = {**tensors, **folding.changed}
    for linear in {*folding.columns, *folding.rows}:
        result[f"{linear}.weight"] = folding.weight(linear, tensors[f"{linear}.weight"])
    return result
