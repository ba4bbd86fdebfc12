"""How a TurboMind workspace (LMDeploy v0.1) orders what it stores: pure permutations, each with its
exact inverse.

Shapes: `K` input channels, `M` output channels, `G` groups along K; *words* are int32 that hold
eight 4-bit codes, `[K, M/8]` in the nibble order of AWQ. The views of words as bytes assume a
little-endian machine, as safetensors does. Dimensions that do not fit are for the caller to refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantflow.checkpoints.tensor_file import ITEM_BYTES

if TYPE_CHECKING:
    from torch import Tensor

Spec = tuple[str, tuple[int, ...]]  # a tensor's dtype as safetensors spells it, and its shape

# Linears that tensor parallelism cuts along their outputs; wo and w2 are cut along their inputs.
_COLUMN_PARALLEL = ("w_qkv", "w1", "w3", "w13")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUTPUT, _GATE, _UP, _DOWN = "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"

# A zero point z is stored as the fp16 number 64 + z: TurboMind's kernel unpacks a code q to the
# number 64 + q, and computes ((64 + q) - zero) * scale. Older QuantFlows wrote the plain z; the two
# ranges have no number in common, so that a reader tells them.
ZERO_OFFSET = 64

_BLOCK_WORDS = 1 << 18


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

    # In the order in which TurboMind reads them: norms, attention, MLP.
    shapes = layout.fused_shapes()
    stored = [
        norm("attention_norm", "input_layernorm"),
        norm("ffn_norm", "post_attention_layernorm"),
    ]
    stored += linear("attention.w_qkv", _QKV, *shapes["w_qkv"])
    stored += linear("attention.wo", (_OUTPUT,), *shapes["wo"])
    if layout.bias:
        biases = tuple(f"{native}.{module}.bias" for module in _QKV)
        stored.append(
            Stored(
                f"{stem}.attention.w_qkv",
                "bias",
                biases,
                layout.dtype,
                (sum(layout.qkv) // tp,),
                tp,
            )
        )
        stored.append(
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
        stored += linear("feed_forward.w13", (_GATE, _UP), *shapes["w13"])
    else:
        stored += linear("feed_forward.w1", (_GATE,), layout.hidden, layout.intermediate)
        stored += linear("feed_forward.w3", (_UP,), layout.hidden, layout.intermediate)
    stored += linear("feed_forward.w2", (_DOWN,), *shapes["w2"])
    return stored


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


# Rotary order. Hugging Face pairs channel j of a head with j + head_dim/2; TurboMind wants the two
# side by side.


def to_interleaved(x: Tensor, head_dim: int) -> Tensor:
    """`[..., M]` with the channels of each head from half-split to interleaved rotary order."""
    return x.unflatten(-1, (-1, 2, head_dim // 2)).transpose(-1, -2).flatten(-3)


def from_interleaved(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim // 2, 2)).transpose(-1, -2).flatten(-3)


_ROTARY_ORDER = (0, 1, 3, 5, 2, 6, 4)


def _rotary_view(words: Tensor, head_dim: int) -> tuple[int, ...]:
    k, m = words.shape[0], words.shape[1] * 8
    return (k, m // head_dim, 2, head_dim // 16, 2, 2, 2)


def to_interleaved_words(words: Tensor, head_dim: int) -> Tensor:
    """The same of words `[K, M/8]`; 16 divides `head_dim`."""
    return _by_rows(
        lambda rows: _permute_nibbles(rows, _rotary_view(rows, head_dim), _ROTARY_ORDER).view(
            rows.shape
        ),
        words,
    )


def from_interleaved_words(words: Tensor, head_dim: int) -> Tensor:
    return _by_rows(
        lambda rows: _restore_nibbles(rows, _rotary_view(rows, head_dim), _ROTARY_ORDER).view(
            rows.shape
        ),
        words,
    )


# gate and up, channel by channel.


def fuse_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """`[G, 2M]` from two `[G, M]`: channel m of gate, then channel m of up."""
    import torch

    return torch.stack((gate, up), -1).flatten(-2)


def split_gate_up(fused: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = fused.unflatten(-1, (-1, 2)).unbind(-1)
    return gate, up


_FUSE_ORDER = (1, 2, 4, 0, 5, 3)


def fuse_gate_up_words(gate: Tensor, up: Tensor) -> Tensor:
    """The same of words: `[K, 2M/8]` from two `[K, M/8]`."""
    import torch

    def fuse(gate: Tensor, up: Tensor) -> Tensor:
        k, m8 = gate.shape
        return _permute_nibbles(torch.stack((gate, up)), (2, k, m8, 2, 2, 2), _FUSE_ORDER).view(
            k, 2 * m8
        )

    return _by_rows(fuse, gate, up)


def split_gate_up_words(fused: Tensor) -> tuple[Tensor, Tensor]:
    def split(rows: Tensor) -> Tensor:
        k, m8 = rows.shape[0], rows.shape[1] // 2
        return (
            _restore_nibbles(rows, (2, k, m8, 2, 2, 2), _FUSE_ORDER).view(2, k, m8).transpose(0, 1)
        )

    gate, up = _by_rows(split, fused).unbind(1)
    return gate.clone(), up.clone()  # each its own memory


# The 32 x 32 tiles of TurboMind's int4 kernel.

_TILE_ORDER = (0, 5, 9, 8, 3, 1, 6, 4, 2, 7)


def _tile_view(words: Tensor) -> tuple[int, ...]:
    k, m = words.shape[0], words.shape[1] * 8
    return (k // 32, 2, 2, 4, 2, m // 32, 2, 2, 2, 4)


def to_tiles(words: Tensor) -> Tensor:
    """Words `[K, M/8]` in the kernel's order: tile by tile, 128 words each, along M and then along
    K. 32 divides K and M."""
    return _by_rows(
        lambda rows: _permute_nibbles(rows, _tile_view(rows), _TILE_ORDER).view(rows.shape), words
    )


def from_tiles(words: Tensor) -> Tensor:
    return _by_rows(
        lambda rows: _restore_nibbles(rows, _tile_view(rows), _TILE_ORDER).view(rows.shape), words
    )


def cut_tiles(words: Tensor, tp: int) -> list[Tensor]:
    """Each rank's `[K/32, M/(32 tp), 128]` of tiles `[K, M/8]` that are cut along M."""
    return [
        rank.squeeze(-1)
        for rank in words.view(words.shape[0] // 32, tp, -1, 128).permute(0, 2, 3, 1).chunk(tp, -1)
    ]


def join_tiles(ranks: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.stack(list(ranks), 1).view(ranks[0].shape[0] * 32, -1)


# The grid.


def to_scales_zeros(qzeros: Tensor, scales: Tensor) -> Tensor:
    """int32 `[G, M]` from words of zero points `[G, M/8]` and fp16 scales `[G, M]`: zero as fp16 in
    the low half, scale in the high."""
    import torch

    from quantflow.quant.packing import unpack_awq

    zeros = (unpack_awq(qzeros).t() + ZERO_OFFSET).to(torch.float16)
    return torch.stack((zeros, scales), -1).view(torch.int32).squeeze(-1)


def from_scales_zeros(words: Tensor) -> tuple[Tensor, Tensor]:
    """qzeros words and scales. Takes plain zeros too, where all are; raises ValueError for a zero
    point that is none of 0..15."""
    import torch

    from quantflow.quant.packing import pack_awq

    zeros, scales = words.contiguous().view(torch.float16).unflatten(-1, (-1, 2)).unbind(-1)
    if zeros.numel() and not has_plain_zeros(zeros):
        zeros = zeros - ZERO_OFFSET
    codes = zeros.nan_to_num(nan=16.0).clamp(0, 16).to(torch.uint8)
    if not bool(((codes == zeros) & (codes <= 15)).all()):
        raise ValueError(
            f"zero points that are not all of {ZERO_OFFSET} to {ZERO_OFFSET + 15}, or all of 0"
            " to 15"
        )
    return pack_awq(codes.t()), scales.clone()


def has_plain_zeros(zeros: Tensor) -> bool:
    """Whether stored zero points begin as QuantFlow once wrote them, without the offset; of a
    mixture, neither reading is right."""
    return bool(zeros.reshape(-1)[0] < ZERO_OFFSET)


# Tensor parallelism.


def join_per_rank(parts: Sequence[Tensor], tp: int) -> Tensor:
    """`[..., M]` from parts `[..., m]`: rank 0's share of each part, then rank 1's, so that one cut
    gives every rank `q | k | v`."""
    import torch

    return torch.cat([part.chunk(tp, -1)[rank] for rank in range(tp) for part in parts], -1)


def split_per_rank(fused: Tensor, widths: Sequence[int], tp: int) -> list[Tensor]:
    import torch

    pieces = fused.split([width // tp for width in widths] * tp, -1)
    return [torch.cat(pieces[part :: len(widths)], -1) for part in range(len(widths))]


# Nibbles. The low one of a byte, and so of a word, comes first.


def _by_rows(change: Callable[..., Tensor], *words: Tensor) -> Tensor:
    """`change` of words `[K, ...]`, some rows at a time: nibbles take a byte each while they are
    apart, and several passes do."""
    import torch

    step = max(1, _BLOCK_WORDS // max(1, words[0].shape[1]) // 32) * 32  # no tile is cut
    return torch.cat(
        [
            change(*(part[start : start + step] for part in words))
            for start in range(0, words[0].shape[0], step)
        ]
    )


def _permute_nibbles(words: Tensor, view: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """Words `[n]` whose nibbles are those of `words`, viewed, transposed, and read in their new
    order."""
    return _from_nibbles(_nibbles(words).view(view).permute(order))


def _restore_nibbles(words: Tensor, view: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """The inverse of `_permute_nibbles` with the same view and order."""
    inverse = sorted(range(len(order)), key=lambda axis: order[axis])
    return _from_nibbles(_nibbles(words).view([view[axis] for axis in order]).permute(inverse))


def _nibbles(words: Tensor) -> Tensor:
    import torch

    packed = words.contiguous().view(-1).view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), -1)


def _from_nibbles(nibbles: Tensor) -> Tensor:
    import torch

    pairs = nibbles.reshape(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).view(torch.int32)
