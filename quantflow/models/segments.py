"""The linears of a decoder layer, by what they read: the one table that every pass over a layer is
made from.

Quantisation takes a layer segment by segment, in execution order: the linears of one share a
Hessian and may share a scale. Sharding, the memory estimate, sensitivity's parts and the engine
read the same table. Letters in shapes: `N` output channels, `K` input channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from quantflow.models.architecture import Architecture
from quantflow.models.config import DecoderConfig


class Role(StrEnum):
    """What a segment is to the layer: the linears that read a block's input, or the one that makes
    its output."""

    attention_in = "attention_in"
    attention_out = "attention_out"
    mlp_in = "mlp_in"
    mlp_out = "mlp_out"


@dataclass(frozen=True)
class LinearSpec:
    """A linear of a layer.

    name: relative to the layer. shape: `(N, K)`. cut: the dimension of its weight that tensor
    parallelism divides (Shoeybi et al. 2019): 0, its outputs, with bias, scales and zeros; 1, its
    inputs, the bias whole on every rank; None where every rank holds all of it.
    """

    name: str
    shape: tuple[int, int]
    bias: bool
    cut: int | None


@dataclass(frozen=True)
class Fold:
    """Whose output a segment reads, so that a scale of the segment's input can be taken out of it.

    norm: a norm's name, or None. linear: a linear's name, or None. One of the two is set.
    beside: other linears that read the norm's output and are never quantised (a router).
    heads: (times, channels): every so many channels of the linear's output are read so many times
    (values, by grouped queries).
    offset: what the norm adds to its weight before it multiplies (1 in Gemma).
    """

    norm: str | None = None
    linear: str | None = None
    beside: tuple[str, ...] = ()
    heads: tuple[int, int] = (1, 1)
    offset: float = 0.0


@dataclass(frozen=True)
class Segment:
    """Linears that read one tensor.

    part: what engines fuse, and so want in one width; the segments of all experts of a layer are
    one.
    fold: where a scale of the input may go; None: nowhere. expert: whose, in a mixture.
    """

    role: Role
    part: str
    linears: tuple[LinearSpec, ...]
    fold: Fold | None = None
    expert: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.linears)

    @property
    def channels(self) -> int:
        """`K`, of the tensor that is read."""
        return self.linears[0].shape[1]

    @property
    def rows(self) -> int:
        """Output channels of all its linears."""
        return sum(spec.shape[0] for spec in self.linears)


def segments(architecture: Architecture, config: DecoderConfig, layer: int) -> tuple[Segment, ...]:
    """Those of a decoder layer, in execution order. The router, which is never quantised, is in
    none."""
    if architecture.library:
        return architecture.library.segments(layer)
    names = architecture.layer
    heads, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    part = names.qkv or f"{names.q.rpartition('.')[0]}.qkv"
    # A half of fused rows is no rank's, and a norm over all heads needs all of them.
    whole = bool(names.qkv) or config.qk_norm_whole
    parts = (
        ((names.qkv, heads + 2 * kv),)
        if names.qkv
        else ((names.q, heads), (names.k, kv), (names.v, kv))
    )
    qkv = tuple(
        LinearSpec(name, (rows, config.hidden), config.attention_bias, None if whole else 0)
        for name, rows in parts
    )
    o = LinearSpec(names.o, (config.hidden, heads), config.output_bias, None if whole else 1)
    norm = Fold(norm=names.attention_norm, offset=config.norm_offset)
    values = Fold(linear=names.v, heads=(config.heads // config.kv_heads, config.head_dim))
    return (
        Segment(Role.attention_in, part, qkv, norm if names.attention_norm else None),
        Segment(Role.attention_out, names.o, (o,), None if names.qkv else values),
        *_mlp_segments(architecture, config, layer),
    )


def _mlp_segments(
    architecture: Architecture, config: DecoderConfig, layer: int
) -> Iterator[Segment]:
    names, width, mixture = architecture.layer, config.width(layer), config.is_moe(layer)
    beside = (names.router,) if mixture else ()
    norm = Fold(norm=names.mlp_norm, beside=beside, offset=config.norm_offset)
    fold = norm if names.mlp_norm else None
    if names.gate_up:
        both = LinearSpec(names.gate_up, (2 * width, config.hidden), config.mlp_bias, None)
        last = LinearSpec(names.down, (config.hidden, width), config.mlp_bias, None)
        yield Segment(Role.mlp_in, names.gate_up, (both,), fold)
        yield Segment(Role.mlp_out, names.down, (last,))
        return
    for expert in range(config.experts) if mixture else (None,):
        gate, up, down = names.mlp(expert)
        readers = tuple(
            LinearSpec(name, (width, config.hidden), config.mlp_bias, 0)
            for name in (gate, up)
            if name
        )
        last = LinearSpec(down, (config.hidden, width), config.mlp_bias, 1)
        fused = f"{up.rpartition('.')[0]}.gate_up" if gate else up
        experts = names.expert.partition(".{e}")[0]
        # Without a gate, a scale of `up`'s output has to pass through the activation: relu lets it,
        # gelu does not.
        passes = Fold(linear=up) if gate or config.activation == "relu" else None
        yield Segment(Role.mlp_in, experts if mixture else fused, readers, fold, expert)
        yield Segment(Role.mlp_out, experts if mixture else down, (last,), passes, expert)
