"""The parameters of the KV cache as files beside a checkpoint, and in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantflow.artifacts.artifact import KV_FILE
from quantflow.checkpoints.tensor_file import save_tensors
from quantflow.pipeline.build import Build
from quantflow.pipeline.plan import Plan
from quantflow.pipeline.sweep import SweepReader
from quantflow.quant.kv import KVParameters
from quantflow.stages.kv_parameters import (
    fp8_scales,
    largest_of_extremes,
    layer_parameters,
    parameter_tensors,
    per_rank,
)
from quantflow.stages.kv_qparams import KvQparams


def write_parameters(settings: KvQparams, build: Build) -> None:
    save_tensors(build.folder / KV_FILE, kv_tensors(build.plan, build.reader))
    build.manifest["kv_qparams"] = _kv_summary(settings, build.plan, build.reader)


def kv_of_ranks(plan: Plan, reader: SweepReader) -> tuple[dict[str, Tensor], dict[str, float]]:
    """KV parameters for a workspace: one a layer and rank, from the extremes of the rank's heads;
    and by how much scales by head or channel were widened for that, which the plan has allowed."""
    heads = plan.config.kv_heads // plan.tp
    ranks = [
        per_rank(kv_tensors(plan, reader, rank, plan.tp), heads, 1, rounded=True)
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


def kv_tensors(plan: Plan, reader: SweepReader, rank: int = 0, tp: int = 1) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for index in plan.checkpoint.cached_layers:
        prefix = plan.checkpoint.attention(index)
        tensors.update(parameter_tensors(prefix, _kv_parameters(plan, reader, index, rank, tp)))
    return tensors


def fp8_scales_of(plan: Plan, reader: SweepReader) -> dict[str, Tensor]:
    scales: dict[str, Tensor] = {}
    for index in plan.checkpoint.cached_layers:
        prefix = plan.checkpoint.attention(index)
        scales |= fp8_scales(
            prefix, largest_of_extremes(reader.kv(index)), getattr(torch, plan.config.dtype)
        )
    return scales


def _kv_summary(settings: KvQparams, plan: Plan, reader: SweepReader) -> dict[str, Any]:
    checkpoint = plan.checkpoint
    summary: dict[str, Any] = {**settings.model_dump(mode="json"), "file": KV_FILE}
    if settings.granularity == "tensor":
        summary["layers"] = [
            {
                f"{letter}_{what}": float(f"{float(getattr(p, field)):.9g}")
                for letter, p in (("k", parameters["key"]), ("v", parameters["value"]))
                for what, field in (("scale", "scale"), ("zero_point", "zero_point"))
            }
            for parameters in (_kv_parameters(plan, reader, i) for i in checkpoint.cached_layers)
        ]
    return summary
