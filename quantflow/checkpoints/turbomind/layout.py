"""Which files a TurboMind workspace (LMDeploy v0.1) has, and what of the model each holds.

Shapes: `K` input channels, `M` output channels, `G` groups along K; *words* are int32 that hold
eight 4-bit codes. The orders within a file: `permutations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantflow.checkpoints.tensor_file import ITEM_BYTES
from quantflow.checkpoints.turbomind.permutations import (
    cut_tiles,
    from_interleaved,
    from_interleaved_words,
    from_scales_zeros,
    from_tiles,
    fuse_gate_up,
    fuse_gate_up_words,
    join_per_rank,
    join_tiles,
    split_gate_up,
    split_gate_up_words,
    split_per_rank,
    to_interleaved,
    to_interleaved_words,
    to_scales_zeros,
    to_tiles,
)

if TYPE_CHECKING:
    from torch import Tensor

Spec = tuple[str, tuple[int, ...]]  # a tensor's dtype as safetensors spells it, and its shape

# Linears that tensor parallelism cuts along their outputs; wo and w2 are cut along their inputs.
_COLUMN_PARALLEL = ("w_qkv", "w1", "w3", "w13")

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_OUTPUT, _GATE, _UP, _DOWN = "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"


@dataclass(frozen=True)
class Layout:
    """The numbers that decide which files a workspace has, and what each holds. group_size: 0
    unless the linears are int4."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    dtype: str  # F16 or BF16, of all that is not 4-bit
    tp: int = 1
    group_size: int = 0
    bias: bool = False  # on q, k, v and o

    @property
    def padded_vocabulary(self) -> int:
        return -(-self.vocabulary // self.tp) * self.tp

    @property
    def qkv(self) -> tuple[int, int, int]:
        """The outputs of q, k and v."""
        return (
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
            self.kv_heads * self.head_dim,
        )

    def fused_shapes(self) -> dict[str, tuple[int, int]]:
        """`(K, M)` of each linear of a layer as int4 stores it, w1 and w3 fused."""
        return {
            "w_qkv": (self.hidden, sum(self.qkv)),
            "wo": (self.heads * self.head_dim, self.hidden),
            "w13": (self.hidden, 2 * self.intermediate),
            "w2": (self.intermediate, self.hidden),
        }


@dataclass(frozen=True)
class Stored:
    """One tensor of a workspace, made of the native tensors `sources`: a file, or one for each of
    `ranks` ranks, of `shape` each."""

    stem: str
    part: str
    sources: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    ranks: int = 0

    @property
    def linear(self) -> str:
        """`w_qkv` of `layers.0.attention.w_qkv`."""
        return self.stem.rpartition(".")[2]

    @property
    def files(self) -> list[str]:
        return (
            [f"{self.stem}.{rank}.{self.part}" for rank in range(self.ranks)]
            if self.ranks
            else [f"{self.stem}.{self.part}"]
        )

    @property
    def nbytes(self) -> int:
        """Of one file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def stored_outer(layout: Layout) -> list[Stored]:
    """What lies outside the layers."""
    table = (layout.padded_vocabulary, layout.hidden)
    return [
        Stored("tok_embeddings", "weight", ("model.embed_tokens.weight",), layout.dtype, table),
        Stored("norm", "weight", ("model.norm.weight",), layout.dtype, (layout.hidden,)),
        Stored("output", "weight", ("lm_head.weight",), layout.dtype, table),
    ]


def stored_layer(layout: Layout, i: int) -> list[Stored]:
    """What layer `i` is stored as. The bias of o is in it where the others are."""
    native, stem, tp = f"model.layers.{i}", f"layers.{i}", layout.tp

    def norm(name: str, source: str) -> Stored:
        return Stored(
            f"{stem}.{name}",
            "weight",
            (f"{native}.{source}.weight",),
            layout.dtype,
            (layout.hidden,),
        )

    def linear(name: str, modules: Sequence[str], k: int, m: int) -> Iterator[Stored]:
        folder, short = f"{stem}.{name}", name.rpartition(".")[2]
        k, m = (k, m // tp) if short in _COLUMN_PARALLEL else (k // tp, m)
        if not layout.group_size:
            yield Stored(
                folder,
                "weight",
                tuple(f"{native}.{module}.weight" for module in modules),
                layout.dtype,
                (k, m),
                tp,
            )
            return
        yield Stored(
            folder,
            "qweight",
            tuple(f"{native}.{module}.qweight" for module in modules),
            "I32",
            (k, m // 8),
            tp,
        )
        grid = tuple(
            f"{native}.{module}.{part}" for part in ("qzeros", "scales") for module in modules
        )
        yield Stored(folder, "scales_zeros", grid, "I32", (k // layout.group_size, m), tp)

    shapes = layout.fused_shapes()
    # In the order in which TurboMind reads them: norms, attention, MLP.
    files = [
        norm("attention_norm", "input_layernorm"),
        norm("ffn_norm", "post_attention_layernorm"),
    ]
    files += linear("attention.w_qkv", _QKV, *shapes["w_qkv"])
    files += linear("attention.wo", (_OUTPUT,), *shapes["wo"])
    if layout.bias:
        biases = tuple(f"{native}.{module}.bias" for module in _QKV)
        files.append(
            Stored(
                f"{stem}.attention.w_qkv",
                "bias",
                biases,
                layout.dtype,
                (sum(layout.qkv) // tp,),
                tp,
            )
        )
        files.append(
            Stored(
                f"{stem}.attention.wo",
                "bias",
                (f"{native}.{_OUTPUT}.bias",),
                layout.dtype,
                (layout.hidden,),
                tp,
            )
        )
    if layout.group_size:
        files += linear("feed_forward.w13", (_GATE, _UP), *shapes["w13"])
    else:
        files += linear("feed_forward.w1", (_GATE,), layout.hidden, layout.intermediate)
        files += linear("feed_forward.w3", (_UP,), layout.hidden, layout.intermediate)
    files += linear("feed_forward.w2", (_DOWN,), *shapes["w2"])
    return files


def stored_tensors(layout: Layout) -> Iterator[Stored]:
    """Everything but KV scales."""
    yield from stored_outer(layout)
    for i in range(layout.layers):
        yield from stored_layer(layout, i)


def native_specs(layout: Layout, stored: Stored) -> dict[str, Spec]:
    """dtype and shape of the native tensors that `stored` is made of."""
    specs: dict[str, Spec] = {}
    for source in stored.sources:
        module, _, part = source.rpartition(".")
        name = module.split(".", 3)[-1]
        if name in (*_QKV, _OUTPUT, _GATE, _UP, _DOWN):
            q, kv, _ = layout.qkv
            n = {
                _QKV[0]: q,
                _QKV[1]: kv,
                _QKV[2]: kv,
                _GATE: layout.intermediate,
                _UP: layout.intermediate,
            }.get(name, layout.hidden)
            k = {_OUTPUT: q, _DOWN: layout.intermediate}.get(name, layout.hidden)
            groups = k // layout.group_size if layout.group_size else 0
            specs[source] = {
                "weight": (layout.dtype, (n, k)),
                "bias": (layout.dtype, (n,)),
                "qweight": ("I32", (k, n // 8)),
                "qzeros": ("I32", (groups, n // 8)),
                "scales": ("F16", (groups, n)),
            }[part]
        elif stored.linear in ("tok_embeddings", "output"):
            specs[source] = (layout.dtype, (layout.vocabulary, layout.hidden))
        else:
            specs[source] = (layout.dtype, (layout.hidden,))
    return specs


def encode(stored: Stored, layout: Layout, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of the files of `stored`, in the order of the ranks, from the native ones. They
    may share memory and be views."""
    import torch.nn.functional as F

    tp, linear = layout.tp, stored.linear
    if not stored.ranks:
        extra = stored.shape[0] - tensors[0].shape[0]
        return [F.pad(tensors[0], (0, 0, 0, extra)) if extra else tensors[0]]
    if linear == "wo" and stored.part == "bias":
        return [tensors[0]] * tp  # whole on every rank: the engine adds it once
    if stored.part == "qweight":
        tiles = to_tiles(_fuse_words(linear, tensors, layout))
        if linear in _COLUMN_PARALLEL:
            return [rank.reshape(stored.shape) for rank in cut_tiles(tiles, tp)]
        return list(tiles.chunk(tp, 0))
    if stored.part == "scales_zeros":
        count = len(tensors) // 2
        zeros, scales = (
            _fuse_words(linear, tensors[:count], layout),
            _fuse_columns(linear, tensors[count:], layout),
        )
        fused = to_scales_zeros(zeros, scales)
    else:
        fused = _fuse_columns(linear, [t.t() if t.ndim == 2 else t for t in tensors], layout)
    return list(fused.chunk(tp, -1 if linear in _COLUMN_PARALLEL else 0))


def decode(stored: Stored, layout: Layout, ranks: Sequence[Tensor]) -> dict[str, Tensor]:
    """The native tensors of `stored`, from those of its files: the inverse of `encode`. Raises
    ValueError for what no writer wrote."""
    import torch

    linear = stored.linear
    if not stored.ranks:
        rows = layout.vocabulary if len(stored.shape) == 2 else layout.hidden
        tensors = [ranks[0] if ranks[0].shape[0] == rows else ranks[0][:rows].clone()]
    elif linear == "wo" and stored.part == "bias":
        if not all(torch.equal(ranks[0], rank) for rank in ranks[1:]):
            raise ValueError("its ranks differ, and each must hold all of it")
        tensors = [ranks[0]]
    elif stored.part == "qweight":
        k = ranks[0].shape[0]
        whole = (
            join_tiles([rank.view(k // 32, -1, 128) for rank in ranks])
            if linear in _COLUMN_PARALLEL
            else torch.cat(list(ranks))
        )
        tensors = _split_words(linear, from_tiles(whole), layout)
    else:
        whole = torch.cat(list(ranks), -1 if linear in _COLUMN_PARALLEL else 0)
        if stored.part == "scales_zeros":
            zeros, scales = from_scales_zeros(whole)
            tensors = _split_words(linear, zeros, layout) + _split_columns(linear, scales, layout)
        else:
            tensors = [t.t() if t.ndim == 2 else t for t in _split_columns(linear, whole, layout)]
    return {name: tensor.contiguous() for name, tensor in zip(stored.sources, tensors, strict=True)}


def _fuse_columns(linear: str, parts: Sequence[Tensor], layout: Layout) -> Tensor:
    """`[..., M]` of a fused linear from its parts: weights `[K, m]`, scales `[G, m]` or biases
    `[m]`."""
    if linear == "w_qkv":
        q, k, v = parts
        return join_per_rank(
            [to_interleaved(q, layout.head_dim), to_interleaved(k, layout.head_dim), v], layout.tp
        )
    return fuse_gate_up(*parts) if linear == "w13" else parts[0]


def _split_columns(linear: str, fused: Tensor, layout: Layout) -> list[Tensor]:
    if linear == "w_qkv":
        q, k, v = split_per_rank(fused, layout.qkv, layout.tp)
        return [from_interleaved(q, layout.head_dim), from_interleaved(k, layout.head_dim), v]
    return list(split_gate_up(fused)) if linear == "w13" else [fused]


def _fuse_words(linear: str, parts: Sequence[Tensor], layout: Layout) -> Tensor:
    """The same of words `[K, m/8]` or `[G, m/8]`."""
    if linear == "w_qkv":
        q, k, v = parts
        return join_per_rank(
            [to_interleaved_words(q, layout.head_dim), to_interleaved_words(k, layout.head_dim), v],
            layout.tp,
        )
    return fuse_gate_up_words(*parts) if linear == "w13" else parts[0]


def _split_words(linear: str, fused: Tensor, layout: Layout) -> list[Tensor]:
    if linear == "w_qkv":
        q, k, v = split_per_rank(fused, [width // 8 for width in layout.qkv], layout.tp)
        return [
            from_interleaved_words(q, layout.head_dim),
            from_interleaved_words(k, layout.head_dim),
            v,
        ]
    return list(split_gate_up_words(fused)) if linear == "w13" else [fused]
