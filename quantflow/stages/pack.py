"""`pack`: the checkpoint that other software loads, written a tensor at a time from the store and the source."""

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
from quantflow.formats.base import Format, Spec
from quantflow.models.architecture import linear_shapes
from quantflow.models.checkpoint import INDEX, Checkpoint
from quantflow.models.sharding import shard_plain, shard_quantized, shard_shape
from quantflow.models.tensor_file import ITEM_BYTES, TensorWriter
from quantflow.models.tokenizer import export_tokenizer
from quantflow.quant.grid import QuantizedTensor, Scheme


class Results(Protocol):
    """What the sweep left (see `pipeline/sweep.py`)."""

    def linear(self, index: int, name: str, in_features: int) -> QuantizedTensor: ...

    def changed(self, index: int, name: str) -> Tensor | None: ...


@dataclass(frozen=True)
class PackJob:
    """One checkpoint to write. schemes: layer -> relative name -> scheme. dimension: relative linear name -> the dimension that tensor
    parallelism cuts. scale_dtype: torch's name. has_index: tensors carry a group index."""

    checkpoint: Checkpoint
    format: Format
    schemes: Mapping[int, Mapping[str, Scheme]]
    default: Scheme
    dimension: Callable[[str], int]
    scale_dtype: str
    has_index: bool
    max_shard_bytes: int
    rank: int = 0
    tp: int = 1


def write_checkpoint(folder: Path, job: PackJob, results: Results, step: Callable[[str], None] = lambda _: None) -> None:
    """Writes weights, index, config, tokenizer and generation config into `folder` (new)."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = list(_pieces(job))
    shards = _split(pieces, job.max_shard_bytes)
    names = _shard_names(len(shards))
    for file_name, shard in zip(names, shards, strict=True):
        specs = {name: spec for piece in shard for name, spec in piece.specs.items()}
        with TensorWriter(folder / file_name, specs, {"format": "pt"}) as writer:
            for piece, tensors in _ahead(shard, lambda piece: _load(piece, job, results)):
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
                if piece.last_of_layer:
                    step(f"layer {piece.layer}")
    # Always with an index: statistics and KV parameters may lie beside the weights, and readers without one take every file.
    weight_map = {n: f for f, shard in zip(names, shards, strict=True) for piece in shard for n in piece.specs}
    index = {"metadata": {"total_size": sum(piece.nbytes for piece in pieces)}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _write_configs(folder, job)
    export_tokenizer(job.checkpoint.path, folder)


def write_ranks(
    folder: Path, job: PackJob, tp: int, results: Results, step: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[int, Path]]:  # fmt: skip
    """Writes the tensor-parallel ranks beside the whole checkpoint in `folder`, and yields each with its own folder. None where tp is 1."""
    for rank in range(tp) if tp > 1 else ():
        place = folder / f"tp{tp}" / f"rank-{rank}"
        write_checkpoint(place, replace(job, rank=rank, tp=tp), results, step)
        write_json(place / "tensor_parallel.json", {"rank": rank, "tensor_parallel": tp})
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
    checkpoint = job.checkpoint
    for name in checkpoint.outer_names():
        yield _Piece(name, None, name, {name: (checkpoint.dtype_of(name), checkpoint.shape_of(name))}, shape=checkpoint.shape_of(name))
    for index in range(checkpoint.config.layers):
        prefix = checkpoint.architecture.layer_prefix(index) + "."
        schemes = job.schemes[index]
        linears = set(job_linears(job, index))
        names = list(checkpoint.layer_names(index))
        for name in names:
            last = name == names[-1]
            relative = name.removeprefix(prefix)
            linear, _, part = relative.rpartition(".")
            cut = job.dimension(linear) if job.tp > 1 and linear in linears else None
            shape = checkpoint.shape_of(name)
            if part == "weight" and linear in schemes:
                local = shard_shape(name, shape, cut, job.tp)
                module = name.removesuffix(".weight")
                specs = job.format.specs(module, (local[0], local[1]), schemes[linear], job.scale_dtype, job.has_index)
                yield _Piece(module, index, linear, specs, schemes[linear], shape, cut, last)
            else:
                local = shard_shape(name, shape, cut, job.tp)
                yield _Piece(name, index, relative, {name: (checkpoint.dtype_of(name), local)}, None, shape, cut, last)


def job_linears(job: PackJob, index: int) -> Iterator[str]:
    return iter(linear_shapes(job.checkpoint.architecture, job.checkpoint.config, index))


def _load(piece: _Piece, job: PackJob, results: Results) -> dict[str, Tensor]:
    if piece.scheme is not None:
        assert piece.layer is not None
        tensor = results.linear(piece.layer, piece.relative, piece.shape[1])
        if piece.cut is not None:
            tensor = shard_quantized(tensor, piece.cut, job.rank, job.tp)
        return job.format.encode(piece.name, tensor, getattr(torch, job.checkpoint.config.dtype))
    changed = results.changed(piece.layer, piece.relative) if piece.layer is not None else None
    value = job.checkpoint.tensor(piece.name) if changed is None else changed
    return {piece.name: shard_plain(piece.name, value, piece.cut, job.rank, job.tp)}


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


def _write_configs(folder: Path, job: PackJob) -> None:
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
    quantization = job.format.quantization_config(modules, ignored, job.default, kv=None, act_order=job.has_index)
    config: dict[str, Any] = dict(checkpoint.architecture.native_config(checkpoint.raw_config))
    config.pop("auto_map", None)
    config["quantization_config"] = quantization
    write = {"config.json": config, **job.format.extra_files(quantization)}
    for name, value in write.items():
        (folder / name).write_text(
            json.dumps(value, indent=2, ensure_ascii=False, sort_keys=name == "config.json") + "\n", encoding="utf-8"
        )
