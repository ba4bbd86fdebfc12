"""`pack`: the checkpoint that other software loads, written a tensor at a time from the store and the source.

A format says how a quantised weight is laid out, and into which container: a Hugging Face directory, a GGUF file or a TurboMind
workspace, for each of which there is one function here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quantflow.artifacts.store import write_json
from quantflow.errors import FormatError, Problem
from quantflow.formats.base import SAFETENSORS_DTYPE, Format, Spec
from quantflow.formats.compressed_tensors import CompressedTensors
from quantflow.models.architecture import linear_shapes
from quantflow.models.checkpoint import Checkpoint
from quantflow.models.directory import INDEX
from quantflow.models.gguf_file import NAME, SCHEMES_KEY, GgufWriter, decoder_problems
from quantflow.models.gguf_vocabulary import vocabulary_metadata
from quantflow.models.sharding import parallel_dimension, shard_plain, shard_quantized, shard_shape
from quantflow.models.tensor_file import ITEM_BYTES, TensorWriter
from quantflow.models.tokenizer import export_tokenizer
from quantflow.models.workspace import TOKENIZER, WorkspaceWriter, workspace_problems
from quantflow.quant.grid import AnyTensor, Scheme


class Results(Protocol):
    """What the sweep left (see `pipeline/sweep.py`). changed: a tensor that is not the checkpoint's any more, else None; index is None
    outside the layers."""

    def linear(self, index: int, name: str, in_features: int) -> AnyTensor: ...

    def changed(self, index: int | None, name: str) -> Tensor | None: ...


@dataclass(frozen=True)
class PackJob:
    """One checkpoint to write. schemes: layer -> relative name -> scheme. has_index: tensors carry a group index. ranks: how many there
    will be; rank, tp: which one this is, of how many, where it is not the whole. kv: KV-cache parameters for a container that holds them,
    `[]` or `[ranks]` each. unpacked: weights outside the layers that the source holds quantised, which are written in float32. rounded:
    tensors that a container's dtype does not hold exactly are rounded."""

    checkpoint: Checkpoint
    format: Format
    schemes: Mapping[int, Mapping[str, Scheme]]
    default: Scheme
    has_index: bool
    max_shard_bytes: int
    ranks: int = 1
    rank: int = 0
    tp: int = 1
    kv: Mapping[str, Tensor] | None = None
    unpacked: frozenset[str] = frozenset()
    rounded: bool = False


Step = Callable[[str], None]
_KV = "kv"  # a piece that is no tensor of the layer, but the scales of its cache


def write_checkpoint(folder: Path, job: PackJob, results: Results, step: Step = lambda _: None) -> dict[str, float]:
    """Writes weights, config, tokenizer and generation config into `folder` (new), and returns the relative error of every tensor that
    the container made inexact: none, unless the job allows it. Raises FormatError for what cannot be held exactly."""
    folder.mkdir(parents=True, exist_ok=True)
    return _CONTAINERS[job.format.container](folder, job, results, step)


def _write_directory(folder: Path, job: PackJob, results: Results, step: Step) -> dict[str, float]:
    pieces = list(_pieces(job))
    shards = _split(pieces, job.max_shard_bytes)
    names = _shard_names(len(shards))
    for file_name, shard in zip(names, shards, strict=True):
        with TensorWriter(folder / file_name, _specs(shard), {"format": "pt"}) as writer:
            _fill(writer, shard, job, results, step)
    # Always with an index: statistics and KV parameters may lie beside the weights, and readers without one take every file.
    weight_map = {n: f for f, shard in zip(names, shards, strict=True) for piece in shard for n in piece.specs}
    index = {"metadata": {"total_size": sum(piece.nbytes for piece in pieces)}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _write_configs(folder, job)
    export_tokenizer(job.checkpoint.tokenizer_path, folder)
    return {}


def _write_gguf(folder: Path, job: PackJob, results: Results, step: Step) -> dict[str, float]:
    """One file, and the tokenizer's own files beside it: llama.cpp needs the former alone."""
    checkpoint = job.checkpoint
    export_tokenizer(checkpoint.tokenizer_path, folder)
    config = checkpoint.architecture.native_config(checkpoint.raw_config)
    config = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    schemes = _quantization(job).get("schemes", {})
    metadata = {"general.name": str(config.get("_name_or_path") or config["model_type"]), SCHEMES_KEY: json.dumps(schemes, sort_keys=True)}
    metadata |= vocabulary_metadata(folder, config, checkpoint.config.vocabulary)
    pieces = list(_pieces(job))
    with GgufWriter(folder / NAME, _specs(pieces), config, checkpoint.config, metadata) as writer:
        _fill(writer, pieces, job, results, step)
    return {}


def _write_workspace(folder: Path, job: PackJob, results: Results, step: Step) -> dict[str, float]:
    """LMDeploy's layout, which holds all ranks in itself."""
    checkpoint = job.checkpoint
    pieces = list(_pieces(job))
    config = checkpoint.architecture.native_config(checkpoint.raw_config)
    group_size = job.default.group_size if any(job.schemes.values()) else 0
    with WorkspaceWriter(
        folder, checkpoint.config, config, _specs(pieces), tp=job.ranks, model_name=str(config["model_type"]), kv=job.kv,
        group_size=group_size, rounded=job.rounded,
    ) as writer:  # fmt: skip
        _fill(writer, pieces, job, results, step)
    export_tokenizer(checkpoint.tokenizer_path, folder / TOKENIZER)
    return {name: float(f"{error:.4g}") for name, error in writer.rounding.items()}


def container_problems(job: PackJob) -> list[Problem]:
    """What stands against the whole checkpoint in the job's container, or in the format's config, known before a weight is read."""
    checkpoint, found = job.checkpoint, []
    schemes = {scheme for layer in job.schemes.values() for scheme in layer.values()}
    config = checkpoint.architecture.native_config(checkpoint.raw_config)
    if job.format.container == "gguf":
        found += decoder_problems(str(config.get("model_type")), checkpoint.config)
    if job.format.container == "workspace":
        found += workspace_problems(checkpoint.config, tp=job.ranks, int4=bool(schemes), group_size=job.default.group_size)
    try:
        _quantization(job)
    except FormatError as error:
        found += error.problems
    return found


_CONTAINERS = {"directory": _write_directory, "gguf": _write_gguf, "workspace": _write_workspace}


class _Writer(Protocol):
    def write(self, name: str, tensor: Tensor) -> None: ...


def _fill(writer: _Writer, pieces: list[_Piece], job: PackJob, results: Results, step: Step) -> None:
    for piece, tensors in _ahead(pieces, lambda piece: _load(piece, job, results)):
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        if piece.last_of_layer:
            step(f"layer {piece.layer}")


def _specs(pieces: list[_Piece]) -> dict[str, Spec]:
    return {name: spec for piece in pieces for name, spec in piece.specs.items()}


def rank_folders(job: PackJob) -> int:
    """How many ranks are written beside the whole: none where there is but one, or the container holds them in itself."""
    return job.ranks if job.ranks > 1 and job.format.container == "directory" else 0


def write_ranks(folder: Path, job: PackJob, results: Results, step: Step = lambda _: None) -> Iterator[tuple[int, Path]]:
    """Writes the tensor-parallel ranks beside the whole checkpoint in `folder`, and yields each with its own folder."""
    for rank in range(rank_folders(job)):
        place = folder / f"tp{job.ranks}" / f"rank-{rank}"
        write_checkpoint(place, replace(job, rank=rank, tp=job.ranks), results, step)
        write_json(place / "tensor_parallel.json", {"rank": rank, "tensor_parallel": job.ranks})
        yield rank, place


def _ahead(pieces: list[_Piece], load: Callable[[_Piece], dict[str, Tensor]]) -> Iterator[tuple[_Piece, dict[str, Tensor]]]:
    """Each piece with its tensors, the next one being read and packed while the caller writes."""
    with ThreadPoolExecutor(1) as loader:
        coming = loader.submit(load, pieces[0])
        for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
            tensors = coming.result()
            if following is not None:
                coming = loader.submit(load, following)
            yield piece, tensors


@dataclass(frozen=True)
class _Piece:
    """A native tensor, or a quantised module (`scheme`), and the tensors it becomes."""

    name: str
    layer: int | None
    relative: str
    specs: dict[str, Spec]
    scheme: Scheme | None = None
    shape: tuple[int, ...] = ()
    cut: int | None = None
    last_of_layer: bool = False

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in self.specs.values())


def _pieces(job: PackJob) -> Iterator[_Piece]:
    checkpoint, scale_dtype = job.checkpoint, job.format.scale_dtype(job.checkpoint.config.dtype)
    for name in checkpoint.outer_names():
        dtype, shape = "F32" if name in job.unpacked else checkpoint.dtype_of(name), checkpoint.shape_of(name)
        yield _Piece(name, None, name, {name: (dtype, shape)}, shape=shape)
    for index in range(checkpoint.config.layers):
        prefix = checkpoint.architecture.layer_prefix(index) + "."
        schemes = job.schemes[index]
        yield from _kv_pieces(job, index)
        linears = set(job_linears(job, index))
        names = list(checkpoint.layer_names(index))
        for name in names:
            last = name == names[-1]
            relative = name.removeprefix(prefix)
            linear, _, part = relative.rpartition(".")
            cut = parallel_dimension(linear, checkpoint.architecture.layer) if job.tp > 1 and linear in linears else None
            shape = checkpoint.shape_of(name)
            if part == "weight" and linear in schemes:
                local = shard_shape(name, shape, cut, job.tp)
                module = name.removesuffix(".weight")
                specs = job.format.specs(module, (local[0], local[1]), schemes[linear], scale_dtype, job.has_index)
                yield _Piece(module, index, linear, specs, schemes[linear], shape, cut, last)
            else:
                local = shard_shape(name, shape, cut, job.tp)
                yield _Piece(name, index, relative, {name: (checkpoint.dtype_of(name), local)}, None, shape, cut, last)


def job_linears(job: PackJob, index: int) -> Iterator[str]:
    return iter(linear_shapes(job.checkpoint.architecture, job.checkpoint.config, index))


def _load(piece: _Piece, job: PackJob, results: Results) -> dict[str, Tensor]:
    if piece.relative == _KV:
        assert job.kv is not None and isinstance(job.format, CompressedTensors)
        scales = [float(job.kv[f"{piece.name}.{letter}_scale"]) for letter in "kv"]
        dtype = getattr(torch, job.checkpoint.config.dtype)
        if job.rounded:
            scales = [_rounded_up(scale, dtype) for scale in scales]
        return job.format.encode_kv(piece.name, scales[0], scales[1], dtype)
    if piece.scheme is not None:
        assert piece.layer is not None
        tensor = results.linear(piece.layer, piece.relative, piece.shape[1])
        if piece.cut is not None:
            tensor = shard_quantized(tensor, piece.cut, job.rank, job.tp)
        return job.format.encode(piece.name, tensor, getattr(torch, job.checkpoint.config.dtype))
    changed = results.changed(piece.layer, piece.relative)
    value = job.checkpoint.tensor(piece.name) if changed is None else changed
    return {piece.name: shard_plain(piece.name, value, piece.cut, job.rank, job.tp)}


def _rounded_up(scale: float, dtype: torch.dtype) -> float:
    """The least number of `dtype` that is no less: a smaller scale would clip."""
    near = torch.tensor(scale, dtype=torch.float64).to(dtype)
    if float(near) < scale:
        near = torch.nextafter(near, torch.full_like(near, torch.inf))
    return float(near)


def _split(pieces: list[_Piece], limit: int) -> list[list[_Piece]]:
    shards: list[list[_Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def check_kv_inside(job: PackJob) -> None:
    """Raises FormatError unless the job's KV-cache parameters can be written into the checkpoint itself."""
    problems = []
    if not isinstance(job.format, CompressedTensors):
        problems.append(Problem("kv_scales", f"the format {job.format.name}", "compressed-tensors, the one with names for them"))
    elif not job.kv:
        problems.append(Problem("kv_scales", "no KV-cache parameters", "those of the stage kv_qparams"))
    elif any(value.dim() for value in job.kv.values()):
        problems.append(Problem("kv_scales", "a scale for each rank", "one for each layer"))
    elif any(bool(value.any()) for name, value in job.kv.items() if name.endswith("zero_point")):
        problems.append(Problem("kv_scales", "zero points", "symmetric scales", "Use kv_qparams: {symmetric: true}"))
    if problems:
        raise FormatError(problems)


def _kv_pieces(job: PackJob, index: int) -> Iterator[_Piece]:
    """The scales of a layer's KV cache, for a format that holds them among the weights."""
    if job.kv and isinstance(job.format, CompressedTensors):
        attention = f"{job.checkpoint.architecture.layer_prefix(index)}.self_attn"
        dtype = SAFETENSORS_DTYPE[job.checkpoint.config.dtype]
        specs: dict[str, Spec] = {f"{attention}.{letter}_scale": (dtype, (1,)) for letter in "kv"}
        yield _Piece(attention, index, _KV, specs)


def _quantization(job: PackJob) -> dict[str, Any]:
    """The `quantization_config`; {} where nothing is quantised."""
    checkpoint = job.checkpoint
    modules: dict[str, Scheme] = {}
    ignored = [checkpoint.architecture.head]
    for index in range(checkpoint.config.layers):
        prefix = checkpoint.architecture.layer_prefix(index)
        for linear in job_linears(job, index):
            if linear in job.schemes[index]:
                modules[f"{prefix}.{linear}"] = job.schemes[index][linear]
            else:
                ignored.append(f"{prefix}.{linear}")
        if checkpoint.config.is_moe(index):
            ignored.append(f"{prefix}.{checkpoint.architecture.layer.router}")
    kv = {"bits": 8, "symmetric": True, "granularity": "tensor"} if job.kv and isinstance(job.format, CompressedTensors) else None
    return job.format.quantization_config(modules, ignored, job.default, kv=kv, act_order=job.has_index) if modules else {}


def _write_configs(folder: Path, job: PackJob) -> None:
    quantization = _quantization(job)
    config: dict[str, Any] = dict(job.checkpoint.architecture.native_config(job.checkpoint.raw_config))
    for key in ("auto_map", "quantization_config", "compression_config"):
        config.pop(key, None)
    if quantization:
        config["quantization_config"] = quantization
    if job.format.dtype:
        config.pop("dtype", None)
        config["torch_dtype"] = job.format.dtype
    write = {"config.json": config, **job.format.extra_files(quantization)}
    for name, value in write.items():
        (folder / name).write_text(
            json.dumps(value, indent=2, ensure_ascii=False, sort_keys=name == "config.json") + "\n", encoding="utf-8"
        )
