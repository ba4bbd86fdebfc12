"""One decoder layer as every offline pass sees it, and the decoder that it is part of.

Two kinds stand behind these: `native.py` computes what a family's table says, `hosted.py` runs a
layer class of the transformers library. Shapes: `B` windows, `L` tokens, `H` hidden, `D` head_dim,
`V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantflow.decoder.stream import Stream
from quantflow.models.segments import Segment

ObserveKV = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Sees K (after rotary embedding) and V, `[B, kv_heads, L, D]`, as they are cached; returns what
attention shall use."""

Tap = Callable[[str, Tensor, Tensor], None]
"""Sees a linear's name, its input `[..., K]` and its output `[..., N]`."""


@dataclass(frozen=True)
class Reading:
    """What a segment reads, `[..., K]`: of an expert, the tokens that are routed to it. source: the
    output of the norm that feeds it, `[B, L, H]`, and parent, what the block of linears behind
    makes of that; None where its own output says it all."""

    segment: Segment
    rows: Tensor
    source: Tensor
    parent: Callable[[Tensor], Tensor] | None = None


@dataclass
class Streams:
    """x: the residual stream, `[W, L, H]`, which goes through the layers. context: room for `o`'s
    input. inner: room for `down`'s input, where it is worth keeping, or in a mixture for the MLP's,
    which all experts read. A block that keeps nothing between its segments needs neither. Where a
    stage trains, full: the full-precision model's stream, and entry: what enters the layer, where a
    stage before it takes `x` on."""

    x: Stream
    context: Stream | None = None
    inner: Stream | None = None
    full: Stream | None = None
    entry: Stream | None = None

    def close(self) -> None:
        for stream in (self.x, self.context, self.inner, self.full, self.entry):
            if stream:
                stream.close()


class Passage(Protocol):
    """All windows on their way through a block, stopped between its segments."""

    def rows(self, segment: Segment) -> Iterator[Tensor]:
        """What the segment reads, `[..., K]`, some windows at a time, over the weights that the
        segments before it have by now. It may be asked for again."""

    def advance(self, segment: Segment, *, feeds: bool = True) -> None:
        """Takes all windows over the segment, with the weights that its linears have by now.
        feeds: whether anybody reads what leaves the block."""


class Block(Protocol):
    """A decoder layer over `tensors` (names relative to the layer), computing in `dtype`.

    tensors may be changed between steps: rounding replaces a weight once it is quantised. segments:
    in execution order, with where AWQ's scales may go. tap: sees what every linear does.
    everywhere: of experts, with every token; what leaves the layer is the router's all the same.
    """

    index: int
    tensors: dict[str, Tensor]
    dtype: torch.dtype
    tap: Tap | None
    everywhere: bool

    @property
    def segments(self) -> tuple[Segment, ...]: ...

    def forward(self, x: Tensor, observe: ObserveKV | None = None) -> Tensor:
        """The residual stream `[B, L, H]` after this layer."""

    def readings(self, x: Tensor) -> Iterator[Reading]:
        """What each segment reads of hidden states `x` `[B, L, H]`, in execution order, with the
        weights as they are."""

    def passage(self, streams: Streams, batch: int, observe: ObserveKV) -> Passage:
        """Of the streams' windows, `batch` at a time. observe: sees K and V, once each window's are
        what they will stay."""


class Decoder(Protocol):
    """A model's decoder for windows of one length: what comes before its layers, they, and what
    comes after. It holds no weights."""

    def embed(self, tensors: Mapping[str, Tensor], tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """The residual stream `[B, L, H]` before the first layer, for `tokens` `[B, L]`. tensors:
        those outside the layers whose names are in `embeds`."""

    def logits(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """`[T, V]` from hidden states `[T, H]` after the last layer, in the dtype of `x`. tensors:
        those whose names are in `heads`."""

    @property
    def embeds(self) -> tuple[str, ...]: ...

    @property
    def heads(self) -> tuple[str, ...]: ...

    def block(
        self, index: int, tensors: Mapping[str, Tensor], dtype: torch.dtype, tap: Tap | None = None
    ) -> Block:
        """Layer `index` over its tensors."""
