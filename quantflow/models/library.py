"""A family that has no table here: its class in the transformers library says what it is.

The class is built from config.json's values alone, its parameters on the meta device: nothing of
the model directory is executed, and no weight is read. One pass of the outer model with a recorder
in each layer's place gives what each layer is called with (masks by layer type, position
embeddings); one pass of a layer over a few tokens, without weights, shows which linears read the
same tensor.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantflow.models.architecture import Joined, Source
from quantflow.models.composite import beside, language_model, whose
from quantflow.models.config import ConfigProblem, DecoderConfig
from quantflow.models.experts import experts_of, take_apart
from quantflow.models.frame import TRACED, Frame
from quantflow.models.library_class import build, layer_list
from quantflow.models.segments import Segment
from quantflow.models.stored_names import StoredNames
from quantflow.models.trace import Trace, Visits, kind_of


class _Reached(Exception):
    """Ends a pass of the outer model: what was wanted has been seen."""


class Library:
    """A model class of transformers, without weights. Raises ConfigProblem where the class refuses
    the config, or is none that is looked after.

    model: the outer model, with recorders for layers. layers: the layers themselves, their experts
    one by one (`experts.py`). prefix: where they are in the model; stored_prefix, in a checkpoint,
    as all names are that leave this class. held: a tensor's name in a checkpoint -> in the class.
    together: in the class, what is several there. state: shapes of the language model's. beside: of
    others, by their names in the class. config: the language model's.
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
        places: dict[int, str] = {}
        for name, tensor in state.items():
            if name.startswith(f"{self.prefix}.") and places.setdefault(id(tensor), name) != name:
                raise ConfigProblem(
                    f"layers of {self.name} share weights ({places[id(tensor)]} is {name} too),"
                    " which the pipeline does not follow yet"
                )
        parts = {own: self.names.parts(own, tensor) for own, tensor in state.items()}
        self.held = {name: own for own, names in parts.items() for name in names}
        self.together = tuple(own for own, names in parts.items() if len(names) > 1)
        self.state = {
            name: shape
            for own, names in parts.items()
            for name, shape in names.items()
            if own not in self.beside
        }
        self.stored_prefix = self._stored(f"{self.prefix}.0").removesuffix(".0")
        self.frame = Frame(self.model, self.config, self.layers, self.prefix, self.held)
        self._kinds: dict[Hashable, Trace] = {}
        self._traces: dict[int, Trace] = {}
        self._inside: dict[int, dict[str, str]] = {}

    def _stored(self, module: str) -> str:
        """A module's name in a checkpoint."""
        return self.names.stored(f"{module}.weight").removesuffix(".weight")

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

    @cached_property
    def outer_linears(self) -> tuple[str, ...]:
        """Linears outside the layers, but the head, by their names in a checkpoint."""
        names = (
            self._stored(name)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        )
        own = (name for name in names if f"{name}.weight" in self.state)
        return tuple(name for name in own if name != self.outer["head"])

    @cached_property
    def tables(self) -> frozenset[str]:
        """Weights outside the layers that are looked up by tokens, by their names in a
        checkpoint: what comes after the layers needs none but a tied head."""
        return frozenset(
            f"{self._stored(name)}.weight"
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding)
        )

    @property
    def hidden(self) -> int:
        """Channels of the hidden states."""
        return self.frame.wiring(TRACED, torch.float32, self.frame.device).calls[0].hidden.shape[-1]

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
        if why := self.trace(layer).left.get(name.removesuffix(".weight")):
            return why
        owner = self.layers[layer]
        for part in self.inside(layer)[name].split(".")[:-1]:
            owner = getattr(owner, part, owner)
        return f"a weight of {type(owner).__name__}, which is no linear"

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
                experts.stored_shape(tensor),
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
        wiring = self.frame.wiring(TRACED, torch.float32, self.frame.device)
        visits = Visits(layer)
        with visits:
            self.frame.on_meta(index, wiring.calls[index], wiring.wires[index], visits.cached)
        return visits.result(self._cut, partial(self._stored_inside, index))

    def _stored_inside(self, layer: int, module: str) -> str:
        """A module's name in a checkpoint, relative to the layer, of that in the class."""
        whole = self._stored(f"{self.prefix}.{layer}.{module}")
        return whole.removeprefix(f"{self.stored_prefix}.{layer}.")

    def _cut(self, name: str) -> int | None:
        """Which dimension of a layer's linear tensor parallelism divides, by the class's own
        plan."""
        plan: Mapping[str, str] = getattr(self.model, "_tp_plan", None) or {}
        for experts in self.experts:
            if (tensor := experts.tensor_of(name)) and f"{self.prefix}.*.{tensor}" in plan:
                return 1 if tensor.endswith("down_proj") else 0
        how = plan.get(f"{self.prefix}.*.{name}", "")
        return 0 if how == "colwise" else 1 if how == "rowwise" else None
