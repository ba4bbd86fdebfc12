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
from quantflow.decoder.stream import Room, Stream
from quantflow.decoder.walk import through
from quantflow.evaluate.distributions import Output, mean_divergences
from quantflow.evaluate.divergence import Variant, embed_windows, together
from quantflow.formats.reader import Weights
from quantflow.quant.grid import GridRules
from quantflow.quant.numbers.integer import quantize_rtn
from quantflow.quant.scheme import Scheme

Granularity = Literal["fused", "module", "layer"]
Rounding = Mapping[int, Mapping[str, Scheme]]
"""Layer -> name of a linear, relative to it -> the scheme that it is rounded to. What is not named
stays as it is."""
Work = tuple[Stream, Stream, Mapping[str, Scheme]]
"""A layer's: from which stream, to which, and what is rounded in it."""


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
    result = []
    for index in range(checkpoint.config.layers):
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        for segment in checkpoint.segments(index):
            for spec in segment.linears:
                name = {"layer": "", "module": spec.name, "fused": segment.part}[granularity]
                groups.setdefault(name, {})[spec.name] = spec.shape
        prefix = checkpoint.architecture.layer_prefix(index)
        result += [
            Part(".".join(filter(None, (prefix, name))), index, shapes)
            for name, shapes in groups.items()
        ]
    return result


class Measure:
    """KL divergences to a model in full precision on `tokens` `[W, L]`, in float32.

    room: for the reference's hidden states, those that are carried on, and those of every rounding
    of a layer. step: called for every layer that something goes through.
    """

    def __init__(
        self,
        weights: Weights,
        tokens: Tensor,
        rules: GridRules,
        room: Room,
        step: Callable[[], None] = lambda: None,
    ) -> None:
        self.weights, self.tokens, self.rules, self.room = weights, tokens, rules, room
        self.config, self._step = weights.checkpoint.config, step
        self._decoder = open_decoder(weights.checkpoint, tokens.shape[1], room.device)
        self._layers = self.config.layers

    @torch.inference_mode()
    def layer_by_layer(
        self, wanted: Callable[[int], Sequence[Rounding]], first: int = 0
    ) -> Iterator[tuple[int, list[float]]]:
        """(layer, the divergence of each of `wanted(layer)`) for the layers from `first` on; all
        that is rounded lies in that layer."""
        target, x = self._reference(), self._begin("x")
        try:
            for index in range(self._layers):
                if index >= first:
                    yield index, self._divergences(target, x, wanted(index), index)
                if index + 1 < self._layers:
                    self._through(range(index, index + 1), lambda _: [(x, x, {})])
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

    def _stream(self, name: str) -> Stream:
        channels = self.weights.checkpoint.row_channels(self.tokens.shape[1], torch.float32)
        return self.room.stream(name, (*self.tokens.shape, channels), torch.float32)

    def _begin(self, name: str) -> Stream:
        stream = self._stream(name)
        embed_windows(self.weights, self.tokens, stream)
        return stream

    def _reference(self) -> Stream:
        """The hidden states that the head reads, in full precision."""
        target = self._begin("target")
        self._through(range(self._layers), lambda _: [(target, target, {})])
        return target

    def _divergences(
        self, target: Stream, x: Stream, roundings: Sequence[Rounding], first: int
    ) -> list[float]:
        if not roundings:
            return []
        streams = [self._stream(f"rounded-{i}") for i in range(len(roundings))]

        def work(index: int) -> list[Work]:
            sources = streams if index > first else [x] * len(streams)
            return [
                (source, stream, rounding.get(index, {}))
                for source, stream, rounding in zip(sources, streams, roundings, strict=True)
            ]

        try:
            self._through(range(first, self._layers), work)
            head = Variant(self.weights).head(self.room.device)
            return mean_divergences(
                Output(target, head), [Output(stream, head) for stream in streams]
            )
        finally:
            for stream in streams:
                stream.close()

    def _through(self, layers: range, work: Callable[[int], Sequence[Work]]) -> None:
        """Each layer over the streams of its work; its weights are read once."""

        def of_layer(index: int, stored: dict[str, Tensor]) -> None:
            stored = {name: tensor.float() for name, tensor in stored.items()}
            for source, target, schemes in work(index):
                rounded = {
                    f"{n}.weight": quantize_rtn(stored[f"{n}.weight"], s, self.rules).dequantize()
                    for n, s in schemes.items()
                }
                layer = self._decoder.block(index, {**stored, **rounded}, torch.float32)
                for start, stop in source.spans(together(self.tokens)):
                    target.write(start, layer.forward(source.read(start, stop)))
                del rounded, layer
            self._step()

        through(self.weights.layer, layers, self.room.device, of_layer)
