"""`pack` in a run: a checkpoint in one format, and its ranks."""

from __future__ import annotations

from dataclasses import replace

from quantflow.artifacts.artifact import KV_FILE
from quantflow.artifacts.store import write_json
from quantflow.checkpoints.tensor_file import save_tensors
from quantflow.formats.reader import REQUANTIZED
from quantflow.pipeline.build import Build
from quantflow.pipeline.kv_files import fp8_scales_of, kv_of_ranks, kv_tensors
from quantflow.stages.containers import container_of
from quantflow.stages.kv_qparams import KvQparams
from quantflow.stages.pack import Pack
from quantflow.stages.pack_pieces import Results
from quantflow.stages.pack_writer import rank_folders, write_checkpoint, write_ranks
from quantflow.stages.requantize import Requantizing, record


def pack_checkpoint(pack: Pack, build: Build) -> None:
    plan, reader, step = build.plan, build.reader, build.progress.step
    if not build.formats:  # the first of them begins the phase for all
        folders = sum(1 + rank_folders(prepared.job) for prepared in plan.prepared)
        build.progress.phase("pack", plan.config.layers * folders, "layers")
    job = plan.prepared[plan.packs.index(pack)].job
    build.formats[pack.format] = "." if len(plan.packs) == 1 else pack.format
    target = build.folder / build.formats[pack.format]
    has_kv = plan.stage(KvQparams) is not None
    off: dict[str, float] = {}
    if has_kv and container_of(job).kv_inside:
        kv, off = kv_of_ranks(plan, reader)
        job = replace(job, kv=kv)
    if pack.kv_scales:
        job = replace(job, kv=fp8_scales_of(plan, reader), kv_scales=pack.kv_scales)
    results: Results = Requantizing(reader, job, errors=off) if pack.requantize else reader
    off |= write_checkpoint(target, job, results, step)
    for rank, place in write_ranks(target, job, results, step):
        if has_kv:
            save_tensors(place / KV_FILE, kv_tensors(plan, reader, rank, plan.tp))
    if off:
        errors = build.inexact[pack.format] = record(off)
        to = {"from": "recipe", "to": pack.format, "relative_errors": errors}
        write_json(target / REQUANTIZED, to)
