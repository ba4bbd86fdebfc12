"""A Hugging Face directory, a GGUF file and a TurboMind workspace: what each cannot take, and how a
checkpoint is written into it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantflow.checkpoints.gguf.config import SCHEMES_KEY
from quantflow.checkpoints.gguf.file import NAME
from quantflow.checkpoints.gguf.writer import GgufWriter, decoder_problems
from quantflow.checkpoints.tensor_file import TensorWriter
from quantflow.checkpoints.turbomind.files import TOKENIZER
from quantflow.checkpoints.turbomind.writer import WorkspaceWriter, workspace_problems
from quantflow.checkpoints.weight_files import INDEX
from quantflow.errors import FormatError, ModelError, Problem
from quantflow.paths import write_text
from quantflow.stages.pack_job import PackJob
from quantflow.stages.pack_pieces import Piece, Results, Step, fill, pieces_of, specs_of
from quantflow.tokenizers.export import export_tokenizer
from quantflow.tokenizers.gguf_vocabulary import vocabulary_metadata
from quantflow.tokenizers.load import has_tokenizer
from quantflow.tokenizers.processor import export_processor


@dataclass(frozen=True)
class Container:
    """write: a job's weights, config and tokenizer into a new folder; the relative error of every
    tensor that it makes inexact. problems: what keeps a job from being written. ranks_beside:
    tensor-parallel ranks lie beside the whole, each a checkpoint; else it holds them in itself.
    kv_inside: the int8 parameters of a KV cache are part of it, and no file beside it.
    """

    write: Callable[[Path, PackJob, Results, Step], dict[str, float]]
    problems: Callable[[PackJob], list[Problem]]
    ranks_beside: bool = False
    kv_inside: bool = False


def _write_directory(folder: Path, job: PackJob, results: Results, step: Step) -> dict[str, float]:
    pieces = list(pieces_of(job))
    shards = _split(pieces, job.max_shard_bytes)
    names = _shard_names(len(shards))
    errors: dict[str, float] = {}
    for file_name, shard in zip(names, shards, strict=True):
        with TensorWriter(folder / file_name, specs_of(shard), {"format": "pt"}) as writer:
            errors |= fill(writer, shard, job, results, step)
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
    export_processor(job.checkpoint.tokenizer_path, folder)
    return errors


def _split(pieces: list[Piece], limit: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
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
    quantization = job.quantization_config()
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
    schemes = job.quantization_config().get("schemes", {})
    # llama.cpp looks for Phi-3-mini's tokens in whatever is called phi3.
    kind = str(config["model_type"]).replace("phi3", "phi")
    metadata = {
        "general.name": str(config.get("_name_or_path") or kind),
        SCHEMES_KEY: json.dumps(schemes, sort_keys=True),
    }
    metadata |= vocabulary_metadata(folder, config, checkpoint.config.vocabulary)
    pieces = list(pieces_of(job))
    with GgufWriter(folder / NAME, specs_of(pieces), config, checkpoint.config, metadata) as writer:
        return fill(writer, pieces, job, results, step)


def _gguf_problems(job: PackJob) -> list[Problem]:
    checkpoint = job.checkpoint
    config = checkpoint.architecture.native_config(checkpoint.raw_config)
    problems = decoder_problems(str(config.get("model_type")), checkpoint.config)
    if not problems and has_tokenizer(checkpoint.tokenizer_path):
        try:
            vocabulary_metadata(checkpoint.tokenizer_path, config, checkpoint.config.vocabulary)
        except (FormatError, ModelError) as error:
            problems += error.problems
    return problems


def _write_workspace(folder: Path, job: PackJob, results: Results, step: Step) -> dict[str, float]:
    """LMDeploy's layout, which holds all ranks in itself."""
    checkpoint = job.checkpoint
    pieces = list(pieces_of(job))
    config = checkpoint.architecture.native_config(checkpoint.raw_config)
    group_size = job.default.group_size if job.modules else 0
    with WorkspaceWriter(
        folder,
        checkpoint.config,
        config,
        specs_of(pieces),
        tp=job.ranks,
        model_name=str(config["model_type"]),
        kv=job.kv,
        group_size=group_size,
        rounded=job.rounded,
    ) as writer:
        errors = fill(writer, pieces, job, results, step)
    export_tokenizer(checkpoint.tokenizer_path, folder / TOKENIZER)
    return errors | writer.rounding


def _workspace_problems(job: PackJob) -> list[Problem]:
    checkpoint, modules = job.checkpoint, job.modules
    problems = workspace_problems(
        checkpoint.config, tp=job.ranks, int4=bool(modules), group_size=job.default.group_size
    )
    plain = [linear for linear in job.linears() if linear not in modules] if modules else []
    if plain:
        more = f" and {len(plain) - 1} more" if len(plain) > 1 else ""
        expected = "all linears of the layers of one kind"
        problems.append(
            Problem(f"{plain[0]}{more}", "plain, where other linears are int4", expected)
        )
    return problems


CONTAINERS = {
    "directory": Container(_write_directory, lambda job: [], ranks_beside=True),
    "gguf": Container(_write_gguf, _gguf_problems),
    "workspace": Container(_write_workspace, _workspace_problems, kv_inside=True),
}


def container_of(job: PackJob) -> Container:
    return CONTAINERS[job.format.container]
