"""From a plan to an artifact: quantise, pack, shard, evaluate, write."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch

from quantflow import __version__
from quantflow.artifacts.artifact import (
    MANIFEST,
    PAGE,
    REPORT,
    RUN,
    building,
    file_entries,
    is_whole,
    read_manifest,
)
from quantflow.artifacts.store import write_json
from quantflow.calibration.data import Windows
from quantflow.checkpoints.directory import read_json
from quantflow.errors import DataError, ModelError, Problem
from quantflow.machine import peak_resident_bytes
from quantflow.pipeline.artifact import Artifact
from quantflow.pipeline.build import Build
from quantflow.pipeline.identities import Identities, identities
from quantflow.pipeline.output import check_output
from quantflow.pipeline.plan import Plan
from quantflow.pipeline.portable import portable
from quantflow.pipeline.progress import Progress
from quantflow.pipeline.report import make_report
from quantflow.pipeline.sweep import MeasuredReader, SweepReader, check_complete, passes, sweep
from quantflow.pipeline.windows import recipe_windows
from quantflow.report.page import report_page, write_page
from quantflow.stages.base import code, planned
from quantflow.tokenizers.load import load_tokenizer


def run(plan: Plan, progress: Progress, *, fresh: bool = False) -> Artifact:
    """Runs the plan, or finds its artifact finished. Raises UserError; a missed gate is in the
    result, not raised."""
    clock = _Clock()
    # what is wrong with them is said before anything is written, or gigabytes are hashed
    texts = _texts(plan)
    windows = texts.get("calibration", NO_WINDOWS)
    clock.lap("tokenize")
    check_output(plan)
    with plan.store.locked():
        plan.store.drop_torn()
        progress.phase("hash", len(plan.checkpoint.files), "files")
        digests = plan.store.digests(plan.checkpoint.files, progress.step)
        clock.lap("hash")
        weights = plan.weights_key(digests.values())
        identity = identities(plan, weights, windows, texts.get("evaluate"))
        if fresh:
            for key in (identity.calibrate, identity.sweep, identity.evaluate):
                plan.store.forget(key)
        elif (finished := _finished(plan, identity)) is not None:
            return finished
        for each in passes(plan, identity.calibrate, identity.sweep, windows.tokens):
            if sweep(plan, each, progress):
                clock.lap(each.name)
        for key in (identity.calibrate, identity.sweep):
            plan.store.drop_streams(key)  # of a run that was killed after its last layer
        return _build(plan, identity, texts, progress, clock)


NO_WINDOWS = Windows([], frozenset(), "")


def _texts(plan: Plan) -> dict[str, Windows]:
    """The windows of the sections that name a text; of the calibration where a stage reads it.
    Raises UserError, also for an overlap."""
    names = [n for n in plan.sections if n != "calibration" or plan.reads_calibration]
    tokenizer = load_tokenizer(plan.checkpoint.tokenizer_path) if names else None
    texts = {name: recipe_windows(plan, tokenizer, name) for name in names}
    seen = texts.get("calibration", NO_WINDOWS).documents
    for name, windows in texts.items():
        if name != "calibration" and (shared := seen & windows.documents):
            raise DataError(
                Problem(
                    name,
                    f"{len(shared)} of its documents were used for calibration",
                    "text that calibration has not seen",
                    f"Use another file, or {name}.skip to begin after the calibration's documents",
                )
            )
    return texts


def _build(
    plan: Plan, identity: Identities, texts: dict[str, Windows], progress: Progress, clock: _Clock
) -> Artifact:
    """The artifact of layers that are all in the store."""
    reader = (
        SweepReader(plan.store, identity.sweep)
        if plan.rounds
        else MeasuredReader(plan.store, identity.calibrate)
    )
    check_complete(reader, plan)
    # where the current folder is the output, it is another one afterwards
    place = plan.output.resolve()
    with building(place) as folder:
        build = Build(plan, folder, reader, identity, texts, progress)
        for stage in planned(plan.recipe):
            if stage.finish:
                code(stage.finish)(stage, build)
                clock.lap(stage.phase)
        report = make_report(build)
        write_json(folder / REPORT, report)
        write_page(folder / PAGE, report_page(report))
        files = file_entries(folder)
        manifest = _manifest(build, report, files)
        write_json(folder / MANIFEST, manifest)
        clock.lap("write")
        write_json(folder / RUN, _run_record(plan, clock.seconds))
        plan.store.remember(folder, place, {name: entry["sha256"] for name, entry in files.items()})
    failures = manifest["failed_gates"]
    return Artifact(plan.output, False, manifest["quality"], failures, clock.seconds, report)


def _manifest(build: Build, report: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
    plan, windows = build.plan, build.texts.get("calibration", NO_WINDOWS)
    failures = [str(verdict) for verdict in build.verdicts if not verdict.kept]
    return {
        "quantflow": __version__,
        "name": plan.recipe.name,
        "fingerprint": build.identity.artifact,
        "status": "failed" if failures else "complete",
        "failed_gates": failures,
        "formats": build.formats,
        "tensor_parallel": plan.tp,
        "recipe": portable(plan),
        "source": {
            "model": portable(plan)["model"],
            "architecture": plan.checkpoint.architecture.name,
            "weights": build.identity.weights,
            "files": {p.name: d for p, d in plan.store.digests(plan.checkpoint.files).items()},
        },
        "calibration": {"tokens": windows.digest, "source": windows.source}
        if windows.tokens
        else None,
        "kv_qparams": None,
        **build.manifest,
        "quality": report["quality"],
        "notes": report["notes"],
        "files": files,
    }


class _Clock:
    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._last, 3)
        self._last = now


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


def _run_record(plan: Plan, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": plan.device if plan.device == "cpu" else torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),  # on a CPU, sums are rounded by how they are shared out
        "peak_resident_bytes": peak_resident_bytes(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "host": platform.node(),
        "model": plan.model_place,
    }
