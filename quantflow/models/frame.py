"""The outer model of a library class, around its layers: what comes before them, what they are
called with, and what comes after them.

A recorder stands in each layer's place. Passes over stand-ins for the outer model's own tensors
show what each layer gets, without weights: what is the same for all texts of a length (masks,
position embeddings) is kept as it is; what follows from the text, and what layers leave for later
ones, goes along in the rows (`rows.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from quantflow.models.calls import Call, Recorder, stand_ins
from quantflow.models.config import ConfigProblem
from quantflow.models.library_class import move_buffers
from quantflow.models.plain import plain_functions
from quantflow.models.rows import Part, Rows
from quantflow.models.trace import KVCache, SeenKV, kind_of
from quantflow.models.wires import Shared, Wires, Wiring, named

TRACED = 8  # tokens of the pass that finds a layer's segments
OTHER = 11  # and of one that shows what depends on their number
# The argument that is the cache.
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


class _Reached(Exception):
    """Ends a pass of the outer model: what was wanted has been seen."""


class Frame:
    """model: with recorders for layers. held: a tensor's name in a checkpoint -> in the class."""

    def __init__(
        self,
        model: Any,
        config: Any,
        layers: Sequence[nn.Module],
        prefix: str,
        held: Mapping[str, str],
    ) -> None:
        self.model, self.config, self.layers, self.held = model, config, layers, held
        self.name = type(model).__name__
        self._stored = {own: stored for stored, own in held.items()}
        self._recorders = [Recorder(layer, i) for i, layer in enumerate(layers)]
        parent, _, leaf = prefix.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.ModuleList(self._recorders))
        code = {type(module).__module__ for layer in layers for module in layer.modules()}
        self._code = {module for module in code if module.startswith("transformers.models.")}
        self.device = torch.device("cpu")  # of the buffers
        self._wirings: dict[tuple[int, torch.dtype, torch.device], Wiring] = {}
        self._layouts: dict[tuple[int, torch.dtype], Rows] = {}

    def plain(self) -> AbstractContextManager[None]:
        """While it lasts, the class computes with torch's own operations alone."""
        return plain_functions(self._code)

    # With weights

    def embed(self, tensors: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """The rows that the first layer gets, `[B, L, C]`, for `tokens` `[B, L]`."""
        kept: list[Tensor] = []
        beside: dict[str, Tensor] = {}
        self._move_to(tokens.device)
        from_text = self._from_text

        def note(index: int, call: Call) -> Any:
            if not index:
                kept.append(call.hidden)
            beside.update({name: call.tensors[n] for n, name in from_text[index].items()})
            if not any(from_text[index + 1 :]):
                raise _Reached
            return self._handed(wiring.wires[index].template, call.hidden)

        dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
        wiring = self.wiring(tokens.shape[1], dtype, tokens.device)
        self._run(note, tensors, tokens)
        rows, hidden = self.rows(tokens.shape[1], dtype, tokens.device), kept[0]
        return rows.join(hidden, rows.empty(len(tokens), hidden.dtype, hidden.device) | beside)

    def logits(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """`[T, V]` from rows `[T, C]` after the last layer, each its own text."""
        wiring, last = self.wiring(1, x.dtype, x.device), len(self.layers) - 1
        part = self.rows(1, x.dtype, x.device).hidden
        hidden = part.unpacked(x[:, None, : part.numbers])

        def pass_on(index: int, call: Call) -> Any:
            handed = hidden if index == last else call.hidden
            return self._handed(wiring.wires[index].template, handed)

        tokens = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
        output = self._run(pass_on, self._filled_up(tensors, x.dtype), tokens)
        logits: Tensor = output.logits
        return logits[:, 0]

    def _run(
        self, seen: Callable[[int, Call], Any], tensors: Mapping[str, Tensor], tokens: Tensor
    ) -> Any:
        """The outer model over `tensors` (its own, without the layers'); `seen` stands for every
        layer. None where `seen` has ended it."""
        self._move_to(tokens.device)
        for recorder in self._recorders:
            recorder.seen = seen
        own = {self.held[name]: tensor for name, tensor in tensors.items()}
        try:
            with self.plain():
                return functional_call(
                    self.model, own, (), {"input_ids": tokens, "use_cache": False}
                )
        except _Reached:
            return None

    def _filled_up(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, seed: int = 0
    ) -> dict[str, Tensor]:
        """With stand-ins for what is not among `tensors`."""
        own = stand_ins(self.model, dtype, self.device, seed)
        return {self._stored[name]: tensor for name, tensor in own.items()} | dict(tensors)

    def _move_to(self, device: torch.device) -> None:
        """Takes the buffers of the outer model and of the layers to the device that computes."""
        if device == self.device:
            return
        with torch.inference_mode(False):  # a step that trains uses them as well
            for module in (self.model, *self.layers):
                move_buffers(module, device)
        self.device = device

    # What layers are called with

    def rows(self, length: int, dtype: torch.dtype, device: torch.device) -> Rows:
        """How a token's row is laid out, for texts of `length` tokens."""
        if (length, dtype) not in self._layouts:
            wiring, axes = self.wiring(length, dtype, device), self._axes
            tensors = {_HIDDEN: wiring.calls[0].hidden, **wiring.parts}
            parts = {
                name: Part(tuple(value.shape), *axes[name], value.dtype)
                for name, value in tensors.items()
            }
            self._layouts[length, dtype] = Rows(parts.pop(_HIDDEN), parts)
        return self._layouts[length, dtype]

    def check(self) -> None:
        """Raises ConfigProblem where what goes from layer to layer has no place in rows."""
        self.rows(TRACED, torch.float32, self.device)

    def channels(self, length: int, dtype: torch.dtype) -> int:
        """Of a row."""
        few = self.rows(TRACED, dtype, self.device)
        # masks of a long text are not made for their sake alone
        return (self.rows(length, dtype, self.device) if few.beside else few).channels(dtype)

    def wiring(self, length: int, dtype: torch.dtype, device: torch.device) -> Wiring:
        """Of one text of `length` tokens."""
        self._move_to(device)
        key = (length, dtype, device)
        if key not in self._wirings:
            wiring = self._wired(self._tokens(1, length), dtype)
            for index, call in enumerate(wiring.calls):
                wiring.calls[index] = replace(call, per_text=self._per_text[index])
                for number, name in self._from_text[index].items():
                    wiring.wires[index].takes[number] = name
                    wiring.parts[name] = call.tensors[number]
            # One length besides that of traces: masks grow with its square.
            kept = {k: w for k, w in self._wirings.items() if k[0] in (1, TRACED)}
            self._wirings = {**kept, key: wiring}
        return self._wirings[key]

    def call(self, index: int, x: Tensor) -> Call:
        """What is the same for all texts of what a layer is called with, for rows `[B, L, C]`."""
        return self.wiring(x.shape[1], x.dtype, x.device).calls[index].of(len(x))

    def arguments(self, index: int, x: Tensor, beside: Mapping[str, Tensor]) -> dict[str, Any]:
        """All that a layer is called with but hidden states. beside: the row's other parts."""
        wires = self.wiring(x.shape[1], x.dtype, x.device).wires[index]
        kwargs = self.call(index, x).filled(
            {number: beside[name] for number, name in wires.takes.items()}
        )
        for argument, lying in wires.shares.items():
            kwargs[argument] = Shared(
                {
                    key: tuple(beside[named(argument, key, n)] for n in range(len(value)))
                    for key, value in lying.items()
                }
            )
        return kwargs

    def left(
        self, index: int, x: Tensor, kwargs: Mapping[str, Any], output: Any
    ) -> dict[str, Tensor]:
        """The parts of the row that a layer has made. kwargs: of its call. output: what it handed
        on."""
        wires = self.wiring(x.shape[1], x.dtype, x.device).wires[index]
        made = {name: output[place] for place, name in wires.hands.items()}
        for argument in wires.shares:
            for key, values in kwargs[argument].items():
                made |= {named(argument, key, n): value for n, value in enumerate(values)}
        return made

    def cache_argument(self, layer: int) -> str | None:
        """The name of the argument that is a layer's KV cache; None where it has none."""
        known = inspect.signature(self.layers[layer].forward).parameters
        return next((name for name in _CACHES if name in known), None)

    # Without weights

    def on_meta(self, index: int, call: Call, wires: Wires, cached: SeenKV) -> tuple[Any, Any]:
        """What a layer hands on, and the arguments in which it may have left something, without
        numbers. cached: sees K and V."""
        hidden, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (call.hidden, call.kwargs))
        shared = {argument: Shared(lying) for argument, lying in wires.shares.items()}
        kwargs |= shared
        if name := self.cache_argument(index):
            kwargs[name] = KVCache(cached, self.config)
        layer = self.layers[index]
        buffers = {name: b.to("meta") for name, b in layer.named_buffers()}
        try:
            with torch.no_grad(), self.plain():
                output = functional_call(layer, buffers, hidden, kwargs)
        except Exception as error:  # whatever a class does with what the meta device cannot give
            raise self._unfollowed(error) from error
        return output, shared

    def _wired(self, tokens: Tensor, dtype: torch.dtype, seed: int = 0) -> Wiring:
        """A pass of the outer model without weights. Raises ConfigProblem where it does more
        between its layers than hand on what they do."""
        wiring, tuples, alive = Wiring(), self._hands_tuples, list[Any]()
        makers: dict[int, tuple[int, int]] = {}  # a tensor that was handed on -> layer and place
        lying: dict[str, dict[Any, tuple[Tensor, ...]]] = {}
        known: dict[Hashable, tuple[Any, Any]] = {}

        def note(index: int, call: Call) -> Any:
            if wiring.calls and not _alike(call.hidden, wiring.calls[-1].hidden):
                raise ConfigProblem(f"{self.name} changes what goes from layer to layer")
            wires = Wires(shares={name: dict(lying.get(name, {})) for name in _shared_by(call)})
            for number, value in enumerate(call.tensors):
                if id(value) in makers:
                    maker, place = makers[id(value)]
                    if maker != index - 1:
                        raise ConfigProblem(
                            f"layers of {self.name} hand on more than hidden states to layers that"
                            " are not the next, which the pipeline does not follow yet"
                        )
                    name = f"handed on {place}"
                    wires.takes[number] = wiring.wires[maker].hands[place] = name
                    wiring.parts[name] = value
            wiring.calls.append(call)
            wiring.wires.append(wires)
            if tuples or wires.shares:
                kind = self._kinds[index], len(call.tensors), *map(str, wires.shares.values())
                if kind not in known:
                    known[kind] = self.on_meta(index, call, wires, lambda k, v: (k, v))
                output, shared = known[kind]
                for argument, values in shared.items():
                    lying[argument] = dict(values)
                    for key, tensors in values.items():
                        for n, tensor in enumerate(tensors):
                            wiring.parts[named(argument, key, n)] = tensor
                if isinstance(output, tuple):
                    wires.template = (None, *map(_placeholder, output[1:]))
                    alive.append(wires.template)
                    for place, value in enumerate(wires.template):
                        if isinstance(value, Tensor):
                            makers[id(value)] = index, place
            if len(wiring.calls) == len(self.layers):
                raise _Reached
            return self._handed(wires.template, call.hidden)

        self._pass(note, tokens, dtype, seed)
        if len(wiring.calls) != len(self.layers):
            raise ConfigProblem(
                f"{self.name} runs {len(wiring.calls)} of its {len(self.layers)} layers"
            )
        return wiring

    def _pass(
        self, seen: Callable[[int, Call], Any], tokens: Tensor, dtype: torch.dtype, seed: int = 0
    ) -> None:
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._run(seen, self._filled_up({}, dtype, seed), tokens)
        except ConfigProblem:
            raise
        except Exception as error:  # whatever a class does with weights that are not there
            raise self._unfollowed(error) from error

    @staticmethod
    def _handed(template: tuple[Any, ...] | None, hidden: Tensor) -> Any:
        """What stands for a layer's output."""
        return hidden if template is None else (hidden, *template[1:])

    def _tokens(self, texts: int, length: int, step: int = 7) -> Tensor:
        """Any tokens."""
        most = self.model.get_input_embeddings().weight.shape[0]
        tokens = (torch.arange(length, device=self.device) * step + 3) % most
        return tokens.expand(texts, -1)

    @cached_property
    def _kinds(self) -> list[Hashable]:
        return [kind_of(layer) for layer in self.layers]

    @cached_property
    def _hands_tuples(self) -> bool:
        calls: list[Call] = []

        def first(index: int, call: Call) -> Any:
            calls.append(call)
            raise _Reached

        self._pass(first, self._tokens(1, TRACED), torch.float32)
        if not calls:
            raise ConfigProblem(f"{self.name} runs none of its {len(self.layers)} layers")
        wires = Wires(shares={name: {} for name in _shared_by(calls[0])})
        return isinstance(self.on_meta(0, calls[0], wires, lambda k, v: (k, v))[0], tuple)

    @cached_property
    def _tried(self) -> tuple[Wiring, Wiring, Wiring]:
        """A few tokens of one text; other tokens, over other weights; the first text twice."""
        return (
            self._wired(self._tokens(1, TRACED), torch.float32),
            self._wired(self._tokens(1, TRACED, 5), torch.float32, 1),
            self._wired(self._tokens(2, TRACED), torch.float32),
        )

    @cached_property
    def _from_text(self) -> list[dict[int, str]]:
        """Of each layer: which tensors of its arguments follow from the text or from the outer
        model's weights, and are a part of the row."""
        names: dict[int, str] = {}
        one, other, _ = self._tried
        return [
            {
                n: names.setdefault(id(a.tensors[n]), f"from the text {index} {n}")
                for n in sorted(a.differing(b))
                if n not in wires.takes
            }
            for index, (a, b, wires) in enumerate(
                zip(one.calls, other.calls, one.wires, strict=True)
            )
        ]

    @cached_property
    def _per_text(self) -> list[frozenset[int]]:
        """Of each layer: which tensors of its arguments have rows for each text, whatever it is."""
        one, _, both = self._tried
        found = []
        for index, (a, b) in enumerate(zip(one.calls, both.calls, strict=True)):
            carried = one.wires[index].takes.keys() | self._from_text[index].keys()
            found.append(a.differing(b) - carried)
            if replace(a, per_text=found[-1]).of(2).differing(b) - carried:
                raise ConfigProblem(
                    f"what layers of {self.name} are called with depends on how many texts there"
                    " are, which the pipeline does not follow yet"
                )
        return found

    @cached_property
    def _axes(self) -> dict[str, tuple[int, int]]:
        """Of hidden states and of the row's other parts: the axes of texts and of tokens."""
        one, _, both = self._tried
        longer = self._wired(self._tokens(1, OTHER), torch.float32)
        shapes: list[dict[str, Tensor]] = []
        for wiring in (one, both, longer):
            shapes.append({_HIDDEN: wiring.calls[0].hidden, **wiring.parts})
            for index, names in enumerate(self._from_text):
                for n, name in names.items():
                    shapes[-1][name] = wiring.calls[index].tensors[n]
        axes = {}
        for name, value in shapes[0].items():
            sizes = list(zip(value.shape, *(s[name].shape for s in shapes[1:]), strict=True))
            texts = [axis for axis, (n, twice, _) in enumerate(sizes) if (n, twice) == (1, 2)]
            tokens = [axis for axis, (n, _, m) in enumerate(sizes) if (n, m) == (TRACED, OTHER)]
            if not texts or not tokens:
                raise ConfigProblem(
                    f"what layers of {self.name} get besides hidden states has no part for each"
                    " token, which the pipeline does not follow yet"
                )
            axes[name] = texts[0], tokens[0]
        return axes

    def _unfollowed(self, error: Exception) -> ConfigProblem:
        reason = " ".join(str(error).split())[:200]
        return ConfigProblem(f"{self.name} of transformers cannot be followed here ({reason})")


_HIDDEN = "hidden"


def _shared_by(call: Call) -> list[str]:
    """Arguments that are there for layers to leave something in."""
    return [
        name
        for name, value in call.kwargs.items()
        if isinstance(value, MutableMapping) and not value
    ]


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _placeholder(value: Any) -> Any:
    """What stands for a layer's output beside hidden states: it takes no room."""
    if not isinstance(value, Tensor):
        return value
    return torch.zeros((), dtype=value.dtype).expand(value.shape)
