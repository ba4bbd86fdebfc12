"""A paged KV cache, and the layout of one step's queries over it: what attention on a GPU and on a
CPU share.

Shapes: `T` queries of `S` sequences one after the other, `H` heads, `G` KV heads, `D` head_dim, `B`
tokens a cache block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from quantflow_kernels.configs import AttentionConfig

STATIC_HEAD = 0  # a K scale a head
STATIC_CHANNEL = 1  # a K scale a head and channel
DYNAMIC = 2  # scales a token and head
PLAIN = 3  # a 16-bit cache


@dataclass(frozen=True)
class KVCache:
    """One layer's cache.

    k, v: `[blocks, G, B, D]`, int8 or the queries' dtype. Static scales, float32: k_scale `[G]` or
    `[G, D]`; v_scale, v_zero `[G, D]`; k_zero `[G]` or `[G, D]` (needed by the store alone).
    Dynamic ones: k_scale, v_scale `[blocks, G, B]`, no zero points.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    k_zero: Tensor | None = None
    v_zero: Tensor | None = None

    @property
    def mode(self) -> int:
        if self.k.dtype != torch.int8:
            return PLAIN
        if self.k_scale is None or self.v_scale is None:
            raise ValueError("an int8 cache needs k_scale and v_scale")
        if self.k_scale.ndim == 3:
            return DYNAMIC
        return STATIC_HEAD if self.k_scale.ndim == 1 else STATIC_CHANNEL


def power_of_two(n: int) -> int:
    """The smallest power of two that is not less than `n`."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Batch:
    """Which queries belong to which sequence and where their keys lie, on the device; one serves
    all layers of a step.

    block_table: int32 `[S, most]`. query_start: int32 `[S + 1]`. contexts: int32 `[S]`, keys up to
    and with a sequence's last query.
    query_last: int32 `[T]`, each query's position. tile_sequence, tile_start: int32 a tile of
    queries: its sequence, and its first query therein. splits: of the longest context. decode:
    every sequence has one query.
    """

    block_table: Tensor
    query_start: Tensor
    contexts: Tensor
    query_last: Tensor
    tile_sequence: Tensor
    tile_start: Tensor
    splits: int
    decode: bool


def queries_a_tile(heads: int, kv_heads: int, config: AttentionConfig) -> tuple[int, int]:
    """Rows of a tile, and the rows of one query: the heads that share a KV head, padded to a power
    of two."""
    shared = power_of_two(heads // kv_heads)
    return max(config.block_q, shared), shared


def make_batch(
    lengths: Sequence[int],
    contexts: Sequence[int],
    block_table: Tensor,
    heads: int,
    kv_heads: int,
    config: AttentionConfig,
) -> Batch:
    """The batch of sequences with `lengths` new queries each, whose contexts, those included, are
    `contexts` long."""
    block_q, shared = queries_a_tile(heads, kv_heads, config)
    tiles = [
        (s, first)
        for s, length in enumerate(lengths)
        for first in range(0, length, block_q // shared)
    ]
    starts = list(accumulate(lengths, initial=0))
    last = [
        context - length + i
        for length, context in zip(lengths, contexts, strict=True)
        for i in range(length)
    ]
    # One transfer for all of them.
    parts = [starts, list(contexts), last, [s for s, _ in tiles], [first for _, first in tiles]]
    together = torch.tensor([v for part in parts for v in part], dtype=torch.int32).to(
        block_table.device
    )
    query_start, on_device, query_last, sequence, start = together.split(
        [len(part) for part in parts]
    )
    splits = splits_of(max(contexts, default=0), config)
    return Batch(
        block_table,
        query_start,
        on_device,
        query_last,
        sequence,
        start,
        splits,
        max(lengths, default=0) == 1,
    )


def splits_of(context: int, config: AttentionConfig) -> int:
    """Splits that a context has."""
    return -(-context // config.split)


def decode_batch(block_table: Tensor, contexts: Tensor, splits: int) -> Batch:
    """The batch of sequences with one new query each, out of what is on the device already.
    block_table: int32 `[S, most]`; contexts: int32 `[S]`; splits: at least those of the longest.
    Each query is a tile."""
    sequence = torch.arange(len(contexts), dtype=torch.int32, device=contexts.device)
    starts = torch.arange(len(contexts) + 1, dtype=torch.int32, device=contexts.device)
    return Batch(
        block_table,
        starts,
        contexts,
        contexts - 1,
        sequence,
        torch.zeros_like(sequence),
        splits,
        decode=True,
    )
