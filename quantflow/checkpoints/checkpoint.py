"""A lazy reader of a model directory: its config, tokenizer files and tensors, one at a time.
Nothing in it is executed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantflow.checkpoints.container import open_container
from quantflow.checkpoints.directory import Directory
from quantflow.checkpoints.gguf.file import gguf_file
from quantflow.checkpoints.hub_cache import snapshot
from quantflow.checkpoints.tensor_file import same_tensor
from quantflow.checkpoints.tensor_problems import FLOATS, tensor_problems
from quantflow.errors import ModelError, Problem
from quantflow.models.architecture import COMPUTED_TENSORS, Architecture, Joined, Source
from quantflow.models.beyond import why_copied
from quantflow.models.config import ConfigProblem, DecoderConfig, stretched
from quantflow.models.expected import expected_tensors
from quantflow.models.prefixes import own_names
from quantflow.models.registry import family
from quantflow.models.segments import LinearSpec, Role, Segment, segments
from quantflow.models.sharding import shard_shape
from quantflow.models.spelling import settled, untied
from quantflow.paths import absent

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def resolve_model(model: str) -> Path:
    """The directory of a model: a local one, one in the hub's cache, or a hub id downloaded
    (weights and tokenizer only, no code).

    Raises ModelError, which says how to go on without the hub.
    """
    path = snapshot(Path(model).expanduser())
    if path.is_dir():
        return path
    if path.exists():
        if gguf_file(path):
            return path
        inside = path.suffix == ".safetensors" or path.name == "config.json"
        hint = f"Give the directory that it is in: {path.parent}" if inside else ""
        raise ModelError(Problem(model, "a file", "a model directory, or a .gguf file", hint))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise ModelError(
            Problem(
                model,
                absent(path, "directory"),
                "a model directory or a hub id such as internlm/internlm-chat-7b",
            )
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                model,
                allow_patterns=[
                    "*.json",
                    "*.safetensors",
                    "*.model",
                    "*.txt",
                    "*.tiktoken",
                    "*.jinja",
                ],
            )
        )
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(
            Problem(
                model,
                f"no such directory, and the hub could not give it ({reason})",
                hint="Download it and pass --model DIR",
            )
        ) from error


class Checkpoint:
    """A model directory. The constructor reads config.json and the safetensors headers, and no
    weight but two that may be one: the embedding and the head, where they are said to be tied and
    both are there, and a tensor that stands in two files. Such are compared up to where they
    differ, and those that do not once in a process.

    config_only: the weight files need not be there; `shape_of` then answers from the config. tp:
    the files hold one of that many tensor-parallel ranks. Raises ModelError for a config that
    cannot be followed; `problems` says what is wrong with the tensors.

    config, raw_config: as the tensors bear them out: not tied where the head is another than the
    embedding. Every tensor of the source is either in `sources` (native name -> where it lies) or
    in `left_out` (source name -> why). copied: those of `sources` that are written as they are,
    whatever becomes of the model (native name -> why). twice: a native tensor that two source
    tensors hold, and these. remarks: what is odd about this one, and what was made of it.
    """

    def __init__(self, path: Path, *, config_only: bool = False, tp: int = 1) -> None:
        self.path, self.tp = path, tp
        self.container = open_container(path, config_only=config_only)
        try:
            self.architecture: Architecture = family(self.container.config, path)
            # A class of transformers settles for itself what stands twice.
            self.raw_config, overruled = (
                (dict(self.container.config), ())
                if self.architecture.library
                else settled(self.container.config, layered_rope=self.architecture.layered_rope)
            )
            self.config: DecoderConfig = self.architecture.read_config(self.raw_config)
        except ConfigProblem as error:
            raise ModelError(Problem(f"{path}/config.json", str(error))) from error
        if isinstance(self.container, Directory):
            self.container = self.container.renamed(
                own_names(self.container.tensors, self.architecture, path)
            )
        self.config_only = config_only
        overruled += tuple(stretched(self.config))
        self.remarks: tuple[str, ...] = self.container.notes + overruled
        self.sources: dict[str, Source] = {}
        self.copied: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self._segments: dict[Hashable, tuple[Segment, ...]] = {}
        self._linears: dict[Hashable, dict[str, LinearSpec]] = {}
        self.twice: list[tuple[str, str, str]] = []
        self._account()
        self.quantization: dict[str, Any] | None = self.raw_config.get("quantization_config")
        if self.quantization is not None and not isinstance(self.quantization, dict):
            raise ModelError(
                Problem(
                    f"{path}/config.json quantization_config",
                    repr(self.quantization)[:80],
                    "a JSON object",
                )
            )

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return self.container.files

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the family, and of how the tensors are stored."""
        return (*self.architecture.notes, *self.remarks)

    @property
    def tokenizer_path(self) -> Path:
        """The directory of the tokenizer's files."""
        return self.container.tokenizer

    @property
    def source_names(self) -> list[str]:
        return sorted(self.container.tensors)

    def read_source(self, name: str) -> Tensor:
        """A tensor under the checkpoint's own name."""
        return self.container.read(name)

    def _account(self) -> None:
        """Puts every tensor of the source into `sources`, or into `left_out`."""
        tensors, layers, library = (
            self.container.tensors,
            self.config.layers,
            self.architecture.library,
        )
        integers = {n.rpartition(".")[0] for n, t in tensors.items() if t.dtype not in FLOATS}
        beyond = set()
        for name, info in tensors.items():
            if COMPUTED_TENSORS.search(name):
                self.left_out[name] = "a buffer that is computed"
                continue
            natives = self.architecture.sources(name, info.shape, self.config) or {
                name: Source(name)
            }
            why = why_copied(natives, self.architecture, layers, self.raw_config)
            inside = library is not None and library.part(name)
            if why and not inside and name.rpartition(".")[0] in integers:
                self.left_out[name] = f"{why}, and not in floating point"
                continue
            if why:
                if not all(source.fits(info.shape) for source in natives.values()):
                    natives = {name: Source(name)}
                self.copied |= dict.fromkeys(natives, why)
                beyond.add(self.architecture.layer_of(next(iter(natives))))
            self.twice += [
                (native, self.sources[native].name, name)
                for native in natives
                if native in self.sources
            ]
            self.sources |= natives
        if numbers := sorted(layer for layer in beyond if layer is not None):
            few = (
                ", ".join(map(str, numbers))
                if len(numbers) < 4
                else f"{numbers[0]} to {numbers[-1]}"
            )
            which = f"layer{'s' if len(numbers) > 1 else ''} {few} copied as in the source"
            why = f"since transformers runs none: num_hidden_layers is {layers}"
            self.remarks += (f"{which}, unquantised, {why}",)
        if self.config_only and library:  # what a whole checkpoint would have
            for name in map(library.names.stored, library.beside):
                self.copied[name] = str(why_copied([name], self.architecture, layers, {}))
        if self.config.tied:
            self._account_for_head()

    def _account_for_head(self) -> None:
        """Of a model whose head is said to be the embedding: what the file's own head is."""
        head, embedding = (
            f"{self.architecture.head}.weight",
            f"{self.architecture.embedding}.weight",
        )
        inside, bias = f"{self.architecture.head}.", f"{self.architecture.head}.bias"
        heads = [name for name in self.sources if name.startswith(inside) and name != bias]
        if not heads:
            return
        if heads == [head] and not any(
            name.startswith(f"{self.architecture.embedding}.") for name in self.sources
        ):
            self.sources[embedding] = self.sources.pop(head)
        elif heads == [head] and embedding in self.sources and self._same(head, embedding):
            self.left_out[self.sources.pop(head).name] = (
                f"a second copy of {self.sources[embedding].name}, which it is tied to"
            )
        else:
            self.config = replace(self.config, tied=False)
            self.raw_config = untied(self.raw_config)
            if self.architecture.library:
                self.architecture = family(self.raw_config, self.path)
            own = f"{self.sources[heads[0]].name} is another than {self.architecture.embedding}"
            done = "it is kept, as transformers does, and what is written says false"
            self.remarks += (f"{own} though tie_word_embeddings is true: {done}",)

    def _same(self, one: str, other: str) -> bool:
        """Whether two native tensors lie there as the same numbers."""
        return same_tensor(
            self.container, self.sources[one].name, self.container, self.sources[other].name
        )

    @cached_property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Native name -> shape of every tensor the config asks for."""
        return {
            n: self.rank_shape(n, shape)
            for n, shape in expected_tensors(self.architecture, self.config)
        }

    def rank_shape(self, native: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What a tensor-parallel rank holds of a tensor of `shape`."""
        return shape if self.tp == 1 else shard_shape(native, shape, self.cut(native), self.tp)

    def cut(self, native: str) -> int | None:
        """Along which dimension tensor parallelism cuts a tensor; None where every rank holds all
        of it."""
        layer = self.architecture.layer_of(native)
        if layer is None:
            return None
        linear, _, part = native.removeprefix(
            f"{self.architecture.layer_prefix(layer)}."
        ).rpartition(".")
        spec = self.linears(layer).get(linear)
        return None if spec is None or (part == "bias" and spec.cut == 1) else spec.cut

    def segments(self, layer: int) -> tuple[Segment, ...]:
        """Of a decoder layer, in execution order."""
        kind = self._kind(layer)
        if kind not in self._segments:
            self._segments[kind] = segments(self.architecture, self.config, layer)
            self._linears[kind] = {
                spec.name: spec for segment in self._segments[kind] for spec in segment.linears
            }
        return self._segments[kind]

    def linears(self, layer: int) -> Mapping[str, LinearSpec]:
        """Name relative to the layer -> every linear of it but the router, in execution order."""
        self.segments(layer)
        return self._linears[self._kind(layer)]

    def joined(self, layer: int, form: str) -> tuple[Joined, ...]:
        """Tensors in which checkpoints of the family in a format hold many native ones of a
        layer."""
        library = self.architecture.library
        every = library.joined(layer) if library else ()
        return tuple(whole for whole in every if form not in whole.named_in)

    def joined_linears(self, layer: int, form: str) -> frozenset[str]:
        """Those of a layer's linears, relative to it, that lie in such tensors."""
        prefix = self.architecture.layer_prefix(layer) + "."
        parts = (part for whole in self.joined(layer, form) for part in whole.parts)
        return frozenset(part.removeprefix(prefix).rpartition(".")[0] for part in parts)

    def held(self, module: str) -> str:
        """What the class in transformers calls a module, where the library computes the family."""
        library, name = self.architecture.library, f"{module}.weight"
        if library is None:
            return module
        held = library.names.loaded(name)[0] if library.part(name) else library.names.held(name)
        return held.removesuffix(".weight")

    def routers(self, layer: int) -> tuple[str, ...]:
        """What weighs a layer's experts, relative to it: matrices that are never quantised."""
        if library := self.architecture.library:
            return library.trace(layer).routers
        return (self.architecture.layer.router,) if self.config.is_moe(layer) else ()

    def unsegmented(self, layer: int) -> tuple[str, ...]:
        """Linears of a layer that are never quantised: routers, and what it does not call once."""
        library = self.architecture.library
        return self.routers(layer) + (tuple(library.trace(layer).left) if library else ())

    def _kind(self, layer: int) -> Hashable:
        """What layers of the same segments have in common."""
        library = self.architecture.library
        return library.trace(layer) if library else self.config.is_moe(layer)

    def row_channels(self, length: int, dtype: torch.dtype) -> int:
        """Of what goes from layer to layer for a token of texts of `length`: its hidden states
        first, then what layers of some hosted families need besides."""
        library = self.architecture.library
        return library.frame.channels(length, dtype) if library else self.config.hidden

    @property
    def outer_linears(self) -> tuple[str, ...]:
        """Linears outside the layers, but the head; they are never quantised."""
        library = self.architecture.library
        return library.outer_linears if library else ()

    def attention(self, layer: int) -> str:
        """The full name of a layer's attention, beside whose tensors scales of its KV cache are
        stored."""
        library = self.architecture.library
        name = library.trace(layer).attention if library else None
        if name is None:
            segment = next(s for s in self.segments(layer) if s.role is Role.attention_out)
            name = segment.names[0].rpartition(".")[0]
        return f"{self.architecture.layer_prefix(layer)}.{name}"

    def cached(self, layer: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """(heads, width) of the K and of the V that a layer caches; None where it caches none."""
        if library := self.architecture.library:
            return library.trace(layer).kv
        return ((self.config.kv_heads, self.config.head_dim),) * 2

    @cached_property
    def cached_layers(self) -> tuple[int, ...]:
        """Those that cache K and V: not what keeps a state of one size, or reads another's."""
        return tuple(i for i in range(self.config.layers) if self.cached(i))

    def problems(self, packed: Callable[[str], bool] = lambda name: False) -> list[Problem]:
        """What keeps this checkpoint from being read: missing, misshapen and unknown tensors.
        packed: whether a name is that of a quantised weight or of a tensor that it is packed into,
        which are for others to check."""
        return [] if self.config_only else tensor_problems(self, packed)

    def shape_of(self, native: str) -> tuple[int, ...]:
        library = self.architecture.library
        if native in self.copied and native not in self.sources and library:
            return library.beside[library.names.held(native)]
        if native in self.copied:
            source = self.sources[native]
            return source.shape_of(self.container.tensors[source.name].shape)
        return self.expected[native]

    def dtype_of(self, native: str) -> str:
        """The safetensors dtype of a native tensor (from config.json where the weights are not
        there)."""
        if self.config_only:
            return {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(
                self.config.dtype, "BF16"
            )
        return self.container.tensors[self.sources[native].name].dtype

    def tensor(self, native: str) -> Tensor:
        """A native tensor as the checkpoint stores it; raises ModelError where it holds NaN or
        infinity."""
        import torch

        source = self.sources[native]
        read, info = self.container.read, self.container.tensors[source.name]
        if source.view and isinstance(source.index[0], int) and source.view[0] == info.shape[0]:
            # One expert of a fused tensor: read that slice alone.
            value = source.arranged(read(source.name, source.index[0])[source.index[1:]])
        else:
            value = source.taken_from(read(source.name))
        # The extremes of numbers that are all finite are finite, and NaN is its own extreme: one
        # fast pass.
        if (
            value.is_floating_point()
            and value.numel()
            and not all(math.isfinite(float(end)) for end in torch.aminmax(value))
        ):
            bad = int((~value.isfinite()).sum())
            raise ModelError(
                Problem(
                    f"{self.path} tensor {source.name}",
                    f"{bad} of {value.numel()} values are NaN or infinite",
                    "finite weights",
                    "The checkpoint is damaged",
                )
            )
        return value

    def layer(self, i: int) -> dict[str, Tensor]:
        """The tensors of decoder layer `i` under their names relative to the layer."""
        prefix = self.architecture.layer_prefix(i) + "."
        return {n.removeprefix(prefix): self.tensor(n) for n in self.layer_names(i)}

    def layer_names(self, i: int) -> Iterator[str]:
        prefix = self.architecture.layer_prefix(i) + "."
        return (n for n in self.expected if n.startswith(prefix))

    def outer_names(self) -> list[str]:
        """Native names of what lies outside the decoder layers: embeddings, final norm, head."""
        first = self.architecture.prefix.partition("{i}")[0]
        return [n for n in self.expected if not n.startswith(first)]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors that are not left out, from headers or, without weights, from the
        config."""
        if not self.config_only:
            return sum(
                info.nbytes
                for name, info in self.container.tensors.items()
                if name not in self.left_out
            )
        item = 4 if self.config.dtype == "float32" else 2
        names = {*self.expected, *self.copied}
        return sum(math.prod(self.shape_of(name)) * item for name in names)
