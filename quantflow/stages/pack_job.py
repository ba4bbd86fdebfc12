"""One checkpoint to write: of what, in which schemes, into what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.formats.base import ConfigRequest, Format
from quantflow.models.segments import LinearSpec
from quantflow.quant.scheme import Scheme

Held = Mapping[int, Mapping[str, Scheme]]  # layer -> name in the layer -> scheme


@dataclass(frozen=True)
class PackJob:
    """One checkpoint to write. schemes: layer -> relative name -> scheme. outer: module -> scheme
    of what is quantised outside the layers. has_index: tensors carry a group index. ranks: how many
    there will be; rank, tp: which one this is, of how many, where it is not the whole. kv: what the
    checkpoint holds of the KV cache: a workspace int8 parameters, `[]` or `[ranks]`; others scales,
    `[1]`, of the kind kv_scales, one of the format's own.
    plain: quantised linears for which the format has no place: they are written as numbers of the
    model's dtype. unpacked: weights outside the layers that the source holds quantised and the
    format does not. rounded: what a dtype does not hold exactly is rounded."""

    checkpoint: Checkpoint
    format: Format
    schemes: Held
    default: Scheme
    max_shard_bytes: int
    has_index: bool = False
    ranks: int = 1
    rank: int = 0
    tp: int = 1
    kv: Mapping[str, Tensor] | None = None
    kv_scales: str | None = None
    outer: Mapping[str, Scheme] = field(default_factory=dict)
    unpacked: frozenset[str] = frozenset()
    rounded: bool = False
    plain: Held = field(default_factory=dict)

    def held(self, layer: int) -> Mapping[str, Scheme]:
        """Of a layer's linears, those that are quantised where they come from."""
        return {**self.schemes.get(layer, {}), **self.plain.get(layer, {})}

    @property
    def modules(self) -> dict[str, Scheme]:
        """The scheme of every quantised module by its full name, those outside the layers last."""
        prefixes = {
            index: self.checkpoint.architecture.layer_prefix(index) for index in self.schemes
        }
        return {
            f"{prefixes[i]}.{name}": scheme
            for i, layer in self.schemes.items()
            for name, scheme in layer.items()
        } | dict(self.outer)

    @cached_property
    def request(self) -> ConfigRequest:
        """What its configuration is to say."""
        dtype, modules = self.checkpoint.config.dtype, self.modules
        modules |= {self.checkpoint.held(name): scheme for name, scheme in modules.items()}
        return ConfigRequest(
            modules, self._ignored(), self.default, self.kv_scales, self.has_index, dtype
        )

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What engines are known not to load of it, each in a sentence. It is right all the same,
        and is written. And what has no place in it."""
        doubts = tuple(f"{self.format.name}, {doubt}" for doubt in self.format.doubts(self.request))
        if lost := [name for name in self.checkpoint.copied if name not in self.copied]:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            doubts += (
                f"{self.format.name} leaves out what it has no place for: {lost[0]}{more}, which is"
                f" {self.checkpoint.copied[lost[0]]}",
            )
        return doubts

    @property
    def copied(self) -> tuple[str, ...]:
        """Native names of what is beside the decoder and is written as it is."""
        return tuple(self.checkpoint.copied) if self.format.container == "directory" else ()

    def linears(self) -> dict[str, LinearSpec]:
        """Every linear of the layers, by its full name."""
        checkpoint = self.checkpoint
        return {
            f"{checkpoint.architecture.layer_prefix(index)}.{name}": spec
            for index in range(checkpoint.config.layers)
            for name, spec in checkpoint.linears(index).items()
        }

    def quantization_config(self) -> dict[str, Any]:
        """The `quantization_config`; {} where nothing is quantised. Raises FormatError for what the
        format cannot say."""
        return self.format.quantization_config(self.request) if self.modules else {}

    def _ignored(self) -> list[str]:
        """The linears that stay as they are: the head, those of the layers, also what is in no
        segment, and whatever has a matrix beside the decoder."""
        checkpoint, modules = self.checkpoint, self.modules
        architecture = checkpoint.architecture
        head = architecture.head
        ignored = [] if head in modules else [head, checkpoint.held(head)]
        for index in range(checkpoint.config.layers):
            prefix = architecture.layer_prefix(index)
            joined = checkpoint.joined_linears(index, self.format.name)
            for linear in (*checkpoint.linears(index), *checkpoint.unsegmented(index)):
                module = f"{prefix}.{linear}"
                if module in modules:
                    continue
                if linear in joined:  # in the module that holds all experts
                    module = module.rsplit(".", 2)[0]
                # transformers looks for the name that its class has
                ignored += (module, checkpoint.held(module))
        # linears around the layers; of a table there is none but the head
        around = checkpoint.outer_names() if architecture.library else ()
        for name in (*around, *self.copied):
            module = name.removesuffix(".weight")
            if module in (name, architecture.embedding) or module in modules:
                continue
            if len(checkpoint.shape_of(name)) > 1:
                ignored += (module, checkpoint.held(module))
        return list(dict.fromkeys(ignored))
