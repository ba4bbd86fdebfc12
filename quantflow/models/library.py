"""A family that has no table here: its class in the transformers library says what it is.

The class is built from config.json's values alone, its parameters on the meta device: nothing of
the model directory is executed, and no weight is read. One pass of the outer model with a recorder
in each layer's place gives what each layer is called with (masks by layer type, position
embeddings); one pass of a layer over a few tokens, without weights, shows which linears read the
same tensor.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from quantflow.models.architecture import Joined, Source
from quantflow.models.calls import Call, Recorder, stand_ins
from quantflow.models.composite import beside, language_model, whose
from quantflow.models.config import ConfigProblem, DecoderConfig
from quantflow.models.experts import experts_of, take_apart
from quantflow.models.library_class import build, layer_list, move_buffers
from quantflow.models.plain import plain_functions
from quantflow.models.segments import Segment
from quantflow.models.stored_names import StoredNames
from quantflow.models.trace import KVCache, SeenKV, Trace, Visits, kind_of

TRACED = 8  # tokens of the pass that finds a layer's segments
# The argument that is the cache.
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


class _Reached(Exception):
    """Ends a pass of the outer model: what was wanted has been seen."""


class Library:
    """A model class of transformers, without weights. Raises ConfigProblem where the class refuses
    the config, or is none that is looked after.

    model: the outer model, with recorders for layers. layers: the layers themselves, their experts
    one by one (`experts.py`). prefix: where they are in the model; stored_prefix, in a checkpoint,
    as all names are that leave this class. held: a tensor's name in a checkpoint -> in the class.
    state: shapes of the language model's. beside: of others, by their names in the class. config:
    the language model's.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.model, self.config = build(values)
        self.name = type(self.model).__name__
        inside = language_model(self.model)
        self.prefix, self.layers = layer_list(self.model, self.config, inside)
        kinds = {type(module) for module in self.layers[0].modules()}
        if Conv1D in kinds and nn.Linear not in kinds:
            raise ConfigProblem(
                f"layers of {self.name} hold their weights transposed, inputs before outputs"
                " (transformers' Conv1D), and no loader knows quantised ones of such"
            )
        self.names = StoredNames(self.model)
        self.beside = beside(self.model)
        self.experts = take_apart(self.layers, self.prefix, self.names, self.name)
        state = self.model.state_dict(keep_vars=True)
        self.held = {self.names.stored(name): name for name in state}
        self.state = {
            name: tuple(state[held].shape)
            for name, held in self.held.items()
            if held not in self.beside
        }
        self.stored_prefix = self._stored(f"{self.prefix}.0").removesuffix(".0")
        self._recorders = [Recorder(layer, i) for i, layer in enumerate(self.layers)]
        parent, _, leaf = self.prefix.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, nn.ModuleList(self._recorders))
        self._code = {type(m).__module__ for layer in self.layers for m in layer.modules()}
        self._device = torch.device("cpu")  # of the buffers
        self._calls: dict[tuple[int, torch.dtype, torch.device], list[Call]] = {}
        self._kinds: dict[Hashable, Trace] = {}
        self._traces: dict[int, Trace] = {}
        self._inside: dict[int, dict[str, str]] = {}
        self._beside_is_set = False

    def _stored(self, module: str) -> str:
        """A module's name in a checkpoint."""
        return self.names.stored(f"{module}.weight").removesuffix(".weight")

    @cached_property
    def _stored_names(self) -> dict[str, str]:
        """A tensor's name in the class -> in a checkpoint."""
        return {own: name for name, own in self.held.items()}

    @property
    def version(self) -> str:
        """What computes it."""
        return f"transformers {transformers.__version__}"

    @cached_property
    def outer(self) -> dict[str, str]:
        """`embedding` and `head` -> the module's name in a checkpoint."""
        names = {module: name for name, module in self.model.named_modules()}
        modules = {
            "embedding": self.model.get_input_embeddings(),
            "head": self.model.get_output_embeddings(),
        }
        if None in modules.values():
            raise ConfigProblem(f"{self.name} of transformers has no embedding and head")
        return {kind: self._stored(names[module]) for kind, module in modules.items()}

    @property
    def hidden(self) -> int:
        """Channels of the hidden states."""
        return self.state[f"{self.outer['embedding']}.weight"][1]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight

    def expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of a checkpoint; a tied head is left out."""
        skipped = f"{self.outer['head']}.weight" if self.tied else None
        return ((name, shape) for name, shape in self.state.items() if name != skipped)

    def ignores(self, name: str) -> bool:
        """Whether the class passes over such a tensor of a checkpoint without a word."""
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, self.names.held(name)) for pattern in patterns)

    def part(self, name: str) -> str | None:
        """The part of the class, such as `vision_tower`, that a checkpoint's tensor beside the
        language model belongs to; None for any other."""
        held = self.names.loaded(name)[0]
        return whose(held, self.model.base_model_prefix) if held in self.beside else None

    def segments(self, layer: int) -> tuple[Segment, ...]:
        return self.trace(layer).segments

    def apart(self, layer: int, name: str) -> str:
        """Why a layer's matrix is no weight of its segments."""
        if name.removesuffix(".weight") in self.trace(layer).uncalled:
            return "a linear that its layer does not call"
        owner = self.layers[layer]
        for part in self.inside(layer)[name].split(".")[:-1]:
            owner = getattr(owner, part, owner)
        return f"a weight of {type(owner).__name__}, which is no linear"

    def plain(self) -> AbstractContextManager[None]:
        """While it lasts, the class computes with torch's own operations alone."""
        return plain_functions(self._code)

    # The outer model

    def run(
        self, seen: Callable[[int, Call], Tensor], tensors: Mapping[str, Tensor], **inputs: Tensor
    ) -> Any:
        """The outer model over `tensors` (its own, without the layers'); `seen` stands for every
        layer. None where `seen` has ended it."""
        self._move_to(next(iter(inputs.values())).device)
        for recorder in self._recorders:
            recorder.seen = seen
        try:
            own = {self.held[name]: tensor for name, tensor in tensors.items()}
            with self.plain():
                return functional_call(self.model, own, (), {**inputs, "use_cache": False})
        except _Reached:
            return None

    def embed(self, tensors: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """What the first layer gets, `[B, L, H]`, for `tokens` `[B, L]`."""
        kept: list[Tensor] = []

        def first(index: int, call: Call) -> Tensor:
            kept.append(call.hidden)
            raise _Reached

        self.run(first, tensors, input_ids=tokens)
        return kept[0]

    def logits(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """`[T, V]` from hidden states `[T, H]` after the last layer, each its own text."""
        rows = x[:, None]
        last = len(self.layers) - 1
        self._set_beside()
        output = self.run(
            lambda index, call: rows if index == last else call.hidden,
            tensors,
            inputs_embeds=torch.zeros_like(rows),
        )
        logits: Tensor = output.logits
        return logits[:, 0]

    def call(self, index: int, x: Tensor) -> Call:
        """What a layer is called with where its hidden states are `x` `[B, L, H]`."""
        return self.calls(x.shape[1], x.dtype, x.device)[index].of(len(x))

    def calls(self, length: int, dtype: torch.dtype, device: torch.device) -> list[Call]:
        """What each layer is called with, for one text of `length` tokens."""
        self._move_to(device)
        key = (length, dtype, device)
        if key not in self._calls:
            start = torch.zeros(1, length, self.hidden, dtype=dtype, device=device)
            # One length besides that of traces: masks grow with its square.
            kept = {other: calls for other, calls in self._calls.items() if other[0] == TRACED}
            new = [
                Call(call.hidden, call.args, call.kwargs, plain.per_text)
                for call, plain in zip(self._called_with(start), self._plain_calls, strict=True)
            ]
            self._calls = {**kept, key: new}
        return self._calls[key]

    def _move_to(self, device: torch.device) -> None:
        """Takes the buffers of the outer model and of the layers to the device that computes."""
        if device == self._device:
            return
        with torch.inference_mode(False):  # a step that trains uses them as well
            for module in (self.model, *self.layers):
                move_buffers(module, device)
        self._device = device

    def _passed(self, start: Tensor, seen: Callable[[int, Call], Tensor]) -> None:
        """A pass of the outer model where `start` is embedded, without weights."""
        if "inputs_embeds" not in inspect.signature(self.model.forward).parameters:
            raise ConfigProblem(
                f"{self.name} of transformers takes a text by its tokens alone, not embedded, which"
                " the pipeline does not follow yet"
            )
        try:
            with torch.inference_mode(False), torch.no_grad():
                own, stored = stand_ins(self.model, start.dtype, self._device), self._stored_names
                tensors = {stored[name]: tensor for name, tensor in own.items()}
                self.run(seen, tensors, inputs_embeds=start.clone())  # some scale it in place
        except ConfigProblem:
            raise
        except Exception as error:  # whatever a class does with tokens that are not there
            raise self._unfollowed(error) from error

    def _called_with(self, start: Tensor) -> list[Call]:
        """What each layer is called with where `start` is embedded. Raises ConfigProblem where the
        outer model does more between its layers than hand the hidden states on."""
        self._set_beside()
        calls: list[Call] = []
        beside = {id(value) for value in self._recorders[0].beside or () if value is not None}

        def note(index: int, call: Call) -> Tensor:
            if calls and call.hidden is not calls[-1].hidden:
                raise ConfigProblem(f"{self.name} changes what goes from layer to layer")
            if any(id(value) in beside for value in call.tensors):
                raise ConfigProblem(
                    f"layers of {self.name} hand on more than hidden states to later ones, which"
                    " the pipeline does not follow yet"
                )
            calls.append(call)
            if len(calls) == len(self.layers):
                raise _Reached
            return call.hidden

        self._passed(start, note)
        if len(calls) != len(self.layers):
            raise ConfigProblem(f"{self.name} runs {len(calls)} of its {len(self.layers)} layers")
        return calls

    def _set_beside(self) -> None:
        """Tells the recorders what a layer hands on beside the hidden states: what the first one
        does, on what it is called with."""
        if self._beside_is_set:
            return
        calls: list[Call] = []

        def first(index: int, call: Call) -> Tensor:
            calls.append(call)
            raise _Reached

        self._passed(torch.zeros(1, TRACED, self.hidden, device=self._device), first)
        if not calls:
            raise ConfigProblem(f"{self.name} runs none of its {len(self.layers)} layers")
        result = self._on_meta(0, calls[0], lambda k, v: (k, v))
        if isinstance(result, tuple):
            stand_in = tuple(
                torch.zeros(1) if isinstance(value, Tensor) else None for value in result[1:]
            )
            for recorder in self._recorders:
                recorder.beside = stand_in
        self._beside_is_set = True

    def _unfollowed(self, error: Exception) -> ConfigProblem:
        reason = " ".join(str(error).split())[:200]
        return ConfigProblem(f"{self.name} of transformers cannot be followed here ({reason})")

    def cache_argument(self, layer: int) -> str | None:
        """The name of the argument that is a layer's KV cache; None where it has none."""
        known = inspect.signature(self.layers[layer].forward).parameters
        return next((name for name in _CACHES if name in known), None)

    # A layer

    def trace(self, layer: int) -> Trace:
        """How a layer goes; layers of the same modules, with the same settings, go alike."""
        if layer not in self._traces:
            kind = kind_of(self.layers[layer])
            if kind not in self._kinds:
                self._kinds[kind] = self._traced(layer)
            self._traces[layer] = self._kinds[kind]
        return self._traces[layer]

    def inside(self, layer: int) -> Mapping[str, str]:
        """Of a layer's tensors: name in a checkpoint -> in the class, relative to the layer."""
        if layer not in self._inside:
            stored, held = f"{self.stored_prefix}.{layer}.", f"{self.prefix}.{layer}."
            self._inside[layer] = {
                name.removeprefix(stored): own.removeprefix(held)
                for name, own in self.held.items()
                if own.startswith(held)
            }
        return self._inside[layer]

    def module(self, layer: int, name: str) -> nn.Module:
        """A linear or a norm of a layer, by its name in a checkpoint, relative to the layer."""
        own = self.inside(layer)[f"{name}.weight"].removesuffix(".weight")
        return self.layers[layer].get_submodule(own)

    def sources(
        self, name: str, shape: tuple[int, ...], config: DecoderConfig
    ) -> dict[str, Source] | None:
        """Where the tensors lie in a checkpoint's tensor; None for one that the class does not
        know."""
        held = self.names.held(name)
        for spelled in (held, *(self.names.loaded(name) if self.beside else ())):
            if (own := self.names.stored(spelled)) in self.state:
                return {own: Source(name)}
            if fused := self._experts_in(spelled, name, shape):
                return fused
        return None

    def _experts_in(self, held: str, name: str, shape: tuple[int, ...]) -> dict[str, Source]:
        """Single experts' tensors in the class's tensor `held`, which is `name` in a checkpoint;
        none where it is another tensor, or has another shape."""
        layer, _, inside = held.removeprefix(f"{self.prefix}.").partition(".")
        if not layer.isdecimal() or int(layer) >= len(self.layers):
            return {}
        path, _, tensor = inside.rpartition(".")
        return {
            self.names.stored(f"{self.prefix}.{layer}.{part}"): replace(place, name=name)
            for experts in experts_of(self.layers[int(layer)])
            if experts.path == path and tensor in experts.layout.tensors
            for part, place in experts.parts(tensor, shape).items()
        }

    def joined(self, layer: int) -> tuple[Joined, ...]:
        """Tensors in which a checkpoint holds all of a layer's experts."""
        return tuple(
            Joined(
                self.names.stored(f"{self.prefix}.{layer}.{experts.path}.{tensor}"),
                experts.shape(tensor),
                {
                    self.names.stored(f"{self.prefix}.{layer}.{part}"): place
                    for part, place in experts.parts(tensor).items()
                },
                experts.named_in,
            )
            for experts in experts_of(self.layers[layer])
            if not experts.apart
            for tensor in experts.layout.tensors
        )

    def _traced(self, index: int) -> Trace:
        layer = self.layers[index]
        call, visits = self._plain_calls[index], Visits(layer)
        with visits:
            self._on_meta(index, call, visits.cached)
        return visits.result(self._cut, partial(self._stored_inside, index))

    def _stored_inside(self, layer: int, module: str) -> str:
        """A module's name in a checkpoint, relative to the layer, of that in the class."""
        whole = self._stored(f"{self.prefix}.{layer}.{module}")
        return whole.removeprefix(f"{self.stored_prefix}.{layer}.")

    def _on_meta(self, index: int, call: Call, cached: SeenKV) -> Any:
        """What a layer hands on, without numbers. cached: sees K and V."""
        hidden, args, kwargs = tree_map_only(
            Tensor, lambda t: t.to("meta"), (call.hidden, call.args, call.kwargs)
        )
        if name := self.cache_argument(index):
            kwargs[name] = KVCache(cached, self.config)
        layer = self.layers[index]
        buffers = {name: b.to("meta") for name, b in layer.named_buffers()}
        try:
            with torch.no_grad(), self.plain():
                return functional_call(layer, buffers, (hidden, *args), kwargs)
        except Exception as error:  # whatever a class does with what the meta device cannot give
            raise self._unfollowed(error) from error

    @cached_property
    def _plain_calls(self) -> list[Call]:
        """What each layer is called with for a few tokens. Raises ConfigProblem where that is more
        than the number and the length of texts say."""
        generator = torch.Generator().manual_seed(0)
        first, other, both = (
            self._called_with(
                torch.randn(texts, TRACED, self.hidden, generator=generator).to(self._device)
            )
            for texts in (1, 1, 2)
        )
        if any(isinstance(v, dict | list) for c in first for v in (*c.args, *c.kwargs.values())):
            raise ConfigProblem(
                f"layers of {self.name} share what they make with later ones, which the pipeline"
                " does not follow yet"
            )
        if any(one.differing(two) for one, two in zip(first, other, strict=True)):
            raise ConfigProblem(
                f"what layers of {self.name} are called with depends on the text, which the"
                " pipeline does not follow yet"
            )
        plain = [
            Call(one.hidden, one.args, one.kwargs, one.differing(two))
            for one, two in zip(first, both, strict=True)
        ]
        if any(one.of(2).differing(two) for one, two in zip(plain, both, strict=True)):
            raise ConfigProblem(
                f"what layers of {self.name} are called with depends on how many texts there are,"
                " which the pipeline does not follow yet"
            )
        return plain

    def _cut(self, name: str) -> int | None:
        """Which dimension of a layer's linear tensor parallelism divides, by the class's own
        plan."""
        plan: Mapping[str, str] = getattr(self.model, "_tp_plan", None) or {}
        for experts in self.experts:
            if (tensor := experts.tensor_of(name)) and f"{self.prefix}.*.{tensor}" in plan:
                return 1 if tensor.endswith("down_proj") else 0
        how = plan.get(f"{self.prefix}.*.{name}", "")
        return 0 if how == "colwise" else 1 if how == "rowwise" else None
