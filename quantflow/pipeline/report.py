"""What a run says of itself, as JSON: `report.json`, from which `quantflow.report` makes the page.

Nothing of the machine or the time is in it: the same recipe gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from quantflow.artifacts.artifact import STATISTICS
from quantflow.calibration.data import Windows
from quantflow.checkpoints.tensor_file import TensorFile
from quantflow.pipeline.build import Build
from quantflow.pipeline.plan import Plan
from quantflow.pipeline.portable import portable
from quantflow.pipeline.sweep import SweepReader
from quantflow.pipeline.windows import left_out_notes
from quantflow.quant.fit import shown
from quantflow.report.page import VERSION
from quantflow.stages.calibrate import Calibrate
from quantflow.stages.gptq import Gptq
from quantflow.stages.kv_qparams import KvQparams
from quantflow.stages.pack_writer import checkpoint_bytes

# of the memory table, as far as the model's positions go
BATCHES, CONTEXTS = (1, 8, 16, 32, 48), (512, 2048, 4096, 32768)
AWQ_NAME = re.compile(r"a\^(-?[0-9.]+)(?: w\^-?[0-9.]+)?")


def make_report(build: Build) -> dict[str, Any]:
    plan, reader, texts = build.plan, build.reader, build.texts
    statistics = build.folder / STATISTICS
    windows, held_out = texts.get("calibration"), texts.get("evaluate")
    config, asked = plan.config, portable(plan)
    lines, scales, experts = _linears(build)
    training = list(_training(build))
    kept = {p.module: p.reason for p in plan.linears if p.scheme is None} | plan.others
    kept[plan.checkpoint.architecture.head] = (
        "tied to the embedding" if config.tied else "weights.ignore"
    )
    return {
        "version": VERSION,
        "name": plan.recipe.name,
        "status": "complete" if all(verdict.kept for verdict in build.verdicts) else "failed",
        "fingerprint": build.identity.artifact,
        "asked": asked,
        "model": {
            "architecture": plan.checkpoint.architecture.name,
            "layers": config.layers,
            "hidden": config.hidden,
            "heads": config.heads,
            "kv_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "vocabulary": config.vocabulary,
            "dtype": config.dtype,
            "max_positions": config.context,
            "experts": config.experts,
        },
        "source": {
            "model": asked["model"],
            "weights": build.identity.weights,
            "bytes": plan.checkpoint.weight_bytes,
        },
        "calibration": _text(windows) if windows else None,
        "evaluation": {**_text(held_out), "engine": plan.measures_engine} if held_out else None,
        "quality": {name: variant["figures"] for name, variant in build.measured.items()},
        "profile": {name: variant["profile"] for name, variant in build.measured.items()},
        "gates": [verdict.as_dict() for verdict in build.verdicts],
        "linears": lines,
        "kept": kept,
        **({"experts": experts} if experts else {}),
        "activations": _activations(plan, statistics) if statistics.is_file() else {},
        "awq": scales,
        **({"training": training} if training else {}),
        "fallbacks": {
            name: line["fallback"] for name, line in lines.items() if line.get("fallback")
        },
        **({"requantized": build.inexact} if build.inexact else {}),
        "kv": _kv_ranges(plan, reader) if plan.stage(KvQparams) else None,
        "sizes": {
            pack.format: checkpoint_bytes(prepared.job)
            for pack, prepared in zip(plan.packs, plan.prepared, strict=True)
        },
        "memory": _memory(plan),
        "tensors": plan.account.as_dict(),
        "notes": [*plan.notes, *left_out_notes(calibration=windows, evaluate=held_out)],
        "warnings": list(plan.warnings),
    }


def _expert_tokens(build: Build, index: int, layer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """How many tokens a layer's experts had, in each stage that took statistics of them: the least,
    the median, and how many had none."""
    if build.plan.stage(Calibrate):
        measured = SweepReader(build.plan.store, build.identity.calibrate).report(index)
        if "experts" in measured:
            yield {"layer": index, "stage": Calibrate.name, **measured["experts"]}
    if "experts" in layer:
        yield {"layer": index, "stage": Gptq.name, **layer["experts"]}


def _linears(build: Build) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """What was done to each linear, by its module; the scales that `awq` chose, a line a group; and
    the tokens of experts, a line a mixture."""
    plan, reader = build.plan, build.reader
    lines: dict[str, Any] = {}
    experts: list[dict[str, Any]] = []
    scales: list[dict[str, Any]] = []
    for index in range(plan.config.layers):
        prefix = plan.checkpoint.architecture.layer_prefix(index)
        layer = reader.report(index)
        experts += _expert_tokens(build, index, layer)
        lines |= {
            f"{prefix}.{name}": {"layer": index, **layer["linears"][name]}
            for name in plan.schemes(index)
        }
        scales += [
            {
                "layer": index,
                **line,
                "exponent": exponent(line["scale"]),
                "group": f"{prefix}.{line['group']}",
            }
            for line in layer.get("awq", [])
        ]
    return lines, scales, experts


def _training(build: Build) -> Iterator[dict[str, Any]]:
    """Of each layer that was trained, the losses on windows that it was not trained on."""
    for index in range(build.plan.config.layers):
        layer = build.reader.report(index)
        if "training" in layer:
            yield {"layer": index, **layer["training"]}


def exponent(scale: str) -> float | None:
    """The exponent of the activations in a scale that `awq` chose by name: 0.5 for `a^0.5 w^-0.5`,
    half of it for `sqrt(…)`, 0 for the identity; None for a name that has none."""
    if scale.startswith("identity"):
        return 0.0
    root = scale.startswith("sqrt(")
    match = AWQ_NAME.fullmatch(scale.removeprefix("sqrt(").removesuffix(")") if root else scale)
    return float(match[1]) / (2 if root else 1) if match else None


def _text(windows: Windows) -> dict[str, Any]:
    record = {
        "source": windows.source,
        "tokens": windows.digest,
        "windows": len(windows.tokens),
        "length": len(windows.tokens[0]),
    }
    return record | ({"left_out": windows.left_out.as_dict()} if windows.left_out else {})


def _activations(plan: Plan, statistics: Path) -> dict[str, dict[str, Any]]:
    """Of every linear's input channels: the largest magnitude, that of the median channel, and the
    mean magnitude. An expert that no token reached has none."""
    file, magnitudes = TensorFile(statistics), {}
    for linear in plan.linears:
        name = f"{linear.module}.input"
        if f"{name}.absmax" in file.tensors:
            absmax, absmean = file.read(f"{name}.absmax"), file.read(f"{name}.absmean")
            magnitudes[linear.module] = {
                "layer": linear.layer,
                "absmax": shown(float(absmax.max())),
                "median_absmax": shown(float(absmax.median())),
                "absmean": shown(float(absmean.mean())),
            }
    return magnitudes


def _kv_ranges(plan: Plan, reader: SweepReader) -> dict[str, Any]:
    """key, value -> low, high -> layers -> heads: the extremes over a head's channels, of what the
    quantised model produced; None for heads that a layer does not cache."""
    layers = [reader.kv(index) for index in range(plan.config.layers)]

    def ends(name: str, reduce: Any) -> list[list[float | None]]:
        rows = [
            [shown(float(v)) for v in reduce(layer[name], -1)] if layer else [] for layer in layers
        ]
        most = max(map(len, rows))
        return [row + [None] * (most - len(row)) for row in rows]

    return {
        name: {"low": ends(f"{name}.min", torch.amin), "high": ends(f"{name}.max", torch.amax)}
        for name in ("key", "value")
    }


def _memory(plan: Plan) -> list[dict[str, int]]:
    """Bytes by batch and context: weights as stored, before and after, and the engine's KV cache in
    the model's dtype and in int8."""
    config = plan.config
    packed = (
        checkpoint_bytes(plan.prepared[0].job) if plan.prepared else plan.checkpoint.weight_bytes
    )
    values = sum(  # a token's
        heads * width
        for index in plan.checkpoint.cached_layers
        for heads, width in plan.checkpoint.cached(index) or ()
    )
    full, int8 = values * getattr(torch, config.dtype).itemsize, values
    contexts = [c for c in CONTEXTS if c <= config.context] or [config.context]
    return [
        {
            "batch": batch,
            "context": context,
            "weights_before": plan.checkpoint.weight_bytes,
            "weights_after": packed,
            "kv_before": batch * context * full,
            "kv_int8": batch * context * int8,
        }
        for context in contexts
        for batch in BATCHES
    ]
