"""How much each part of a model suffers from few bits: KL divergence of the output where that part
alone is rounded to nearest.

Full precision runs once; what it holds before layer `i` is where every rounding of a part of layer
`i` begins, so that layers `i` to the last are computed for it and no others. All roundings of a
layer go on together: each later layer is read once for them.

Shapes: `W` windows, `L` tokens, `H` hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.decoder.decoder import open_decoder
from quantflow.decoder.stream import Stream
from quantflow.evaluate.divergence import (
    BATCH_TOKENS,
    LOGIT_ELEMENTS,
    Head,
    Variant,
    embedded_parts,
)
from quantflow.formats.reader import Weights
from quantflow.machine import give_back_freed_memory
from quantflow.quant.grid import GridRules
from quantflow.quant.numbers.integer import quantize_rtn
from quantflow.quant.scheme import Scheme

Granularity = Literal["fused", "module", "layer"]
Rounding = Mapping[int, Mapping[str, Scheme]]
"""Layer -> name of a linear, relative to it -> the scheme that it is rounded to. What is not named
stays as it is."""


@dataclass(frozen=True)
class Part:
    """Linears of a layer that get one width. name: such as `model.layers.3.self_attn.qkv`. shapes:
    relative name -> `(N, K)`."""

    name: str
    layer: int
    shapes: Mapping[str, tuple[int, int]]

    @property
    def parameters(self) -> int:
        return sum(n * k for n, k in self.shapes.values())

    def stored_bytes(self, scheme: Scheme) -> int:
        return sum(scheme.stored_bytes(shape) for shape in self.shapes.values())

    def rounded(self, scheme: Scheme) -> Rounding:
        """This part alone."""
        return {self.layer: dict.fromkeys(self.shapes, scheme)}


def parts(checkpoint: Checkpoint, granularity: Granularity = "fused") -> list[Part]:
    """The parts of a model, in the order of computation. fused: linears that engines fuse and so
    want in one width: q, k and v; gate and up; the experts of a layer. module: every linear. layer:
    all linears of a layer."""
    found = []
    for index in range(checkpoint.config.layers):
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        for segment in checkpoint.segments(index):
            for spec in segment.linears:
                name = {"layer": "", "module": spec.name, "fused": segment.part}[granularity]
                groups.setdefault(name, {})[spec.name] = spec.shape
        prefix = checkpoint.architecture.layer_prefix(index)
        found += [
            Part(".".join(filter(None, (prefix, name))), index, shapes)
            for name, shapes in groups.items()
        ]
    return found


class Measure:
    """KL divergences to a model in full precision on `tokens` `[W, L]`, in float32.

    make_stream: hidden states of all windows, by a name that no other living stream has. step:
    called for every layer that something goes through.
    """

    def __init__(
        self,
        weights: Weights,
        tokens: Tensor,
        rules: GridRules,
        device: torch.device,
        make_stream: Callable[[str, tuple[int, int, int]], Stream],
        step: Callable[[], None] = lambda: None,
    ) -> None:
        self.weights, self.tokens, self.rules, self.device, self._step = (
            weights,
            tokens,
            rules,
            device,
            step,
        )
        self.config = weights.checkpoint.config
        self._decoder = open_decoder(weights.checkpoint, tokens.shape[1], device)
        self._windows = max(1, BATCH_TOKENS // tokens.shape[1])
        shape = (*tokens.shape, self.config.hidden)
        self._make = lambda name: make_stream(name, shape)

    @torch.inference_mode()
    def layer_by_layer(
        self, wanted: Callable[[int], Sequence[Rounding]], first: int = 0
    ) -> Iterator[tuple[int, list[float]]]:
        """(layer, the divergence of each of `wanted(layer)`) for the layers from `first` on; all
        that is rounded lies in that layer."""
        target, x = self._reference(), self._begin("x")
        try:
            for index in range(self.config.layers):
                if index >= first:
                    yield index, self._divergences(target, x, wanted(index), index)
                if index + 1 < self.config.layers:
                    self._through(index, [(x, x, {})])
                    self._step()
        finally:
            target.close()
            x.close()

    @torch.inference_mode()
    def whole(self, roundings: Sequence[Rounding]) -> list[float]:
        """The divergence of each rounding of the whole model."""
        target, x = self._reference(), self._begin("x")
        try:
            return self._divergences(target, x, roundings, 0)
        finally:
            target.close()
            x.close()

    def _begin(self, name: str) -> Stream:
        stream, start = self._make(name), 0
        for part in embedded_parts(self.weights, self.tokens, self.device):
            stream.write(start, part)
            start += len(part)
        return stream

    def _reference(self) -> Stream:
        """The hidden states that the head reads, in full precision."""
        target = self._begin("target")
        for index in range(self.config.layers):
            self._through(index, [(target, target, {})])
            self._step()
        return target

    def _divergences(
        self, target: Stream, x: Stream, roundings: Sequence[Rounding], first: int
    ) -> list[float]:
        if not roundings:
            return []
        streams = [self._make(f"rounded-{i}") for i in range(len(roundings))]
        try:
            for index in range(first, self.config.layers):
                sources = streams if index > first else [x] * len(streams)
                self._through(
                    index,
                    [
                        (a, b, r.get(index, {}))
                        for a, b, r in zip(sources, streams, roundings, strict=True)
                    ],
                )
                self._step()
            return mean_divergences(Variant(self.weights).head(self.device), target, streams)
        finally:
            for stream in streams:
                stream.close()

    def _through(
        self, index: int, work: Sequence[tuple[Stream, Stream, Mapping[str, Scheme]]]
    ) -> None:
        """Layer `index` over streams: (from, to, what is rounded in it). The layer is read once."""
        stored = {n: t.to(self.device, torch.float32) for n, t in self.weights.layer(index).items()}
        for source, target, schemes in work:
            rounded = {
                f"{n}.weight": quantize_rtn(stored[f"{n}.weight"], s, self.rules).dequantize()
                for n, s in schemes.items()
            }
            layer = self._decoder.block(index, {**stored, **rounded}, torch.float32)
            for start in range(0, source.windows, self._windows):
                target.write(
                    start,
                    layer.forward(source.read(start, min(start + self._windows, source.windows))),
                )
            del rounded, layer
        del stored
        give_back_freed_memory()


def mean_divergences(head: Head, target: Stream, found: Sequence[Stream]) -> list[float]:
    """KL(target || found) in nats a token, the mean over all positions, of hidden states after the
    last layer. Logits of the target are computed once for all."""
    rows = max(1, LOGIT_ELEMENTS // head.vocabulary)
    windows = max(1, rows // target.shape[1])
    sums = [0.0] * len(found)
    for start in range(0, target.windows, windows):
        read = [
            stream.read(start, min(start + windows, target.windows)).flatten(0, 1)
            for stream in (target, *found)
        ]
        for first in range(0, len(read[0]), rows):
            reference = head(read[0][first : first + rows])
            likely = reference.exp()
            for i, states in enumerate(read[1:]):
                sums[i] += float(
                    (likely * (reference - head(states[first : first + rows])))
                    .sum(-1)
                    .double()
                    .sum()
                )
    return [total / (target.shape[0] * target.shape[1]) for total in sums]
