"""`pack`: the checkpoint that other software loads, written a tensor at a time from the store and
the source.

A format says how a quantised weight is laid out, and into which container: a Hugging Face
directory, a GGUF file or a TurboMind workspace, for each of which there is one function here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quantflow.artifacts.store import write_json
from quantflow.checkpoints.gguf.file import NAME, SCHEMES_KEY
from quantflow.checkpoints.gguf.writer import GgufWriter
from quantflow.checkpoints.rounding import converted
from quantflow.checkpoints.tensor_file import ITEM_BYTES, TensorWriter, dtype_name, torch_dtype
from quantflow.checkpoints.turbomind.workspace import TOKENIZER, WorkspaceWriter
from quantflow.checkpoints.weight_files import INDEX
from quantflow.formats.base import SAFETENSORS_DTYPE, Spec
from quantflow.formats.weight import Weight
from quantflow.models.sharding import shard_plain, shard_shape
from quantflow.paths import write_text
from quantflow.quant.numbers import QuantizedTensor
from quantflow.quant.scheme import Scheme
from quantflow.stages.pack_job import PackJob, quantization_config
from quantflow.tokenizers.gguf_vocabulary import vocabulary_metadata
from quantflow.tokenizers.tokenizer import export_tokenizer


class Results(Protocol):
    """What the sweep left (see `pipeline/sweep.py`). changed: a tensor that is not the checkpoint's
    any more, else None; index is None outside the layers."""

    def linear(self, index: int | None, name: str, in_features: int) -> QuantizedTensor: ...

    def changed(self, index: int | None, name: str) -> Tensor | None: ...


Step = Callable[[str], None]
_Loaded = tuple[dict[str, Tensor], dict[str, float]]
_KV = "kv"  # a piece that is no tensor of the layer, but the scales of its cache


def write_checkpoint(
    folder: Path, job: PackJob, results: Results, step: Step = lambda _: None
) -> dict[str, float]:
    """Writes weights, config, tokenizer and generation config into `folder` (new), and returns the
    relative error of every tensor that the container made inexact: none, unless the job allows it.
    Raises FormatError for what cannot be held exactly."""
    folder.mkdir(parents=True, exist_ok=True)
    return _CONTAINERS[job.format.container](folder, job, results, step)


def _write_directory(folder: Path, job: PackJob, results: Results, step: Step) -> dict[str, float]:
    pieces = list(_pieces(job))
    shards = _split(pieces, job.max_shard_bytes)
    names = _shard_names(len(shards))
    errors: dict[str, float] = {}
    for file_name, shard in zip(names, shards, strict=True):
        with TensorWriter(folder / file_name, _specs(shard), {"format": "pt"}) as writer:
            errors |= _fill(writer, shard, job, results, step)
    # Always with an index: statistics and KV parameters may lie beside the weights, and readers
    # without one take every file.
    weight_map = {
        n: f for f, shard in zip(names, shards, strict=True) for piece in shard for n in piece.specs
    }
    index = {
        "metadata": {"total_size": sum(piece.nbytes for piece in pieces)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    _write_configs(folder, job)
    export_tokenizer(job.checkpoint.tokenizer_path, folder)
    return errors


def _write_gguf(folder: Path, job: PackJob, results: Results, step: Step) -> dict[str, float]:
    """One file, and the tokenizer's own files beside it: llama.cpp needs the former alone."""
    checkpoint = job.checkpoint
    export_tokenizer(checkpoint.tokenizer_path, folder)
    config = checkpoint.architecture.native_config(checkpoint.raw_config)
    config = {
        key: value
        for key, value in config.items()
        if key not in ("auto_map", "quantization_config")
    }
    schemes = quantization_config(job).get("schemes", {})
    metadata = {
        "general.name": str(config.get("_name_or_path") or config["model_type"]),
        SCHEMES_KEY: json.dumps(schemes, sort_keys=True),
    }
    metadata |= vocabulary_metadata(folder, config, checkpoint.config.vocabulary)
    pieces = list(_pieces(job))
    with GgufWriter(folder / NAME, _specs(pieces), config, checkpoint.config, metadata) as writer:
        return _fill(writer, pieces, job, results, step)


def _write_workspace(folder: Path, job: PackJob, results: Results, step: Step) -> dict[str, float]:
    """LMDeploy's layout, which holds all ranks in itself."""
    checkpoint = job.checkpoint
    pieces = list(_pieces(job))
    config = checkpoint.architecture.native_config(checkpoint.raw_config)
    group_size = job.default.group_size if job.modules else 0
    with WorkspaceWriter(
        folder,
        checkpoint.config,
        config,
        _specs(pieces),
        tp=job.ranks,
        model_name=str(config["model_type"]),
        kv=job.kv,
        group_size=group_size,
        rounded=job.rounded,
    ) as writer:
        errors = _fill(writer, pieces, job, results, step)
    export_tokenizer(checkpoint.tokenizer_path, folder / TOKENIZER)
    return errors | writer.rounding


_CONTAINERS = {"directory": _write_directory, "gguf": _write_gguf, "workspace": _write_workspace}


class _Writer(Protocol):
    def write(self, name: str, tensor: Tensor) -> None: ...


def _fill(
    writer: _Writer, pieces: list[_Piece], job: PackJob, results: Results, step: Step
) -> dict[str, float]:
    errors: dict[str, float] = {}
    for piece, (tensors, off) in _ahead(pieces, lambda piece: _load(piece, job, results)):
        errors |= {name: error for name, error in off.items() if error}
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        if piece.last_of_layer:
            step(f"layer {piece.layer}")
    return errors


def _specs(pieces: list[_Piece]) -> dict[str, Spec]:
    return {name: spec for piece in pieces for name, spec in piece.specs.items()}


def written_bytes(job: PackJob) -> int:
    """Of all tensors that the job writes, ranks included: from headers and shapes alone."""
    ranks = rank_folders(job)
    return checkpoint_bytes(job) + (
        ranks * checkpoint_bytes(replace(job, tp=job.ranks)) if ranks else 0
    )


def checkpoint_bytes(job: PackJob) -> int:
    """Of the tensors of the checkpoint alone, which is what is loaded: without ranks beside it."""
    return sum(piece.nbytes for piece in _pieces(job))


def rank_folders(job: PackJob) -> int:
    """How many ranks are written beside the whole: none where there is but one, or the container
    holds them in itself."""
    return job.ranks if job.ranks > 1 and job.format.container == "directory" else 0


def write_ranks(
    folder: Path, job: PackJob, results: Results, step: Step = lambda _: None
) -> Iterator[tuple[int, Path]]:
    """Writes the tensor-parallel ranks beside the whole checkpoint in `folder`, and yields each
    with its own folder."""
    for rank in range(rank_folders(job)):
        place = folder / f"tp{job.ranks}" / f"rank-{rank}"
        write_checkpoint(place, replace(job, rank=rank, tp=job.ranks), results, step)
        write_json(place / "tensor_parallel.json", {"rank": rank, "tensor_parallel": job.ranks})
        yield rank, place


def _ahead(
    pieces: list[_Piece], load: Callable[[_Piece], _Loaded]
) -> Iterator[tuple[_Piece, _Loaded]]:
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
        shape, module = checkpoint.shape_of(name), name.removesuffix(".weight")
        scheme = job.outer.get(module)
        if scheme is None:
            yield _Piece(name, None, name, {name: (_plain_dtype(job, name), shape)}, shape=shape)
        else:
            specs = job.format.specs(Weight(module, (shape[0], shape[1]), scheme), scale_dtype)
            yield _Piece(module, None, module, specs, scheme, shape)
    for index in range(checkpoint.config.layers):
        prefix = checkpoint.architecture.layer_prefix(index) + "."
        schemes = job.schemes.get(index, {})
        yield from _kv_pieces(job, index)
        linears = checkpoint.linears(index)
        names = list(checkpoint.layer_names(index))
        for name in names:
            last = name == names[-1]
            relative = name.removeprefix(prefix)
            linear, _, part = relative.rpartition(".")
            cut = linears[linear].cut if job.tp > 1 and linear in linears else None
            shape = checkpoint.shape_of(name)
            local = shard_shape(name, shape, cut, job.tp)
            if part == "weight" and linear in schemes:
                module = name.removesuffix(".weight")
                weight = Weight(module, (local[0], local[1]), schemes[linear])
                specs = job.format.specs(weight, scale_dtype)
                yield _Piece(module, index, linear, specs, schemes[linear], shape, cut, last)
            else:
                yield _Piece(
                    name,
                    index,
                    relative,
                    {name: (_plain_dtype(job, name), local)},
                    None,
                    shape,
                    cut,
                    last,
                )


def _plain_dtype(job: PackJob, name: str) -> str:
    """What an unquantised tensor is written in: as it is stored, or in the 16 bits that a plain
    checkpoint is to have."""
    if job.format.dtype not in (None, "float32"):
        return SAFETENSORS_DTYPE[str(job.format.dtype)]
    return (
        SAFETENSORS_DTYPE[job.checkpoint.config.dtype]
        if name in job.unpacked
        else job.checkpoint.dtype_of(name)
    )


def _load(piece: _Piece, job: PackJob, results: Results) -> _Loaded:
    """The tensors of a piece, and the relative error of each that a dtype made inexact."""
    model_dtype = getattr(torch, job.checkpoint.config.dtype)
    if piece.relative == _KV:
        assert job.kv is not None
        return {name: job.kv[name] for name in piece.specs}, {}
    if piece.scheme is not None:
        quantised = results.linear(piece.layer, piece.relative, piece.shape[1])
        if piece.cut is not None:
            quantised = quantised.cut(piece.cut, job.rank, job.tp)
        return job.format.encode(piece.name, quantised, model_dtype), {}
    changed = results.changed(piece.layer, piece.relative)
    value = job.checkpoint.tensor(piece.name) if changed is None else changed
    value = shard_plain(piece.name, value, piece.cut, job.rank, job.tp)
    value, error = converted(
        piece.name, value, torch_dtype(piece.specs[piece.name][0]), rounded=job.rounded
    )
    return {piece.name: value}, {piece.name: error}


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


def _kv_pieces(job: PackJob, index: int) -> Iterator[_Piece]:
    """The scales of a layer's KV cache, for a format that holds them among the weights."""
    if job.kv and job.kv_scales:
        attention = f"{job.checkpoint.architecture.layer_prefix(index)}.self_attn"
        scales = {name: job.kv[name] for name in (f"{attention}.k_scale", f"{attention}.v_scale")}
        specs: dict[str, Spec] = {
            name: (dtype_name(scale.dtype), tuple(scale.shape)) for name, scale in scales.items()
        }
        yield _Piece(attention, index, _KV, specs)


def _write_configs(folder: Path, job: PackJob) -> None:
    quantization = quantization_config(job)
    config: dict[str, Any] = dict(
        job.checkpoint.architecture.native_config(job.checkpoint.raw_config)
    )
    for key in ("auto_map", "quantization_config", "compression_config"):
        config.pop(key, None)
    if quantization:
        config["quantization_config"] = quantization
    if job.format.dtype:
        config.pop("dtype", None)
        config["torch_dtype"] = job.format.dtype
    write = {"config.json": config, **job.format.extra_files(quantization)}
    for name, value in write.items():
        write_text(
            folder / name,
            json.dumps(value, indent=2, ensure_ascii=False, sort_keys=name == "config.json") + "\n",
        )
