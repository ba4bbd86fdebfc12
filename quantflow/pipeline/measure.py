"""`evaluate` in a recipe: what was written, its KV cache and both, against the full-precision
model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantflow.calibration.data import Windows
from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.engine.kv_cache import KVFormat
from quantflow.evaluate.divergence import Model, Variant, compare
from quantflow.evaluate.running import Running
from quantflow.formats.reader import Weights
from quantflow.pipeline.build import Build
from quantflow.pipeline.plan import Plan
from quantflow.pipeline.room import room
from quantflow.quant.kv import KVParameters
from quantflow.stages.evaluate import Evaluate
from quantflow.stages.kv_parameters import layer_parameters, layer_tensors, rounding
from quantflow.stages.kv_qparams import KvQparams


def measure(build: Build, checkpoint: Path, held_out: Windows) -> dict[str, Any]:
    """variant -> its `figures` and its `profile`, from the store where they were measured before:
    `weights`, and with kv_qparams `kv` and `weights_and_kv`; `kv` alone, of what was
    written, where no stage rounds the weights."""
    plan, key, progress = build.plan, build.identity.evaluate, build.progress
    settings = plan.stage(KvQparams)
    stored = plan.store.read_json(key, "quality")
    if isinstance(stored, dict) and all(
        isinstance(entry, dict) and {"figures", "profile"} <= set(entry)
        for entry in stored.values()
    ):
        return stored
    reference = Weights(plan.checkpoint.path)

    # The full-precision model's own extremes: AWQ rescales v, so the quantised model's parameters
    # would not fit it.
    def original(index: int) -> dict[str, KVParameters]:
        assert settings is not None
        return layer_parameters(build.original.kv(index), settings)

    def quantised(index: int) -> dict[str, KVParameters]:
        assert settings is not None
        return layer_parameters(build.reader.kv(index), settings)

    variants: dict[str, Model]
    if not plan.rounds:
        cached = Variant(Weights(checkpoint), rounding(original))
        variants = {"kv": _running(plan, checkpoint, original) if plan.measures_engine else cached}
    elif plan.measures_engine:
        variants = {"weights": _running(plan, checkpoint, None)}
        if settings:
            variants["kv"] = _running(plan, plan.checkpoint.path, original)
            variants["weights_and_kv"] = _running(plan, checkpoint, quantised)
    else:
        weights = Weights(checkpoint)
        variants = {"weights": Variant(weights)}
        if settings:
            variants["kv"] = Variant(reference, rounding(original))
            variants["weights_and_kv"] = Variant(weights, rounding(quantised))
    progress.phase("evaluate", plan.config.layers * (1 + len(variants)), "layers")
    place = room(plan.device, plan.store.folder(key))
    divergences = compare(Variant(reference), variants, held_out.tokens, place, progress.advance)
    measured = {
        name: {"figures": divergence.as_dict(), "profile": divergence.profile.as_dict()}
        for name, divergence in divergences.items()
    }
    plan.store.write_json(key, "quality", measured)
    return measured


def _running(
    plan: Plan, folder: Path, parameters: Callable[[int], dict[str, KVParameters]] | None
) -> Running:
    """The engine on a checkpoint, its KV cache in int8 with those parameters, or in full
    precision."""

    def make() -> Engine:
        layers = range(plan.config.layers) if parameters else ()
        kv = KVFormat(
            bool(parameters),
            tuple(layer_tensors(parameters(i)) for i in layers) if parameters else (),
        )
        evaluate = plan.stage(Evaluate)
        assert evaluate is not None
        # One window after the other, so one window's room.
        longest = max(evaluate.length + 1, plan.config.context) if plan.config.stretches else None
        return Engine(
            folder, EngineConfig(device=plan.device, max_batch_size=1, session_len=longest), kv=kv
        )

    return Running(make)
