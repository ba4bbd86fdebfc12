"""A decoder layer of the transformers library over weights of ours: for families without a table.

The class computes with torch's own operations, so what it does can be differentiated. It is run as
it is, but for experts, which are taken apart (`models/experts.py`); hooks on its linears show what
they read. Where a scale of a segment's input may go, `folds.py` tries out.
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
from torch.utils._pytree import tree_leaves, tree_map

from quantflow.decoder.block import ObserveKV, Reading, Streams, Tap
from quantflow.decoder.folds import DIFFERENT, Trial
from quantflow.decoder.hosted_passage import HostedPassage
from quantflow.models.experts import Experts, OneExpert, Routed, experts_of
from quantflow.models.library import Library
from quantflow.models.rows import Rows
from quantflow.models.segments import Role, Segment
from quantflow.models.trace import KVCache
from quantflow.models.wires import Shared

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a call: by place, and by name
Parent = Callable[[Tensor], Tensor]


class _Reached(Exception):
    """Ends a pass of the layer: what was wanted has been seen."""


def _is_view(value: object, rows: Tensor) -> bool:
    """Whether it is `rows`, or all of them in another shape."""
    return value is rows or (
        isinstance(value, Tensor)
        and value.data_ptr() == rows.data_ptr()
        and value.numel() == rows.numel()
    )


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
        self.layer, self.everywhere = library.layers[index], False
        self._given: dict[str, Any] = {}  # to the layer in its last pass, beside hidden states
        self.tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}

    def forward(self, x: Tensor, observe: ObserveKV | None = None) -> Tensor:
        self.rows(x)  # before there are hooks: it runs layers
        if self.tap is None:
            return self._run(x, observe)
        with contextlib.ExitStack() as hooks:
            for segment in self.library.segments(self.index):
                for name in segment.names:
                    hooks.callback(self._tapped(name, self.tap))
            for experts in experts_of(self.layer):
                experts.everywhere = self.everywhere
                hooks.callback(setattr, experts, "everywhere", False)
            return self._run(x, observe)

    def _tapped(self, name: str, tap: Tap) -> Callable[[], None]:
        def seen(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            tap(name, args[0], output)

        return self.module(name).register_forward_hook(seen).remove

    def module(self, name: str) -> nn.Module:
        return self.library.module(self.index, name)

    def _run(
        self,
        x: Tensor,
        observe: ObserveKV | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        frame, rows = self.library.frame, self.rows(x)
        hidden, beside = rows.split(x)
        self._given = kwargs = frame.arguments(self.index, x, beside)
        cache = frame.cache_argument(self.index)
        if observe and cache and self.library.trace(self.index).kv:
            kwargs[cache] = KVCache(observe, self.library.config)
        weights = self._held(tensors or self.tensors)
        with frame.plain():
            output = functional_call(self.layer, weights, hidden, kwargs)
        made = frame.left(self.index, x, kwargs, output)
        return rows.join(output[0] if isinstance(output, tuple) else output, beside | made)

    def rows(self, x: Tensor) -> Rows:
        """How the rows `x` `[B, L, C]` are laid out."""
        return self.library.frame.rows(x.shape[1], x.dtype, x.device)

    def _held(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As the class holds them: some put rows of several under one another."""
        held: dict[str, Tensor] = {}
        for name, own in self.library.inside(self.index).items():
            if name in tensors:
                part = tensors[name]
                held[own] = torch.cat((held[own], part)) if own in held else part
        return held

    def until(self, segment: Segment, x: Tensor, observe: ObserveKV | None = None) -> Tensor:
        """What the segment reads, `[..., K]`, of hidden states `x`: the layer is run so far."""
        if segment.expert is not None:
            return self.of_expert(segment, self.routed(segment, x, observe), self.everywhere)
        args, _ = self._call_of(self.module(segment.names[0]), x, observe)
        rows: Tensor = args[0]
        return rows

    def _call_of(self, module: nn.Module, x: Tensor, observe: ObserveKV | None = None) -> Arguments:
        """What a module of the layer is called with."""
        kept: list[Arguments] = []

        def reached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append((args, kwargs))
            raise _Reached

        self.rows(x)  # before there are hooks: it runs layers
        hook = module.register_forward_pre_hook(reached, with_kwargs=True)
        try:
            self._run(x, observe)
        except _Reached:
            pass
        finally:
            hook.remove()
        return kept[0]

    # Experts

    def experts(self, segment: Segment) -> Experts:
        """Those of which the segment's is one."""
        own = self.library.inside(self.index)[f"{segment.names[0]}.weight"]
        return next(e for e in experts_of(self.layer) if own.startswith(f"{e.path}."))

    def routed(self, segment: Segment, x: Tensor, observe: ObserveKV | None = None) -> Routed:
        """What the experts get of hidden states `x`, and which of them a row goes to."""
        experts = self.experts(segment)
        args, kwargs = self._call_of(experts, x, observe)
        return experts.routed(*args, **kwargs)

    def of_expert(self, segment: Segment, routed: Routed, everywhere: bool = False) -> Tensor:
        """What an expert's segment reads: of its own tokens, or of all."""
        assert segment.expert is not None
        everywhere &= not self.experts(segment).layout.sorted  # all it is given is its own
        rows = routed.rows if everywhere else routed.rows[routed.of(segment.expert)[0]]
        if segment.role is Role.mlp_in:
            return rows
        experts = self.experts(segment)
        names = self.library.inside(self.index)
        own = {
            f"experts.{names[n].removeprefix(f'{experts.path}.')}": self.tensors[n]
            for name in self._first(segment)
            for n in (f"{name}.weight", f"{name}.bias")
            if n in self.tensors
        }
        inner: Tensor = functional_call(OneExpert(experts, segment.expert), own, (rows, False))
        return inner

    def _first(self, segment: Segment) -> tuple[str, ...]:
        """The linears whose outputs make what an expert's last segment reads."""
        return next(
            other.names
            for other in self.library.segments(self.index)
            if other.expert == segment.expert
            and other.part == segment.part
            and other.role is Role.mlp_in
        )

    # What AWQ looks at

    def readings(self, x: Tensor) -> Iterator[Reading]:
        arrived: dict[str, tuple[Routed, Tensor, Parent | None]] = {}  # at a mixture's experts
        for segment in self.segments:
            feeds = segment.fold is not None and segment.fold.norm is not None
            if segment.expert is not None:
                if segment.part not in arrived:
                    arrived[segment.part] = self._before_experts(segment, x)
                routed, source, parent = arrived[segment.part]
                rows = self.of_expert(segment, routed)
                yield Reading(segment, rows, source if feeds else rows, parent if feeds else None)
            elif feeds:
                rows, parent = self._with_parent(segment, x)
                yield Reading(segment, rows, rows, parent)
            else:
                rows = self.until(segment, x)
                yield Reading(segment, rows, rows)

    def _before_experts(self, segment: Segment, x: Tensor) -> tuple[Routed, Tensor, Parent | None]:
        """What the experts get, what their block gets, and what the block makes of that."""
        experts = self.experts(segment)
        block = experts.path.rpartition(".")[0]
        (args, kwargs), source, parent = self._within(block, experts, x)
        routed = experts.routed(*args, **kwargs)
        return routed, routed.rows if source is None else source, parent

    def _with_parent(self, segment: Segment, x: Tensor) -> tuple[Tensor, Parent | None]:
        """What the segment reads, and what the module that its linears are in makes of it; None
        where that module is given something else."""
        names = self.library.inside(self.index)
        path = names[f"{segment.names[0]}.weight"].removesuffix(".weight").rpartition(".")[0]
        alike = all(names[f"{name}.weight"].startswith(f"{path}.") for name in segment.names)
        (args, _), _, parent = self._within(path if alike else "", self.module(segment.names[0]), x)
        return args[0], parent

    def _within(
        self, path: str, module: nn.Module, x: Tensor
    ) -> tuple[Arguments, Tensor | None, Parent | None]:
        """What `module` is called with, the same as its parent at `path` gets it, and what the
        parent makes of that; None where the parent is the layer or gets something else."""
        calls: list[Arguments] = []
        self.rows(x)  # before there are hooks: it runs layers
        parent = self.layer.get_submodule(path)

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))

        hook = parent.register_forward_pre_hook(note, with_kwargs=True)
        try:
            called = self._call_of(module, x)
        finally:
            hook.remove()
        rows: Tensor = called[0][0]
        args, kwargs = calls[0] if path else ((), {})
        source, given = (
            next((v for v in (*args, *kwargs.values()) if _is_view(v, rows)), None),
            self._given,
        )
        if source is None:
            return called, None, None
        own = f"{path}."

        def made_of(part: Tensor) -> Tensor:
            held = self._held(self.tensors)
            weights = {n.removeprefix(own): t for n, t in held.items() if n.startswith(own)}
            # `part` may have fewer texts: so has all that comes with it then.
            frame, fewer = self.library.frame, x[: len(part)]
            less = frame.arguments(self.index, fewer, self.rows(x).split(fewer)[1])
            pairs = zip(tree_leaves(given), tree_leaves(less), strict=True)
            swapped = {id(a): b for a, b in pairs if isinstance(a, Tensor | Shared)}
            swapped[id(source)] = part

            def of_part(value: Any) -> Any:
                fewer_rows = isinstance(value, Tensor) and value.shape == source.shape
                return swapped.get(id(value), value[: len(part)] if fewer_rows else value)

            own_args, own_kwargs = tree_map(of_part, (args, kwargs))
            with frame.plain():
                output = functional_call(parent, weights, own_args, own_kwargs)
            return output if isinstance(output, Tensor) else output[0]

        return called, source, made_of

    def passage(self, streams: Streams, batch: int, observe: ObserveKV) -> HostedPassage:
        return HostedPassage(self, streams, batch, observe)

    # Where AWQ's scales may go

    def _tried(self) -> HostedBlock:
        """The layer in float32, of experts the first few again and again."""
        names, places = self.library.inside(self.index), dict[str, str]()
        stored = {own: name for name, own in names.items()}
        for experts in experts_of(self.layer):
            for expert in range(DIFFERENT, experts.count):
                own, like = (f"{experts.path}.{e}." for e in (expert, expert % DIFFERENT))
                for name in (n for n in stored if n.startswith(own)):
                    places[stored[name]] = stored[like + name.removeprefix(own)]
        plain = {n: t for n, t in self.tensors.items() if n not in places}
        tensors = {n: t.float() if t.is_floating_point() else t for n, t in plain.items()}
        tensors |= {name: tensors[like] for name, like in places.items()}
        return HostedBlock(self.library, self.index, tensors, torch.float32)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The layer's segments, each with the fold that leaves these weights' function as it is."""
        trace = self.library.trace(self.index)
        with torch.inference_mode():
            trial = Trial(self._tried())
            return tuple(
                replace(segment, fold=trial.norm(segment) or trial.linear(number))
                for number, segment in enumerate(trace.segments)
            )


class HostedDecoder:
    """A library class for windows of one length; see `block.Decoder`."""

    def __init__(self, library: Library) -> None:
        self.library = library
        embedding, head = (f"{library.outer[kind]}.weight" for kind in ("embedding", "head"))
        own = [n for n, _ in library.expected() if not n.startswith(f"{library.stored_prefix}.")]
        self.embeds = tuple(n for n in own if n != head or n == embedding)
        tables = {*library.tables, embedding} - ({embedding} if library.tied else set())
        self.heads = tuple(n for n in own if n not in tables)

    def embed(self, tensors: Mapping[str, Tensor], tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.library.frame.embed(_as(tensors, dtype), tokens)

    def logits(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return self.library.frame.logits(_as(tensors, x.dtype), x)

    def block(
        self, index: int, tensors: Mapping[str, Tensor], dtype: torch.dtype, tap: Tap | None = None
    ) -> HostedBlock:
        return HostedBlock(self.library, index, tensors, dtype, tap)


def _as(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
