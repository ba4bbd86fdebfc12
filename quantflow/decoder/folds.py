"""Where a scale of a segment's input may go, tried out on a hosted layer: a fold counts if it
leaves the layer's function as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quantflow.models.experts import OneExpert
from quantflow.models.frame import TRACED
from quantflow.models.segments import Fold, Role, Segment

if TYPE_CHECKING:
    from quantflow.decoder.hosted import HostedBlock

SAME = 1e-5  # how far a folded layer may be from the plain one, in float32
DIFFERENT = 4  # experts that a trial tells apart: all in float32 would be twice the layer


class Trial:
    """Folds that are tried on a few random hidden states.

    In float32, and by powers of two: a fold that holds is then off by less than rounding, and one
    that does not is seen, however little it does. block: in float32, of experts only some.
    """

    def __init__(self, block: HostedBlock) -> None:
        self.block, self.trace = block, block.library.trace(block.index)
        device = next(iter(block.tensors.values())).device
        self._random = torch.Generator().manual_seed(0)
        self.rows = block.library.frame.rows(TRACED, torch.float32, device)
        self.x = self.rows.random(self._random).to(device)
        self.inputs, self.output = self._watch(self.block.tensors)
        # One expert speaks for all: they are computed by the same code.
        self._norms: dict[str, Fold | None] = {}
        self._leaves: dict[
            str, str | None
        ] = {}  # of an expert whose input a mixture's `down` takes

    def _watch(
        self, tensors: Mapping[str, Tensor], scaled: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The input of each segment (by its first linear) but experts', and what the layer adds to
        `x`. scaled: module -> what its input is multiplied by, as if its weight were."""
        inputs: dict[str, Tensor] = {}
        with contextlib.ExitStack() as hooks:
            for segment in self.trace.segments:
                name = segment.names[0]

                def note(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                    inputs[name] = args[0]

                if segment.expert is None:
                    hook = self.block.module(name).register_forward_pre_hook(note)
                    hooks.callback(hook.remove)
            for name, scale in (scaled or {}).items():
                hook = self.block.module(name).register_forward_pre_hook(_multiplied(scale))
                hooks.callback(hook.remove)
            output = self.block._run(self.x, None, tensors)
        return inputs, self.rows.comparable(output) - self.rows.comparable(self.x)

    def _scale(self, channels: int) -> Tensor:
        """Powers of two, which change no bit but an exponent."""
        exponents = torch.randint(-1, 2, (channels,), generator=self._random)
        return torch.exp2(exponents.float()).to(self.x.device)

    def _holds(
        self,
        changed: Mapping[str, Tensor],
        segments: Sequence[Segment],
        scale: Tensor,
        beside: tuple[str, ...] = (),
    ) -> bool:
        """Whether the segments then read their input divided by `scale`, and all else is as it was.
        beside: what else reads it."""
        readers = [name for segment in segments for name in segment.names]
        scaled = dict.fromkeys([*readers, *beside], scale)
        inputs, output = self._watch({**self.block.tensors, **changed}, scaled)
        alive = self.output.any()  # else all would hold
        for name in (segment.names[0] for segment in segments if segment.expert is None):
            inputs[name] = inputs[name] * scale
            alive &= self.inputs[name].any()
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
        if fold.norm not in self._norms:
            self._norms[fold.norm] = self._norm(fold, fold.norm)
        return self._norms[fold.norm]

    def _norm(self, fold: Fold, norm: str) -> Fold | None:
        readers = [s for s in self.trace.segments if s.fold and s.fold.norm == norm]
        tensors, name = self.block.tensors, f"{norm}.weight"
        weight, scale = tensors[name], self._scale(readers[0].channels)
        bias = tensors.get(f"{norm}.bias")
        for offset in (0.0, 1.0):
            changed = {name: (weight + offset) / scale - offset}
            if bias is not None:
                changed[f"{norm}.bias"] = bias / scale
            if self._holds(changed, readers, scale, fold.beside):
                return replace(fold, offset=offset)
        return None

    def linear(self, number: int) -> Fold | None:
        """The last linear before segment `number` whose output channels its input is made of, one
        by one or head by head."""
        segments, tensors = self.trace.segments, self.block.tensors
        segment = segments[number]
        if segment.expert is not None:
            return self._of_expert(segment)
        if len(segment.linears) > 1:
            return None
        producers = [
            (spec, before)
            for before, earlier in enumerate(segments[:number])
            for spec in earlier.linears
            if earlier.expert is None
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
            times, size = heads
            expanded = scale.view(-1, 1, size).expand(-1, times, -1).reshape(-1)
            if self._holds(_divided(spec.name, tensors, scale), [segment], expanded):
                return Fold(linear=spec.name, heads=heads)
        return None

    def _of_expert(self, segment: Segment) -> Fold | None:
        if segment.role is not Role.mlp_out:
            return None
        own, _, leaf = segment.names[0].rpartition(".")
        if segment.part not in self._leaves:
            self._leaves[segment.part] = self._leaf(segment, own, leaf)
        producer = self._leaves[segment.part]
        return Fold(linear=f"{own}.{producer}") if producer else None

    def _leaf(self, segment: Segment, own: str, last: str) -> str | None:
        """The linear of the expert `own` whose outputs its `last` one reads, one by one."""
        assert segment.expert is not None
        experts, inside = self.block.experts(segment), self.block.library.inside(self.block.index)
        # by their names in the class, which are others in some checkpoints
        stored = {
            inside[n].rpartition(f".{segment.expert}.")[2]: n
            for n in self.block.tensors
            if n.startswith(f"{own}.")
        }
        tensors = {name: self.block.tensors[n] for name, n in stored.items()}
        last = inside[f"{own}.{last}.weight"].removesuffix(".weight").rpartition(".")[2]
        rows = torch.randn(TRACED, experts.channels, generator=self._random)
        rows = rows.to(self.x.device)
        one = OneExpert(experts, segment.expert)

        def outputs(changed: Mapping[str, Tensor]) -> Tensor:
            weights = {
                f"experts.{segment.expert}.{n}": t for n, t in {**tensors, **changed}.items()
            }
            result: Tensor = functional_call(one, weights, rows)
            return result

        plain, scale = outputs({}), self._scale(segment.channels)
        for leaf in reversed(experts.leaves[:-1]):
            changed = _divided(leaf, tensors, scale)
            changed[f"{last}.weight"] = tensors[f"{last}.weight"] * scale
            if _same(outputs(changed), plain):
                return stored[f"{leaf}.weight"].removesuffix(".weight").rpartition(".")[2]
        return None


def _same(computed: Tensor, expected: Tensor) -> bool:
    return bool((computed - expected).norm() <= SAME * expected.norm())


def _divided(linear: str, tensors: Mapping[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
    """A linear's tensors, its outputs divided by `scale`."""
    changed = {f"{linear}.weight": tensors[f"{linear}.weight"] / scale[:, None]}
    if f"{linear}.bias" in tensors:
        changed[f"{linear}.bias"] = tensors[f"{linear}.bias"] / scale
    return changed


def _multiplied(scale: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda module, args: (args[0] * scale, *args[1:])
