"""All calibration windows on their way through a block, stopped between its segments.

A layer that is quantised segment by segment sees each segment's input as the segments before it
left it, once they were rounded (GPTQ's true-sequential mode). What a later step still needs is kept
in streams, which may lie in files: the residual stream, `o`'s input, and the MLP's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from quantflow.decoder.block import ObserveKV, Streams
from quantflow.models.segments import Role, Segment

if TYPE_CHECKING:
    from quantflow.decoder.native import NativeBlock


class NativePassage:
    """`rows` of a segment, then `advance` over it, for each of the block's segments in turn; see
    `block.Passage`."""

    def __init__(
        self, block: NativeBlock, streams: Streams, batch: int, observe: ObserveKV
    ) -> None:
        assert streams.context is not None
        self.block, self.x, self.context, self.inner = (
            block,
            streams.x,
            streams.context,
            streams.inner,
        )
        self._spans, self._observe = list(self.x.spans(batch)), observe
        self._kept = False  # `down`'s input
        self._routes: list[tuple[Tensor, Tensor]] = []  # of each span: experts and weights `[T, k]`
        # an expert; of each span: its tokens, and their slots
        self._picks: tuple[int, list[tuple[Tensor, Tensor]]] = (-1, [])

    def rows(self, segment: Segment) -> Iterator[Tensor]:
        if segment.role is Role.attention_out:
            return (self.context.read(a, b) for a, b in self._spans)
        if segment.expert is not None:
            tokens = self._tokens(segment.expert)
            return (
                tokens
                if segment.role is Role.mlp_in
                else (self.block.inner(part, segment.expert) for part in tokens)
            )
        if segment.role is Role.mlp_out:
            return self._inner_rows()
        norm = (
            self.block.attention_input
            if segment.role is Role.attention_in
            else self.block.mlp_input
        )
        return (norm(self.x.read(a, b)) for a, b in self._spans)

    def advance(self, segment: Segment, *, feeds: bool = True) -> None:
        block, x = self.block, self.x
        if segment == block.segments[-1] and not feeds:
            return
        if segment.role is Role.attention_in:
            for a, b in self._spans:
                self.context.write(
                    a, block.context(block.attention_input(x.read(a, b)), self._observe)
                )
        elif segment.role is Role.attention_out:
            for a, b in self._spans:
                x.write(a, block.add_attention(x.read(a, b), self.context.read(a, b)))
            if block.moe:
                self._route()
        elif segment.role is Role.mlp_out and segment.expert is not None:
            self._add_expert(segment.expert)
        elif segment.role is Role.mlp_out:
            for a, b in self._spans:
                inner = (
                    self.inner.read(a, b)
                    if self._kept and self.inner
                    else block.inner(block.mlp_input(x.read(a, b)))
                )
                x.write(a, block.add_mlp(x.read(a, b), block.mlp_output(inner)))

    def _inner_rows(self) -> Iterator[Tensor]:
        # In a plain layer among mixtures the room for the MLP's input has another width.
        room = None if self.block.config.experts else self.inner
        for a, b in self._spans:
            value = self.block.inner(self.block.mlp_input(self.x.read(a, b)))
            if room:
                room.write(a, value)
            yield value
        self._kept = room is not None

    def _route(self) -> None:
        """The MLP's input, kept while `x` moves on under the experts, and where each token goes."""
        assert self.inner is not None
        self._routes = []
        for a, b in self._spans:
            h = self.block.mlp_input(self.x.read(a, b))
            self.inner.write(a, h)
            self._routes.append(self.block.route(h.reshape(-1, h.shape[-1])))

    def _tokens(self, expert: int) -> Iterator[Tensor]:
        """What the expert reads: of its own tokens, or of all."""
        assert self.inner is not None
        if self.block.everywhere:
            return (self.inner.read(a, b).flatten(0, 1) for a, b in self._spans)
        return (part for _, part in self._of_expert(expert))

    def _of_expert(self, expert: int) -> Iterator[tuple[int, Tensor]]:
        """(number of a span, its tokens `[T, H]` that are routed to the expert), where there are
        any."""
        assert self.inner is not None
        if self._picks[0] != expert:
            picks = [(chosen == expert).nonzero(as_tuple=True) for chosen, _ in self._routes]
            self._picks = expert, [(tokens, slot) for tokens, slot in picks]
        for number, ((a, b), (tokens, _)) in enumerate(
            zip(self._spans, self._picks[1], strict=True)
        ):
            if len(tokens):
                yield number, self.inner.read(a, b).flatten(0, 1)[tokens]

    def _add_expert(self, expert: int) -> None:
        for number, h in self._of_expert(expert):
            (a, b), (tokens, slot), (_, weights) = (
                self._spans[number],
                self._picks[1][number],
                self._routes[number],
            )
            y = (
                self.block.mlp_output(self.block.inner(h, expert), expert)
                * weights[tokens, slot, None]
            )
            part = self.x.read(a, b)
            self.x.write(a, part.flatten(0, 1).index_add(0, tokens, y).view_as(part))
