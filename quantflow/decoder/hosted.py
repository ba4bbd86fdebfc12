"""A decoder layer of the transformers library over weights of ours: for families without a table.

The class computes with torch's own operations, so what it does can be differentiated. It is run as
it is; hooks on its linears show what they read. Where a scale of a segment's input may go is tried
out on the layer itself: a fold counts if it leaves the layer's function as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quantflow.decoder.block import ObserveKV, Reading, Streams, Tap
from quantflow.models.library import TRACED, Library
from quantflow.models.segments import Fold, Segment
from quantflow.models.trace import KVCache

SAME = 1e-5  # how far a folded layer may be from the plain one, in float32


class _Reached(Exception):
    """Ends a pass of the layer: what was wanted has been seen."""


class HostedBlock:
    """Layer `index` of a library class; see `block.Block`."""

    def __init__(
        self,
        library: Library,
        index: int,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        tap: Tap | None = None,
    ) -> None:
        self.library, self.index, self.dtype, self.tap = library, index, dtype, tap
        self.layer = library.layers[index]
        self.tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}

    def forward(self, x: Tensor, observe: ObserveKV | None = None) -> Tensor:
        if self.tap is None:
            return self._run(x, observe)
        with contextlib.ExitStack() as hooks:
            for segment in self.library.segments(self.index):
                for name in segment.names:
                    hooks.callback(self._tapped(name, self.tap))
            return self._run(x, observe)

    def _tapped(self, name: str, tap: Tap) -> Callable[[], None]:
        def seen(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            tap(name, args[0], output)

        return self.layer.get_submodule(name).register_forward_hook(seen).remove

    def _run(
        self,
        x: Tensor,
        observe: ObserveKV | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        call = self.library.calls(x.shape[1], self.dtype, x.device)[self.index]
        kwargs, cache = dict(call.kwargs), self.library.cache_argument(self.index)
        if observe and cache:
            kwargs[cache] = KVCache(observe)
        weights = dict(self.tensors if tensors is None else tensors)
        output: Tensor = functional_call(self.layer, weights, (x, *call.args), kwargs)
        return output

    def until(self, segment: Segment, x: Tensor, observe: ObserveKV | None = None) -> Tensor:
        """What the segment reads, `[..., K]`, of hidden states `x`: the layer is run so far."""
        kept: list[Tensor] = []

        def reached(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0])
            raise _Reached

        hook = self.layer.get_submodule(segment.names[0]).register_forward_pre_hook(reached)
        try:
            self._run(x, observe)
        except _Reached:
            pass
        finally:
            hook.remove()
        return kept[0]

    def readings(self, x: Tensor) -> Iterator[Reading]:
        for segment in self.segments:
            fold = segment.fold
            if fold is None or fold.norm is None:
                rows = self.until(segment, x)
                yield Reading(segment, rows, rows)
                continue
            rows, parent = self._with_parent(segment, x)
            yield Reading(segment, rows, rows, parent)

    def _with_parent(
        self, segment: Segment, x: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """What the segment reads, and what the module that its linears are in makes of it; None
        where that module is given something else."""
        path = segment.names[0].rpartition(".")[0]
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))

        module = self.layer.get_submodule(path)
        hook = module.register_forward_pre_hook(note, with_kwargs=True)
        try:
            rows = self.until(segment, x)
        finally:
            hook.remove()
        if not path or any(not name.startswith(f"{path}.") for name in segment.names):
            return rows, None
        args, kwargs = calls[0]
        if not any(value is rows for value in (*args, *kwargs.values())):
            return rows, None
        own = f"{path}."

        def parent(part: Tensor) -> Tensor:
            weights = {n.removeprefix(own): t for n, t in self.tensors.items() if n.startswith(own)}
            output = functional_call(
                module,
                weights,
                tuple(part if value is rows else value for value in args),
                {name: part if value is rows else value for name, value in kwargs.items()},
            )
            return output if isinstance(output, Tensor) else output[0]

        return rows, parent

    def passage(self, streams: Streams, batch: int, observe: ObserveKV) -> HostedPassage:
        return HostedPassage(self, streams, batch, observe)

    # Where AWQ's scales may go

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The layer's segments, each with the fold that leaves these weights' function as it is."""
        trace = self.library.trace(self.index)
        with torch.inference_mode():
            trial = _Trial(self)
            return tuple(
                replace(segment, fold=trial.norm(segment) or trial.linear(number))
                for number, segment in enumerate(trace.segments)
            )


class _Trial:
    """Folds that are tried on a few random hidden states.

    In float32, and by powers of two: a fold that holds is then off by less than rounding, and one
    that does not is seen, however little it does.
    """

    def __init__(self, block: HostedBlock) -> None:
        self.block = HostedBlock(block.library, block.index, block.tensors, torch.float32)
        self.trace = block.library.trace(block.index)
        device = next(iter(block.tensors.values())).device
        self._random = torch.Generator().manual_seed(0)
        x = torch.randn(1, TRACED, block.library.hidden, generator=self._random)
        self.x = x.to(device)
        self.inputs, self.output = self._watch(self.block.tensors)

    def _watch(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The input of each segment (by its first linear), and what the layer adds to `x`."""
        inputs: dict[str, Tensor] = {}
        with contextlib.ExitStack() as hooks:
            for name in (segment.names[0] for segment in self.trace.segments):

                def note(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                    inputs[name] = args[0]

                hook = self.block.layer.get_submodule(name).register_forward_pre_hook(note)
                hooks.callback(hook.remove)
            output = self.block._run(self.x, None, tensors)
        return inputs, output - self.x

    def _scale(self, channels: int) -> Tensor:
        """Powers of two, which change no bit but an exponent."""
        exponents = torch.randint(-1, 2, (channels,), generator=self._random)
        return torch.exp2(exponents.float()).to(self.x.device)

    def _holds(self, changed: Mapping[str, Tensor], segment: Segment, scale: Tensor) -> bool:
        """Whether the segment then reads its input divided by `scale`, and all else is as it
        was."""
        readers = {
            f"{name}.weight": self.block.tensors[f"{name}.weight"] * scale for name in segment.names
        }
        inputs, output = self._watch({**self.block.tensors, **changed, **readers})
        inputs[segment.names[0]] = inputs[segment.names[0]] * scale
        alive = self.output.any() and self.inputs[segment.names[0]].any()  # else all would hold
        return bool(alive) and all(
            _same(computed, expected)
            for computed, expected in (
                (output, self.output),
                *((inputs[name], value) for name, value in self.inputs.items()),
            )
        )

    def norm(self, segment: Segment) -> Fold | None:
        """The norm that feeds the segment, if it and nothing else is multiplied by its weight, or
        by 1 + its weight."""
        fold = segment.fold
        if fold is None or fold.norm is None:
            return None
        tensors, name = self.block.tensors, f"{fold.norm}.weight"
        weight, scale = tensors[name], self._scale(segment.channels)
        bias = tensors.get(f"{fold.norm}.bias")
        for offset in (0.0, 1.0):
            changed = {name: (weight + offset) / scale - offset}
            if bias is not None:
                changed[f"{fold.norm}.bias"] = bias / scale
            if self._holds(changed, segment, scale):
                return replace(fold, offset=offset)
        return None

    def linear(self, number: int) -> Fold | None:
        """The last linear before segment `number` whose output channels its input is made of, one
        by one or head by head."""
        segments, tensors = self.trace.segments, self.block.tensors
        segment = segments[number]
        if len(segment.linears) > 1:
            return None
        producers = [
            (spec, before)
            for before, earlier in enumerate(segments[:number])
            for spec in earlier.linears
        ]
        for spec, before in reversed(producers):
            rows, channels = spec.shape[0], segment.channels
            cached, heads = self.trace.cached, (1, 1)
            # Values of a head may be read by several groups of queries.
            beside = spec.name.rpartition(".")[0] == segment.names[0].rpartition(".")[0]
            if beside and cached is not None and self.trace.kv and before < cached <= number:
                heads = (channels // rows, self.trace.kv[1][1])
            if rows * heads[0] != channels or rows % heads[1]:
                continue
            scale = self._scale(rows)
            changed = {f"{spec.name}.weight": tensors[f"{spec.name}.weight"] / scale[:, None]}
            if spec.bias:
                changed[f"{spec.name}.bias"] = tensors[f"{spec.name}.bias"] / scale
            times, size = heads
            expanded = scale.view(-1, 1, size).expand(-1, times, -1).reshape(-1)
            if self._holds(changed, segment, expanded):
                return Fold(linear=spec.name, heads=heads)
        return None


def _same(computed: Tensor, expected: Tensor) -> bool:
    return bool((computed - expected).norm() <= SAME * expected.norm())


class HostedPassage:
    """All calibration windows on their way through a hosted block; see `block.Passage`.

    Nothing is kept between segments but the residual stream: what a segment reads is computed from
    the layer's beginning, over the weights that the segments before it have by now.
    """

    def __init__(
        self, block: HostedBlock, streams: Streams, batch: int, observe: ObserveKV
    ) -> None:
        self.block, self.x, self._observe = block, streams.x, observe
        self._spans = list(self.x.spans(batch))
        trace = block.library.trace(block.index)
        self._segments = trace.segments
        self._settled = {s.names for s in trace.segments[trace.cached or 0 :]}
        self._observed = trace.cached is None

    def rows(self, segment: Segment) -> Iterator[Tensor]:
        # K and V are what they will stay once a segment behind the cache is asked for.
        observe = self._observe if segment.names in self._settled and not self._observed else None
        self._observed = self._observed or observe is not None
        for a, b in self._spans:
            yield self.block.until(segment, self.x.read(a, b), observe)

    def advance(self, segment: Segment, *, feeds: bool = True) -> None:
        if segment.names != self._segments[-1].names or (self._observed and not feeds):
            return
        observe = None if self._observed else self._observe
        for a, b in self._spans:
            self.x.write(a, self.block.forward(self.x.read(a, b), observe))


class HostedDecoder:
    """A library class for windows of one length; see `block.Decoder`."""

    def __init__(self, library: Library) -> None:
        self.library = library
        embedding, head = (f"{library.outer[kind]}.weight" for kind in ("embedding", "head"))
        own = [n for n, _ in library.expected() if not n.startswith(f"{library.prefix}.")]
        self.embeds = tuple(n for n in own if n != head or n == embedding)
        self.heads = tuple(n for n in own if n != embedding or library.tied)

    def embed(self, tensors: Mapping[str, Tensor], tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.library.embed(_as(tensors, dtype), tokens)

    def logits(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return self.library.logits(_as(tensors, x.dtype), x)

    def block(
        self, index: int, tensors: Mapping[str, Tensor], dtype: torch.dtype, tap: Tap | None = None
    ) -> HostedBlock:
        return HostedBlock(self.library, index, tensors, dtype, tap)


def _as(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
