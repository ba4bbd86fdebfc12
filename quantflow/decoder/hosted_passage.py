"""All calibration windows on their way through a hosted block, stopped between its segments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from quantflow.decoder.block import ObserveKV, Streams
from quantflow.models.experts import Routed
from quantflow.models.segments import Segment

if TYPE_CHECKING:
    from quantflow.decoder.hosted import HostedBlock


class HostedPassage:
    """See `block.Passage`.

    Nothing is kept between segments but the residual stream: what a segment reads is computed from
    the layer's beginning, over the weights that the segments before it have by now. But for
    experts: what they get does not change while they are quantised one after the other, and is
    kept, with the way of each token.
    """

    def __init__(
        self, block: HostedBlock, streams: Streams, batch: int, observe: ObserveKV
    ) -> None:
        self.block, self.x, self.inner, self._observe = block, streams.x, streams.inner, observe
        self._spans = list(self.x.spans(batch))
        trace = block.library.trace(block.index)
        self._segments = trace.segments
        self._settled = {s.names for s in trace.segments[trace.cached or 0 :]}
        self._observed = trace.cached is None
        self._arrived: tuple[str, list[Routed]] = ("", [])  # at a mixture's experts, of each span

    def rows(self, segment: Segment) -> Iterator[Tensor]:
        # K and V are what they will stay once a segment behind the cache is asked for.
        observe = self._observe if segment.names in self._settled and not self._observed else None
        self._observed = self._observed or observe is not None
        block = self.block
        if segment.expert is None:
            for a, b in self._spans:
                yield block.until(segment, self.x.read(a, b), observe)
            return
        for routed in self._routed(segment, observe):
            rows = block.of_expert(segment, routed, block.everywhere)
            if len(rows):
                yield rows

    def _routed(self, segment: Segment, observe: ObserveKV | None) -> Iterator[Routed]:
        """What the segment's experts get, span by span."""
        part, kept = self._arrived
        if part == segment.part and self.inner:
            for (a, b), routed in zip(self._spans, kept, strict=True):
                yield replace(routed, rows=self.inner.read(a, b).flatten(0, 1))
            return
        ways: list[Routed] = []
        for a, b in self._spans:
            x = self.x.read(a, b)
            routed = self.block.routed(segment, x, observe)
            inner = (*x.shape[:2], self.inner.shape[-1]) if self.inner else ()
            if self.inner and routed.rows.numel() == math.prod(inner):
                self.inner.write(a, routed.rows.view(inner))
                ways.append(replace(routed, rows=routed.rows[:0]))
            yield routed
        if len(ways) == len(self._spans):
            self._arrived = segment.part, ways

    def advance(self, segment: Segment, *, feeds: bool = True) -> None:
        if segment.names != self._segments[-1].names or (self._observed and not feeds):
            return
        observe = None if self._observed else self._observe
        for a, b in self._spans:
            self.x.write(a, self.block.forward(self.x.read(a, b), observe))
