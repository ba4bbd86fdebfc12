"""`quantflow export`: a checkpoint in another format. Codes, scales and zero points are moved,
never rounded again unless asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantflow import __version__
from quantflow.artifacts.artifact import (
    EXPORT,
    KV_FILE,
    MANIFEST,
    REPORT,
    building,
    file_entries,
    kv_file,
    read_manifest,
)
from quantflow.artifacts.fingerprint import digest
from quantflow.artifacts.store import write_json
from quantflow.checkpoints.checkpoint import Checkpoint, resolve_model
from quantflow.checkpoints.directory import read_json
from quantflow.checkpoints.tensor_file import TensorFile, save_tensors
from quantflow.errors import FormatError, OutputError, Problem
from quantflow.formats import FORMATS
from quantflow.formats.base import Format
from quantflow.formats.reader import KV_SUFFIXES, REQUANTIZED, Weights
from quantflow.formats.weight import usual_group
from quantflow.pipeline.progress import Progress, Silent
from quantflow.quant.numbers import QuantizedTensor
from quantflow.quant.scheme import Scheme
from quantflow.stages.containers import container_of
from quantflow.stages.kv_parameters import fp8_scales, largest_of_parameters, of_rank, per_rank
from quantflow.stages.pack_job import PackJob
from quantflow.stages.pack_pieces import Results
from quantflow.stages.pack_prepare import Prepared, prepare
from quantflow.stages.pack_writer import (
    checkpoint_bytes,
    rank_folders,
    write_checkpoint,
    write_ranks,
)
from quantflow.stages.requantize import Requantizing, record

MAX_SHARD_BYTES = 5 * 10**9
_ASK = "--requantize puts them on another grid, and reports the error"
_DEFAULT = Scheme(4, 128, False)  # what a plain checkpoint is rounded to where that is asked for


@dataclass(frozen=True)
class Options:
    """tp: tensor-parallel ranks. requantize: put on another grid what the format cannot hold.
    dtype: of a plain checkpoint, as torch names it. kv_scales: `fp8` writes scales of such a KV
    cache into the checkpoint itself; compressed-tensors alone has names for them."""

    tp: int = 1
    max_shard_bytes: int = MAX_SHARD_BYTES
    requantize: bool = False
    dtype: str | None = None
    kv_scales: str | None = None


@dataclass(frozen=True)
class Exported:
    """A checkpoint that `export` has written.

    Attributes:
        output: Its directory.
        source_format: The format of the source, `huggingface` for a plain one.
        format: The format that it is in now.
        modules: How many quantised weights were moved.
        scheme: Of most of them; None for a plain checkpoint.
        notes: What a user should know of the architecture and of this checkpoint.
        errors: What had to be rounded, and its relative error; empty where all of it is exact.
        left_out: Tensors of the source that were not written, and why.
        warnings: What engines are known not to load of it.
    """

    output: Path
    source_format: str
    format: str
    modules: int
    scheme: Scheme | None
    notes: tuple[str, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def export(
    source: str | Path,
    format_name: str,
    output: Path,
    options: Options = Options(),
    progress: Progress | None = None,
) -> Exported:
    """Writes `source`, an artifact or any checkpoint that is read, into `output` in the format
    `format_name`; with tp > 1 the ranks too.

    Raises FormatError, with every reason, where the format cannot hold it exactly and
    `options.requantize` is not set; ModelError where the source is wrong; OutputError. Nothing is
    left behind then.
    """
    # What is read, and whether the format can hold it.
    target = _target(format_name, options)
    path = resolve_model(str(source))
    weights = Weights(path)
    _check_output(output, path)
    kv = kv_tensors(weights)
    job, errors = _with_kv(weights, _job(weights, target, options), kv, options)
    checkpoint = weights.checkpoint
    moved: Results = _Moved(weights, job)
    if options.requantize:
        moved = Requantizing(moved, job, None if weights.modules else weights.tensor, errors)
    # The whole, its ranks, and what says how they were made.
    origin = _origin(checkpoint)
    watcher = progress or Silent()
    watcher.phase("export", checkpoint.config.layers * (1 + rank_folders(job)), "layers")
    with building(output) as folder:
        errors |= write_checkpoint(folder, job, moved, watcher.step)
        if kv and not container_of(job).kv_inside:
            save_tensors(folder / KV_FILE, kv)
        for rank, place in write_ranks(folder, job, moved, watcher.step):
            if kv:
                save_tensors(
                    place / KV_FILE, of_rank(kv, checkpoint.config.kv_heads, rank, options.tp)
                )
        # An approximation says so, whatever it is translated into.
        source_format = weights.format_name
        before = checkpoint.path / REQUANTIZED
        earlier = {"before": read_json(before)} if before.is_file() else {}
        if errors or earlier:
            summary = {
                "from": source_format,
                "to": format_name,
                "relative_errors": record(errors),
                **earlier,
            }
            write_json(folder / REQUANTIZED, summary)
        exact = not errors and not earlier
        manifest = _manifest(
            checkpoint, origin, job, folder, source_format, options.tp, weights.notes, exact=exact
        )
        write_json(folder / MANIFEST, manifest)
    # What the caller is told.
    count, notes = len(job.modules), weights.notes
    if weights.kv_scales == "fp8" and not options.kv_scales:
        notes = (*notes, "these were left out; --kv-scales fp8 keeps them in compressed-tensors")
    scheme = job.default if count else None
    left_out = {
        n: why
        for n, why in weights.left_out.items()
        if not options.kv_scales or not n.endswith(KV_SUFFIXES[:2])
    }
    return Exported(
        output,
        source_format,
        format_name,
        count,
        scheme,
        notes,
        record(errors),
        left_out,
        job.warnings,
    )


def _origin(checkpoint: Checkpoint) -> tuple[Path, dict[str, Any]] | None:
    """The artifact or export that a checkpoint is, or is a format of, and its manifest. Raises
    ModelError for a damaged one."""
    here = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    for place in (here, here.parent):
        manifest = read_manifest(place)
        if manifest and any(
            (place / folder).resolve() == here.resolve() for folder in manifest["formats"].values()
        ):
            return place, manifest
    return None


def _manifest(
    checkpoint: Checkpoint,
    origin: tuple[Path, dict[str, Any]] | None,
    job: PackJob,
    folder: Path,
    source_format: str,
    tp: int,
    notes: tuple[str, ...],
    *,
    exact: bool,
) -> dict[str, Any]:
    """What was written, and of what. What was measured of the source holds for an exact translation
    of it, and goes along."""
    place, made = origin or (checkpoint.path, {})
    report = read_json(place / REPORT) if origin and (place / REPORT).is_file() else {}
    before, files = {**report.get("source", {}), **made.get("source", {})}, file_entries(folder)
    name = (
        before.get("model") if made.get("kind") == EXPORT else made.get("name")
    ) or checkpoint.path.resolve().name.removesuffix(".gguf")
    return {
        "quantflow": __version__,
        "kind": EXPORT,
        "name": f"{name}_{job.format.name}",
        "fingerprint": digest([EXPORT, files]),
        "status": made.get("status", "complete"),
        "failed_gates": made.get("failed_gates", []),
        "formats": {job.format.name: "."},
        "tensor_parallel": tp,
        "recipe": made.get("recipe"),
        "source": {
            "model": name,
            "architecture": checkpoint.architecture.name,
            "format": source_format,
            "exact": exact,
            "artifact": made.get("fingerprint"),
            "weights": before.get("weights"),
            "bytes": before.get("bytes", checkpoint.weight_bytes),
        },
        "bytes": checkpoint_bytes(job),
        "kv_qparams": made.get("kv_qparams"),
        "quality": made.get("quality", {}) if exact else {},
        "evaluation": report.get("evaluation", made.get("evaluation")) if exact else None,
        "notes": list(notes),
        "files": files,
    }


def _check_output(output: Path, source: Path) -> None:
    """Raises OutputError, before any work, for a place that holds something. What a recipe makes
    can be made again; what an export would replace may be the only copy."""
    place = output.resolve()
    if place == source.resolve() or source.resolve().is_relative_to(place):
        raise OutputError(Problem(str(output), "the source itself", "another directory"))
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        problem = "a directory with other content" if place.is_dir() else "a file"
        raise OutputError(
            Problem(
                str(output),
                problem,
                "a new directory, or an empty one",
                "Remove it yourself if it is no longer needed",
            )
        )
    if artifact := next(
        (parent for parent in place.parents if (parent / MANIFEST).is_file()), None
    ):
        raise OutputError(
            Problem(
                str(output),
                f"a place inside the artifact {artifact}",
                "one outside",
                "Its manifest lists its files",
            )
        )


def _with_kv(
    weights: Weights, job: PackJob, kv: Mapping[str, Tensor], options: Options
) -> tuple[PackJob, dict[str, float]]:
    """The job with what goes into the checkpoint itself of the KV cache, and by how much scales
    were widened for that."""
    checkpoint = job.checkpoint
    if options.kv_scales:
        scales = weights.fp8_scales()
        if not scales and not kv:
            raise FormatError(
                Problem(
                    "--kv-scales",
                    "no KV-cache parameters in the source",
                    "those of a recipe's stage kv_qparams",
                )
            )
        if not scales:
            prefixes = [checkpoint.attention(index) for index in checkpoint.cached_layers]
            for prefix in prefixes:
                scales |= fp8_scales(
                    prefix,
                    largest_of_parameters(kv, prefix),
                    getattr(torch, checkpoint.config.dtype),
                )
        return replace(job, kv=scales, kv_scales=options.kv_scales), {}
    if not kv or not container_of(job).kv_inside:
        return job, {}
    whole, errors = per_rank(kv, checkpoint.config.kv_heads, options.tp, rounded=options.requantize)
    return replace(job, kv=whole), errors


def kv_tensors(weights: Weights) -> dict[str, Tensor]:
    """The KV-cache parameters that a checkpoint holds, or that lie beside it; {} without any."""
    file = kv_file(weights.checkpoint.path)
    if file is None:
        return weights.kv_parameters()
    file_tensors = TensorFile(file)
    return {name: file_tensors.read(name) for name in file_tensors.tensors}


def _target(name: str, options: Options) -> Format:
    if name not in FORMATS:
        raise FormatError(Problem("--format", repr(name), f"one of {', '.join(FORMATS)}"))
    target = FORMATS[name]
    if options.kv_scales and options.kv_scales not in target.kv_scales:
        holding = [
            f"--kv-scales {kind} with --format {form}"
            for form, known in FORMATS.items()
            for kind in known.kv_scales
        ]
        hint = "int8 parameters lie beside the checkpoint without it"
        raise FormatError(
            Problem(
                "--kv-scales",
                f"{options.kv_scales!r} with --format {name}",
                ", ".join(holding),
                hint,
            )
        )
    return target.in_dtype(options.dtype, rounded=options.requantize)


def _job(weights: Weights, target: Format, options: Options) -> PackJob:
    """What is to be written. Raises FormatError with everything that is known to stand against it
    before a weight is read."""
    checkpoint = weights.checkpoint
    held = _schemes(weights)
    if not any(held) and not target.holds_plain:
        if not options.requantize:
            hint = "quantflow run quantises it well; --requantize rounds to nearest"
            raise FormatError(
                Problem(
                    str(checkpoint.path),
                    "no quantised checkpoint",
                    f"one whose codes {target.name} can hold",
                    hint,
                )
            )
        layers = range(checkpoint.config.layers)
        group = usual_group(
            math.gcd(*(k for i in layers for _, k in _shapes(checkpoint, i).values())),
            _DEFAULT.group_size,
        )
        held = [
            dict.fromkeys(_shapes(checkpoint, index), replace(_DEFAULT, group_size=group))
            for index in layers
        ]
    outside = {f"{name.removesuffix('.weight')}" for name in checkpoint.outer_names()}
    outer = {
        module: scheme
        for module in sorted(weights.modules & outside)
        if (scheme := weights.scheme_of(module))
    }

    def prepared(requantize: bool) -> Prepared:
        return prepare(
            checkpoint,
            target,
            dict(enumerate(held)),
            indexed=weights.indexed.__contains__,
            max_shard_bytes=options.max_shard_bytes,
            ranks=options.tp,
            requantize=requantize,
            outer=outer,
        )

    preparation = prepared(options.requantize)
    if problems := [*preparation.modules, *preparation.whole]:
        again = prepared(True)
        raise FormatError(
            _by_cause(problems, _ASK if not again.modules and not again.whole else "")
        )
    return preparation.job


def _shapes(checkpoint: Checkpoint, index: int) -> dict[str, tuple[int, int]]:
    return {name: spec.shape for name, spec in checkpoint.linears(index).items()}


def _by_cause(problems: list[Problem], hint: str) -> list[Problem]:
    """One problem for all modules of which the same is wrong. hint: what to add where nothing is
    advised yet."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for problem in problems:
        alike.setdefault((problem.found, problem.expected, problem.hint), []).append(problem.where)
    return [
        Problem(
            places[0] + (f" and {len(places) - 1} more" if len(places) > 1 else ""),
            found,
            expected,
            advice or hint,
        )
        for (found, expected, advice), places in alike.items()
    ]


@dataclass(frozen=True)
class _Moved:
    """The source's own tensors, as `pack` asks for them."""

    weights: Weights
    job: PackJob

    def linear(self, index: int | None, name: str, in_features: int) -> QuantizedTensor:
        if index is None:
            return self.weights.quantized(name)
        tensor = self.weights.quantized(
            f"{self.weights.checkpoint.architecture.layer_prefix(index)}.{name}"
        )
        wanted = self.job.schemes[index][name]
        return replace(tensor, scheme=wanted) if _alike(tensor.scheme, wanted) else tensor

    def changed(self, index: int | None, name: str) -> Tensor | None:
        return self.weights.tensor(name) if index is None and name in self.job.unpacked else None


def _alike(scheme: Scheme, wanted: Scheme) -> bool:
    """Whether they differ in name alone: an asymmetric tensor whose zero points all happen to lie
    in the middle reads as symmetric."""
    return scheme.symmetric and replace(scheme, symmetric=False) == wanted


def _schemes(weights: Weights) -> list[dict[str, Scheme]]:
    """For each layer, the scheme of every quantised linear by its name in the layer."""
    checkpoint, layers = weights.checkpoint, []
    for index in range(checkpoint.config.layers):
        prefix = checkpoint.architecture.layer_prefix(index)
        layer: dict[str, Scheme] = {}
        for linear in checkpoint.linears(index):
            scheme = weights.scheme_of(f"{prefix}.{linear}")
            if scheme is not None:
                layer[linear] = scheme
        layers.append(layer)
    if weights.format and weights.format.all_symmetric(weights.modules, checkpoint.read_source):
        layers = [
            {name: replace(scheme, symmetric=True) for name, scheme in layer.items()}
            for layer in layers
        ]
    return layers
