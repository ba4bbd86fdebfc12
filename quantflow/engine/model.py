"""The decoder as the engine runs it: tokens of many sequences one after the other, keys and values
in a paged cache.

It computes what `quantflow.decoder.native` does, over fused and quantised linears. Shapes: `T`
tokens of a step, `H` hidden, `D` head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from quantflow.decoder.native import finished_logits, scaled_embedding
from quantflow.decoder.rope import inverse_frequencies
from quantflow.engine.ops import Batch, KVCache, Linear, Ops
from quantflow.models.config import DecoderConfig

CHUNK = 256  # positions of a rotary table
KEPT = 256  # tables that are kept


@dataclass(frozen=True)
class Norm:
    """What it multiplies by and adds, in float32."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Mlp:
    """gate_up: one linear, or gate and up where they could not be fused; up alone where there is no
    gate."""

    gate_up: tuple[Linear, ...]
    down: Linear
    gated: bool


@dataclass(frozen=True)
class Mixture:
    router: Linear
    experts: tuple[Mlp, ...]


@dataclass(frozen=True)
class Layer:
    """qkv: one linear, or several whose outputs stand side by side. The channels of q and k are in
    the order of `Rope.order`. attention_out_norm, mlp_out_norm: of what is added to the residual
    stream. rope: which of the config's."""

    attention_norm: Norm | None
    qkv: tuple[Linear, ...]
    q_norm: Norm | None
    k_norm: Norm | None
    o: Linear
    attention_out_norm: Norm | None
    mlp_norm: Norm | None
    mlp: Mlp | Mixture
    mlp_out_norm: Norm | None
    window: int | None
    rope: int


Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Inputs:
    """One step's tokens. angles: cos and sin, float32 `[T, D / 2]`, of each kind of rotary
    embedding; () without one. slots: int64 `[T]`, where keys and values go."""

    tokens: Tensor
    positions: Tensor
    angles: tuple[Angles, ...]
    slots: Tensor
    batch: Batch


@dataclass(frozen=True)
class Model:
    """embedding, positions, head: in the model's dtype; a tied head is the embedding."""

    config: DecoderConfig
    ops: Ops
    embedding: Tensor
    positions: Tensor | None
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Linear

    def forward(
        self, inputs: Inputs, caches: list[KVCache], progress: Callable[[], None] = lambda: None
    ) -> Tensor:
        """What the head reads, `[T, H]`; keys and values of the tokens are in the caches then.
        progress: called after each layer."""
        config, ops = self.config, self.ops
        residual = scaled_embedding(config, F.embedding(inputs.tokens, self.embedding))
        if self.positions is not None:
            # OPT's first two rows are left over from padding
            residual = residual + F.embedding(inputs.positions + 2, self.positions)
        first = self.layers[0].attention_norm
        h = ops.norm(config, residual, first.weight, first.bias) if first else residual
        for index, layer in enumerate(self.layers):
            attended = ops.reduce(
                ops.linear(self._attention(layer, h, inputs, caches[index]), layer.o)
            )
            h = self._added(attended, residual, layer.attention_out_norm, layer.mlp_norm)
            y = ops.reduce(
                self._mixture(layer.mlp, h)
                if isinstance(layer.mlp, Mixture)
                else self._mlp(layer.mlp, h)
            )
            following = (
                self.layers[index + 1].attention_norm
                if index + 1 < len(self.layers)
                else self.final_norm
            )
            h = self._added(y, residual, layer.mlp_out_norm, following)
            progress()
        return h

    def _added(
        self, y: Tensor, residual: Tensor, own: Norm | None, following: Norm | None
    ) -> Tensor:
        """What is read next, once `y`, normed by its `own`, is added to `residual`, in place."""
        config, ops = self.config, self.ops
        if own:
            y = ops.norm(config, y, own.weight, own.bias)
        if config.residual_scale != 1.0:
            y = y * config.residual_scale
        if following:
            return ops.add_norm(config, y, residual, following.weight, following.bias)
        return residual.add_(y)

    def logits(self, h: Tensor) -> Tensor:
        """`[R, V]` for rows of what `forward` gives."""
        return finished_logits(self.config, self.ops.linear(h, self.head))

    def _project(self, parts: tuple[Linear, ...], h: Tensor) -> Tensor:
        outputs = [self.ops.linear(h, part) for part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _attention(self, layer: Layer, h: Tensor, inputs: Inputs, cache: KVCache) -> Tensor:
        """`o`'s input `[T, heads * D]`."""
        config, d = self.config, self.config.head_dim
        kv_heads = cache.k.shape[1]
        qkv = self._project(layer.qkv, h)
        queries = qkv.shape[1] - 2 * kv_heads * d
        parts = qkv.split([queries, kv_heads * d, kv_heads * d], dim=1)
        if layer.q_norm and layer.k_norm and config.qk_norm_whole:
            normed = (
                self.ops.norm(config, x, norm.weight, norm.bias)
                for x, norm in ((parts[0], layer.q_norm), (parts[1], layer.k_norm))
            )
            parts = (*normed, parts[2])
        q, k, v = (part.unflatten(1, (-1, d)) for part in parts)
        if layer.q_norm and layer.k_norm and not config.qk_norm_whole:
            q, k = (
                self.ops.norm(config, x, norm.weight, norm.bias)
                for x, norm in ((q, layer.q_norm), (k, layer.k_norm))
            )
        cos, sin = inputs.angles[layer.rope] if inputs.angles else (None, None)
        self.ops.store(q, k, v, cos, sin, inputs.slots, cache)
        if config.logn_length:
            factor = (
                (inputs.positions + 1)
                .double()
                .log()
                .div(math.log(config.logn_length))
                .clamp(min=1.0)
            )
            q = q * factor.to(q.dtype)[:, None, None]
        return self.ops.attention(config, q, cache, inputs.batch, layer.window).flatten(1)

    def _mlp(self, mlp: Mlp, h: Tensor) -> Tensor:
        inner = self._project(mlp.gate_up, h)
        name = self.config.activation
        return self.ops.linear(
            self.ops.gate(name, inner) if mlp.gated else self.ops.activate(name, inner), mlp.down
        )

    def _mixture(self, mixture: Mixture, h: Tensor) -> Tensor:
        config = self.config
        weights, chosen = (
            self.ops.linear(h, mixture.router)
            .softmax(-1, dtype=torch.float32)
            .topk(config.experts_per_token, dim=-1)
        )
        if config.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(h.dtype)
        out = torch.zeros_like(h)
        # in their order: a token's sum is always taken in the same one
        for index, expert in enumerate(mixture.experts):
            tokens, slot = (chosen == index).nonzero(as_tuple=True)
            if len(tokens):
                out.index_add_(
                    0, tokens, self._mlp(expert, h[tokens]) * weights[tokens, slot, None]
                )
        return out


class Rotary:
    """cos and sin of positions, from tables of `CHUNK` positions that are made when they are
    needed: an angle's bits do not depend on what else is in the batch."""

    def __init__(self, config: DecoderConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.kinds = 0 if config.family == "opt" else len(config.ropes)
        self._frequencies = lru_cache(KEPT)(
            lambda length, kind: inverse_frequencies(config, length, kind)
        )
        self._table = lru_cache(KEPT)(self._make)

    def _make(self, length: int, chunk: int, kind: int) -> Angles:
        frequencies, factor = self._frequencies(length, kind)
        angles = torch.outer(
            torch.arange(chunk * CHUNK, (chunk + 1) * CHUNK, dtype=torch.float32), frequencies
        )
        return (angles.cos() * factor).to(self.device), (angles.sin() * factor).to(self.device)

    def shared(self, positions: int) -> tuple[Angles, ...] | None:
        """cos and sin `[positions, D / 2]` of each kind, where they are every sequence's: the same
        bits as `rows` gives. None where they are not."""
        if not self.kinds or self.config.stretches:
            return None
        chunks, length = range(-(-positions // CHUNK)), self.config.max_positions
        return tuple(
            _joined([self._make(length, chunk, kind) for chunk in chunks])
            for kind in range(self.kinds)
        )

    def stretch(self, length: int) -> int:
        """A sequence's rope_length, if it will have `length` tokens: 0 where nothing depends on
        that."""
        return length if self.config.stretches and length > self.config.max_positions else 0

    def rows(self, parts: list[tuple[int, int, int]]) -> tuple[Angles, ...]:
        """cos and sin `[T, D / 2]` of each kind, for (rope_length, first position, count) of each
        sequence."""
        return tuple(self._rows(parts, kind) for kind in range(self.kinds))

    def _rows(self, parts: list[tuple[int, int, int]], kind: int) -> Angles:
        tables = []
        for stretch, first, count in parts:
            for chunk in range(first // CHUNK, (first + count - 1) // CHUNK + 1):
                cos, sin = self._table(stretch or self.config.max_positions, chunk, kind)
                part = slice(
                    max(first - chunk * CHUNK, 0), min(first + count - chunk * CHUNK, CHUNK)
                )
                tables.append((cos[part], sin[part]))
        return _joined(tables)


def _joined(tables: list[Angles]) -> Angles:
    return torch.cat([cos for cos, _ in tables]), torch.cat([sin for _, sin in tables])
