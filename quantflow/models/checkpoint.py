"""A lazy reader of a model directory: its config, tokenizer files and tensors, one at a time. Nothing in it is executed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantflow.errors import ModelError, Problem
from quantflow.models.architecture import IGNORED_TENSORS, Architecture, Source, expected_tensors
from quantflow.models.config import ConfigProblem, DecoderConfig
from quantflow.models.registry import ARCHITECTURES
from quantflow.models.sharding import cut_dimension, shard_shape
from quantflow.models.tensor_file import TensorFile, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "qwen.tiktoken", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
_FLOATS = ("F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory; raises ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(Problem(str(path), error.strerror or str(error), "a readable file")) from error
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8 or JSON, or a number of thousands of digits
        raise ModelError(Problem(str(path), f"not JSON ({error})", "a JSON object")) from error
    if not isinstance(value, dict):
        raise ModelError(Problem(str(path), f"JSON of type {type(value).__name__}", "a JSON object"))
    return value


def resolve_model(model: str) -> Path:
    """The directory of a model: a local one, or a hub id downloaded (weights and tokenizer only, no code).

    Raises ModelError, which says how to go on without the hub.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(Problem(model, "a file", "a model directory"))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise ModelError(Problem(model, "no such directory", "a model directory or a hub id such as internlm/internlm-chat-7b"))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.jinja"]))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(
            Problem(model, f"no such directory, and the hub could not give it ({reason})", hint="Download it and pass --model DIR")
        ) from error


@dataclass(frozen=True)
class _Location:
    file: TensorFile
    info: TensorInfo


class Checkpoint:
    """A model directory. The constructor reads config.json and the safetensors headers, never a weight.

    config_only: the weight files need not be there; `shape_of` then answers from the config. tp: the files hold one of that many
    tensor-parallel ranks. Raises ModelError with every problem found: what is missing, what has the wrong shape, what the architecture
    does not know.
    """

    def __init__(self, path: Path, *, config_only: bool = False, tp: int = 1) -> None:
        self.path, self.tp = path, tp
        self.raw_config = read_json(path / "config.json")
        model_type = self.raw_config.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise ModelError(
                Problem(
                    f"{path}/config.json model_type",
                    repr(model_type),
                    f"one of {', '.join(sorted(ARCHITECTURES))}",
                    "What is missing for another family is a table in quantflow/models: its tensor names and what its decoder computes",
                )
            )
        self.architecture: Architecture = ARCHITECTURES[model_type]
        try:
            self.config: DecoderConfig = self.architecture.read_config(self.raw_config)
        except ConfigProblem as error:
            raise ModelError(Problem(f"{path}/config.json", str(error))) from error
        self.config_only = config_only
        self._locations: dict[str, _Location] = {} if config_only else _locate(path)
        self.quantization: dict[str, Any] | None = self.raw_config.get("quantization_config")
        if self.quantization is not None and not isinstance(self.quantization, dict):
            raise ModelError(Problem(f"{path}/config.json quantization_config", repr(self.quantization)[:80], "a JSON object"))

    @cached_property
    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return sorted({location.file.path for location in self._locations.values()})

    @property
    def source_names(self) -> list[str]:
        return sorted(self._locations)

    def read_source(self, name: str) -> Tensor:
        """A tensor under the checkpoint's own name."""
        location = self._locations[name]
        return location.file.read(name)

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Native name -> where it lies, for every tensor that is not ignored."""
        found: dict[str, Source] = {}
        for name, location in self._locations.items():
            if not IGNORED_TENSORS.search(name):
                found.update(self.architecture.sources(name, location.info.shape, self.config) or {name: Source(name)})
        return found

    @cached_property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Native name -> shape of every tensor the config asks for."""
        return {n: self.rank_shape(n, shape) for n, shape in expected_tensors(self.architecture, self.config)}

    def rank_shape(self, native: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What a tensor-parallel rank holds of a tensor of `shape`."""
        return shard_shape(native, shape, self.cut(native), self.tp)

    def cut(self, native: str) -> int | None:
        """Along which dimension tensor parallelism cuts a tensor; None where every rank holds all of it."""
        match = re.match(re.escape(self.architecture.prefix).replace(r"\{i\}", r"\d+") + r"\.", native)
        return cut_dimension(native[match.end() :], self.architecture.layer) if match else None

    def problems(self, packed: Callable[[str], bool] = lambda name: False) -> list[Problem]:
        """What keeps this checkpoint from being read: missing, misshapen and unknown tensors. packed: whether a name is that of a
        quantised weight or of a tensor that it is packed into, which are for others to check."""
        if self.config_only:
            return []
        problems, missing = [], []
        for native, shape in self.expected.items():
            source = self.sources.get(native)
            if source is None:
                if not packed(native):
                    missing.append(native)
                continue
            info = self._locations[source.name].info
            try:
                found = source.shape_of(info.shape)
            except ValueError as error:
                problems.append(Problem(f"{self.path} tensor {source.name}", str(error), hint="config.json and weights disagree"))
                continue
            if found != shape:
                where = f"{self.path} tensor {source.name}"
                problems.append(Problem(where, f"shape {list(found)}", f"{list(shape)} by config.json", "config.json and weights disagree"))
            if info.dtype not in _FLOATS:
                problems.append(Problem(f"{self.path} tensor {source.name}", f"dtype {info.dtype}", ", ".join(_FLOATS)))
        if missing:
            names = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            problems.append(
                Problem(str(self.path), f"missing tensors: {names}", hint="Is a shard missing, or config.json another model's?")
            )
        known = set(self.expected) | {f"{self.architecture.head}.weight"}  # a tied head may be written all the same
        unknown = [n for n in self.sources if n not in known and not packed(n)]
        if unknown:
            names = ", ".join(unknown[:4]) + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
            problems.append(
                Problem(
                    str(self.path),
                    f"tensors that {self.architecture.name} does not have: {names}",
                    hint="They would be lost; is model_type right?",
                )
            )
        return list(dict.fromkeys(problems))  # a fused tensor that is wrong is so for each of its parts

    def shape_of(self, native: str) -> tuple[int, ...]:
        return self.expected[native]

    def dtype_of(self, native: str) -> str:
        """The safetensors dtype of a native tensor (from config.json where the weights are not there)."""
        if self.config_only:
            return {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(self.config.dtype, "BF16")
        return self._locations[self.sources[native].name].info.dtype

    def tensor(self, native: str) -> Tensor:
        """A native tensor as the checkpoint stores it; raises ModelError where it holds NaN or infinity."""
        import torch

        source = self.sources[native]
        location = self._locations[source.name]
        if source.view is None:
            value = location.file.read(source.name)
        elif isinstance(source.index[0], int) and source.view[0] == location.info.shape[0]:
            # One expert of a fused tensor: read that slice alone.
            part = location.file.read(source.name, source.index[0])
            value = part[source.index[1:]].reshape(-1, source.view[-1]).contiguous()
        else:
            part = location.file.read(source.name).view(source.view)[source.index]
            value = part.reshape(-1) if source.vector else part.reshape(-1, source.view[-1])
            value = value.contiguous()
        # The extremes of numbers that are all finite are finite, and NaN is its own extreme: one fast pass.
        if value.is_floating_point() and value.numel() and not all(math.isfinite(float(end)) for end in torch.aminmax(value)):
            bad = int((~value.isfinite()).sum())
            raise ModelError(
                Problem(f"{self.path} tensor {source.name}", f"{bad} of {value.numel()} values are NaN or infinite", "finite weights",
                        "The checkpoint is damaged")
            )  # fmt: skip
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
        """Bytes of all tensors, from headers or, without weights, from the config."""
        if not self.config_only:
            return sum(location.info.nbytes for location in self._locations.values())
        item = 4 if self.config.dtype == "float32" else 2
        return sum(math.prod(shape) * item for shape in self.expected.values())


def _locate(path: Path) -> dict[str, _Location]:
    index = path / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ModelError(Problem(str(index), "no weight_map from tensor names to files", "a safetensors index"))
        unsafe = sorted({v for v in weight_map.values() if os.path.basename(v) != v or not v.endswith(".safetensors")})
        if unsafe:
            raise ModelError(
                [Problem(str(index), f"weight file {v!r}", "the name of a .safetensors file in the same directory") for v in unsafe]
            )
        absent = sorted({v for v in weight_map.values() if not (path / v).is_file()})
        if absent:
            raise ModelError([Problem(str(path / v), "missing shard", hint=f"{INDEX} names it: download it") for v in absent])
        names: Iterable[str] = sorted(set(weight_map.values()))
    else:
        names = sorted(p.name for p in path.glob("*.safetensors"))
        weight_map = {}
        if not names:
            pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
            hint = "Pickled weights run code when loaded: convert them to safetensors first" if pickles else "Is the download complete?"
            raise ModelError(Problem(str(path), f"no .safetensors file{' but ' + pickles[0] if pickles else ''}", hint=hint))
    files = {name: TensorFile(path / name) for name in names}
    locations: dict[str, _Location] = {}
    problems = []
    for file_name, file in files.items():
        for tensor, info in file.tensors.items():
            if weight_map and weight_map.get(tensor) != file_name:
                continue
            if tensor in locations:
                problems.append(Problem(str(path / file_name), f"tensor {tensor} stands in two files", hint=f"Remove one, or add {INDEX}"))
            locations[tensor] = _Location(file, info)
    problems += [
        Problem(str(path / f), f"tensor {t} is missing", hint=f"{INDEX} says it is there")
        for t, f in weight_map.items()
        if t not in files[f].tensors
    ]
    if problems:
        raise ModelError(problems)
    return locations
