"""From a plan to an artifact: quantise, pack, shard, evaluate, write."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantflow import __version__
from quantflow.artifacts.artifact import (
    KV_FILE,
    MANIFEST,
    PAGE,
    REPORT,
    RUN,
    STATISTICS,
    building,
    file_entries,
    is_whole,
    read_manifest,
)
from quantflow.artifacts.store import write_json
from quantflow.calibration.data import Windows
from quantflow.checkpoints.directory import read_json
from quantflow.checkpoints.tensor_file import TensorFile, TensorWriter, dtype_name, save_tensors
from quantflow.errors import DataError, ModelError, Problem
from quantflow.evaluate.gates import judge
from quantflow.formats.reader import REQUANTIZED
from quantflow.machine import peak_resident_bytes
from quantflow.pipeline.artifact import Artifact
from quantflow.pipeline.identities import Identities, identities
from quantflow.pipeline.measure import measure
from quantflow.pipeline.output import check_output
from quantflow.pipeline.plan import Plan
from quantflow.pipeline.progress import Progress
from quantflow.pipeline.report import make_report, portable
from quantflow.pipeline.sweep import MeasuredReader, SweepReader, check_complete, passes, sweep
from quantflow.pipeline.windows import recipe_windows
from quantflow.quant.kv import KVParameters
from quantflow.report.page import report_page, write_page
from quantflow.stages.calibrate import Calibrate
from quantflow.stages.containers import container_of
from quantflow.stages.evaluate import Evaluate
from quantflow.stages.kv_parameters import (
    fp8_scales,
    largest_of_extremes,
    layer_parameters,
    parameter_tensors,
    per_rank,
)
from quantflow.stages.kv_qparams import KvQparams
from quantflow.stages.pack_pieces import Results
from quantflow.stages.pack_writer import rank_folders, write_checkpoint, write_ranks
from quantflow.stages.requantize import Requantizing, record
from quantflow.tokenizers.load import load_tokenizer


def run(plan: Plan, progress: Progress, *, fresh: bool = False) -> Artifact:
    """Runs the plan, or finds its artifact finished. Raises UserError; a missed gate is in the
    result, not raised."""
    clock = _Clock()
    # what is wrong with them is said before anything is written, or gigabytes are hashed
    windows, held_out = _texts(plan)
    clock.lap("tokenize")
    check_output(plan)
    with plan.store.locked():
        plan.store.drop_torn()
        return _run(plan, windows, held_out, progress, clock, fresh)


def _texts(plan: Plan) -> tuple[Windows, Windows | None]:
    """The windows of the calibration (none where no stage reads it) and of `evaluate`. Raises
    UserError, also for an overlap."""
    evaluate, calibration = plan.stage(Evaluate), plan.recipe.calibration
    tokenizer = (
        load_tokenizer(plan.checkpoint.tokenizer_path)
        if plan.reads_calibration or evaluate
        else None
    )
    windows = Windows([], frozenset(), "")
    if plan.reads_calibration and calibration:
        windows = recipe_windows(plan, tokenizer, "calibration")
    held_out = recipe_windows(plan, tokenizer, "evaluate") if evaluate else None
    if held_out and (shared := windows.documents & held_out.documents):
        raise DataError(
            Problem(
                "evaluate",
                f"{len(shared)} of its documents were used for calibration",
                "text that calibration has not seen",
                "Use another file, or evaluate.skip to begin after the calibration's documents",
            )
        )
    return windows, held_out


def _run(
    plan: Plan,
    windows: Windows,
    held_out: Windows | None,
    progress: Progress,
    clock: _Clock,
    fresh: bool,
) -> Artifact:
    evaluate = plan.stage(Evaluate)
    progress.phase("hash", len(plan.checkpoint.files), "files")
    weights = plan.weights_key(plan.store.digests(plan.checkpoint.files, progress.step).values())
    clock.lap("hash")
    identity = identities(plan, weights, windows, held_out)
    if fresh:
        for key in (identity.calibrate, identity.sweep, identity.evaluate):
            plan.store.forget(key)
    elif (finished := _finished(plan, identity)) is not None:
        return finished
    for each in passes(plan, identity.calibrate, identity.sweep, windows.tokens):
        sweep(plan, each, progress)
        clock.lap(each.name)
    for key in (identity.calibrate, identity.sweep):
        plan.store.drop_streams(key)  # of a run that was killed after its last layer
    reader = (
        SweepReader(plan.store, identity.sweep)
        if plan.rounds
        else MeasuredReader(plan.store, identity.calibrate)
    )
    check_complete(reader, plan)
    # where the current folder is the output, it is another one afterwards
    place = plan.output.resolve()
    with building(place) as folder:
        formats, inexact = _pack(plan, reader, folder, progress)
        clock.lap("pack")
        _write_statistics(plan, identity, reader, folder)
        full = MeasuredReader(plan.store, identity.calibrate)
        written = folder / next(iter(formats.values()), ".")
        measured = (
            measure(plan, identity.evaluate, reader, full, written, held_out, progress)
            if held_out
            else {}
        )
        quality = {name: variant["figures"] for name, variant in measured.items()}
        clock.lap("evaluate")
        verdicts = judge(quality, evaluate.gates.model_dump()) if evaluate else []
        failures = [str(verdict) for verdict in verdicts if not verdict.kept]
        report = make_report(
            plan,
            reader,
            fingerprint=identity.artifact,
            weights=weights,
            windows=windows,
            held_out=held_out,
            measured=measured,
            verdicts=verdicts,
            inexact=inexact,
            statistics=folder / STATISTICS,
        )
        write_json(folder / REPORT, report)
        write_page(folder / PAGE, report_page(report))
        files = file_entries(folder)
        manifest = {
            "quantflow": __version__,
            "name": plan.recipe.name,
            "fingerprint": identity.artifact,
            "status": "failed" if failures else "complete",
            "failed_gates": failures,
            "formats": formats,
            "tensor_parallel": plan.tp,
            "recipe": portable(plan),
            "source": {
                "model": portable(plan)["model"],
                "architecture": plan.checkpoint.architecture.name,
                "weights": weights,
                "files": {p.name: d for p, d in plan.store.digests(plan.checkpoint.files).items()},
            },
            "calibration": {"tokens": windows.digest, "source": windows.source}
            if windows.tokens
            else None,
            "kv_qparams": _kv_summary(plan, reader),
            "quality": quality,
            "notes": report["notes"],
            "files": files,
        }
        write_json(folder / MANIFEST, manifest)
        clock.lap("write")
        write_json(folder / RUN, _run_record(plan, clock.seconds))
        plan.store.remember(folder, place, {name: entry["sha256"] for name, entry in files.items()})
    return Artifact(plan.output, False, quality, failures, clock.seconds, report)


class _Clock:
    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = round(now - self._last, 3), now


def _finished(plan: Plan, identity: Identities) -> Artifact | None:
    try:
        manifest = read_manifest(plan.output)
        if (
            manifest is None
            or manifest["fingerprint"] != identity.artifact
            or not is_whole(plan.output, manifest)
        ):
            return None
        # Hashes are cached by size, time of change and header: a second look reads nothing.
        digests = plan.store.digests([plan.output / name for name in manifest["files"]])
        if any(
            digests[plan.output / name] != entry["sha256"]
            for name, entry in manifest["files"].items()
        ):
            return None
        report = read_json(plan.output / REPORT)
    except (ModelError, OSError):  # damaged: the artifact is written anew
        return None
    return Artifact(plan.output, True, manifest["quality"], manifest["failed_gates"], {}, report)


def _pack(
    plan: Plan, reader: SweepReader, folder: Path, progress: Progress
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Writes every format (and its ranks). Returns format -> folder relative to the artifact, and
    format -> what had to be put on another grid or rounded -> its relative error."""
    jobs = [prepared.job for prepared in plan.prepared]
    progress.phase(
        "pack", plan.config.layers * sum(1 + rank_folders(job) for job in jobs), "layers"
    )
    formats: dict[str, str] = {}
    errors: dict[str, dict[str, float]] = {}
    for pack, job in zip(plan.packs, jobs, strict=True):
        formats[pack.format] = "." if len(plan.packs) == 1 else pack.format
        target = folder / formats[pack.format]
        off: dict[str, float] = {}
        if plan.stage(KvQparams) and container_of(job).kv_inside:
            kv, off = _kv_of_ranks(plan, reader)
            job = replace(job, kv=kv)
        if pack.kv_scales:
            job = replace(job, kv=_fp8_scales(plan, reader), kv_scales=pack.kv_scales)
        results: Results = Requantizing(reader, job, errors=off) if pack.requantize else reader
        off |= write_checkpoint(target, job, results, progress.step)
        for rank, place in write_ranks(target, job, results, progress.step):
            if plan.stage(KvQparams):
                save_tensors(place / KV_FILE, _kv_tensors(plan, reader, rank, plan.tp))
        if off:
            errors[pack.format] = record(off)
            write_json(
                target / REQUANTIZED,
                {"from": "recipe", "to": pack.format, "relative_errors": errors[pack.format]},
            )
    return formats, errors


def _kv_of_ranks(plan: Plan, reader: SweepReader) -> tuple[dict[str, Tensor], dict[str, float]]:
    """KV parameters for a workspace: one a layer and rank, from the extremes of the rank's heads;
    and by how much scales by head or channel were widened for that, which the plan has allowed."""
    heads = plan.config.kv_heads // plan.tp
    ranks = [
        per_rank(_kv_tensors(plan, reader, rank, plan.tp), heads, 1, rounded=True)
        for rank in range(plan.tp)
    ]
    whole = {
        name: torch.stack([parameters[name] for parameters, _ in ranks]) if plan.tp > 1 else value
        for name, value in ranks[0][0].items()
    }
    return whole, {name: max(errors.get(name, 0.0) for _, errors in ranks) for name in ranks[0][1]}


def _kv_parameters(
    plan: Plan, reader: SweepReader, index: int, rank: int = 0, tp: int = 1
) -> dict[str, KVParameters]:
    settings = plan.stage(KvQparams)
    assert settings is not None
    return layer_parameters(reader.kv(index), settings, rank, tp)


def _kv_tensors(plan: Plan, reader: SweepReader, rank: int = 0, tp: int = 1) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for index in range(plan.config.layers):
        prefix = plan.checkpoint.attention(index)
        tensors.update(parameter_tensors(prefix, _kv_parameters(plan, reader, index, rank, tp)))
    return tensors


def _fp8_scales(plan: Plan, reader: SweepReader) -> dict[str, Tensor]:
    scales: dict[str, Tensor] = {}
    for index in range(plan.config.layers):
        prefix = plan.checkpoint.attention(index)
        scales |= fp8_scales(
            prefix, largest_of_extremes(reader.kv(index)), getattr(torch, plan.config.dtype)
        )
    return scales


def _kv_summary(plan: Plan, reader: SweepReader) -> dict[str, Any] | None:
    settings = plan.stage(KvQparams)
    if settings is None:
        return None
    summary: dict[str, Any] = {**settings.model_dump(mode="json"), "file": KV_FILE}
    if settings.granularity == "tensor":
        summary["layers"] = [
            {
                f"{letter}_{what}": float(f"{float(getattr(p, field)):.9g}")
                for letter, p in (("k", parameters["key"]), ("v", parameters["value"]))
                for what, field in (("scale", "scale"), ("zero_point", "zero_point"))
            }
            for parameters in (_kv_parameters(plan, reader, i) for i in range(plan.config.layers))
        ]
    return summary


def _write_statistics(plan: Plan, identity: Identities, reader: SweepReader, folder: Path) -> None:
    if plan.stage(KvQparams):
        save_tensors(folder / KV_FILE, _kv_tensors(plan, reader))
    if not plan.stage(Calibrate):
        return
    files = [TensorFile(plan.store.layer(identity.calibrate, i)) for i in range(plan.config.layers)]
    prefixes = [plan.checkpoint.architecture.layer_prefix(i) for i in range(plan.config.layers)]
    specs = {
        f"{p}.{n}": (info.dtype, info.shape)
        for p, f in zip(prefixes, files, strict=True)
        for n, info in f.tensors.items()
    }
    with TensorWriter(folder / STATISTICS, specs) as writer:
        for prefix, file in zip(prefixes, files, strict=True):
            for name in file.tensors:
                tensor = file.read(name)
                assert dtype_name(tensor.dtype) == "F32"
                writer.write(f"{prefix}.{name}", tensor)


def _run_record(plan: Plan, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": plan.device if plan.device == "cpu" else torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "peak_resident_bytes": peak_resident_bytes(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "host": platform.node(),
        "model": plan.model_place,
    }
