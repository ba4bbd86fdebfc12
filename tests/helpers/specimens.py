"""What the random checkpoints of `zoo` are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY, LAYERS, EXPERTS, EXPERT_INNER = (
    64, 96, 4, 2, 320, 2, 4, 32,
)  # fmt: skip
TRAINED = 24  # positions, in the families that stretch their rotary embedding beyond it
WINDOW = 8

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Specimen:
    """A checkpoint: its config.json and its tensors, as they are on disk."""

    config: dict[str, Any]
    tensors: Tensors


class Random:
    """Tensors of one generator. Channels differ in size, by their norms and by the rows that write
    them: else AWQ finds nothing to do."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self._generator = dtype, torch.Generator().manual_seed(11)

    def __call__(self, *shape: int, scale: float = 0.1) -> Tensor:
        sizes = (
            torch.randn(*shape[:-1], 1, generator=self._generator).mul(0.5).exp()
            if len(shape) > 1
            else 1.0
        )
        return (torch.randn(shape, generator=self._generator) * sizes * scale).to(self.dtype)

    def norm(self, size: int = HIDDEN) -> Tensor:
        return torch.randn(size, generator=self._generator).mul(0.6).exp().to(self.dtype)

    def outer(self, embedding: str, norm: str, head: str = "") -> Tensors:
        tensors = {
            embedding: self(VOCABULARY, HIDDEN, scale=0.25 if head else 0.1),
            norm: self.norm(),
        }
        return tensors | ({head: self(VOCABULARY, HIDDEN)} if head else {})

    def llama_layer(
        self,
        p: str,
        *,
        size: int = 16,
        kv: int = KV_HEADS,
        qkv_bias: bool = False,
        o_bias: bool = False,
        mlp_bias: bool = False,
        mlp: bool = True,
    ) -> Tensors:
        tensors = {
            f"{p}.input_layernorm.weight": self.norm(),
            f"{p}.post_attention_layernorm.weight": self.norm(),
        }
        for name, heads in (("q", HEADS), ("k", kv), ("v", kv)):
            tensors[f"{p}.self_attn.{name}_proj.weight"] = self(heads * size, HIDDEN)
            if qkv_bias:
                tensors[f"{p}.self_attn.{name}_proj.bias"] = self(heads * size)
        tensors[f"{p}.self_attn.o_proj.weight"] = self(HIDDEN, HEADS * size)
        if o_bias:
            tensors[f"{p}.self_attn.o_proj.bias"] = self(HIDDEN)
        tensors |= self.llama_mlp(f"{p}.mlp", INNER) if mlp else {}
        if mlp_bias:
            for name, rows in (("gate", INNER), ("up", INNER), ("down", HIDDEN)):
                tensors[f"{p}.mlp.{name}_proj.bias"] = self(rows)
        return tensors

    def llama_mlp(self, p: str, width: int) -> Tensors:
        return {
            f"{p}.gate_proj.weight": self(width, HIDDEN),
            f"{p}.up_proj.weight": self(width, HIDDEN),
            f"{p}.down_proj.weight": self(HIDDEN, width),
        }  # fmt: skip


def llama_like(
    model_type: str, architecture: str, random: Random, **changes: Any
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "use_cache": True,
        "initializer_range": 0.02,
        "torch_dtype": str(random.dtype).removeprefix("torch."),
        "transformers_version": "4.45.0",
        **changes,
    }


def native(random: Random, head: str = "lm_head.weight", **options: Any) -> Tensors:
    tensors = random.outer("model.embed_tokens.weight", "model.norm.weight", head)
    for i in range(LAYERS):
        tensors |= random.llama_layer(f"model.layers.{i}", **options)
    return tensors
