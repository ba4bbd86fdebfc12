"""The order of rotary channels in q and k of llama.cpp's `llama` architecture, and the factors of
Llama 3's rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantflow.checkpoints.gguf.names import FAMILIES

if TYPE_CHECKING:
    from torch import Tensor


def to_rotary_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows `[heads * D, …]` of q or k (or their bias) from halves (channel `i` turns with `i +
    D/2`) to pairs that lie together."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def to_rotary_halves(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `to_rotary_pairs`."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def rotary_heads(module: str, config: Mapping[str, Any]) -> int:
    """The heads by which a module's rows are reordered; 0 where they are not."""
    family = FAMILIES.get(str(config.get("model_type")))
    if not family or not family.pairs:
        return 0
    heads = config["num_attention_heads"]
    leaf = module.rpartition(".")[2]
    return int({"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}.get(leaf, 0))


def llama3_factors(theta: float, head_dim: int, p: Mapping[str, float]) -> Tensor:
    import torch

    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    waves = 2 * math.pi / frequencies
    trained, low, high = (
        p["original_max_position_embeddings"],
        p["low_freq_factor"],
        p["high_freq_factor"],
    )
    smooth = ((trained / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / p["factor"] + smooth)).float()
