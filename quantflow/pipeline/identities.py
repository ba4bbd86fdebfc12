"""Identities: what each result of a run is stored under, a hash of all that can change it.

Beside the inputs, the settings and the device that is the code: whatever of ours the modules below
import, with the versions of the libraries that compute. What makes tokens of texts can change
nothing but tokens, which are in the keys themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantflow.artifacts.fingerprint import LIBRARIES, code_digest, digest, file_digest
from quantflow.calibration.data import Windows
from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.decoder.native import computed_by
from quantflow.machine import device_name
from quantflow.pipeline.plan import BATCH_TOKENS, Plan
from quantflow.pipeline.portable import portable
from quantflow.stages.calibrate import Calibrate
from quantflow.stages.kv_qparams import KvQparams
from quantflow.tokenizers.load import tokenizer_files

# A layer stage names its own code. What runs the layer for it: a decoder's two kinds, of which the
# hosted one computes by transformers.
NATIVE = ("quantflow.decoder.native", "quantflow.decoder.passage")
HOSTED = ("quantflow.decoder.hosted", "quantflow.models.library")
READS = ("quantflow.checkpoints.checkpoint", "quantflow.decoder.stream")
WRITES = (
    "quantflow.stages.pack_writer",
    "quantflow.stages.pack_prepare",
    "quantflow.stages.requantize",
    "quantflow.stages.kv_parameters",
)
MEASURES = ("quantflow.evaluate.divergence", *WRITES)
RUNS = ("quantflow.evaluate.running",)  # where `evaluate` measures the engine
DESCRIBES = (
    "quantflow.report.page",
    "quantflow.evaluate.gates",
    "quantflow.artifacts.artifact",
    "quantflow.formats.reader",
)
# What puts these together: its own imports are a recipe's and a plan's.
LOOP = (
    "quantflow.pipeline.sweep",
    "quantflow.decoder.walk",
    "quantflow.decoder.decoder",
    "quantflow.stages.work",
)
MEASUREMENT = (
    "quantflow.pipeline.measure",
    "quantflow.pipeline.packing",
    "quantflow.pipeline.kv_files",
    "quantflow.decoder.decoder",
)
ARTIFACT = tuple(
    f"quantflow.pipeline.{name}"
    for name in (
        "plan",
        "resolve",
        "linears",
        "grid_problems",
        "portable",
        "report",
        "run",
        "build",
        "sweep",
        "packing",
        "kv_files",
        "statistics_file",
        "evaluation",
    )
)


@dataclass(frozen=True)
class Identities:
    """Of everything that a run stores. weights: of the checkpoint. calibrate, sweep: of the layers'
    results; evaluate: of the figures; artifact: of what is written in the end."""

    weights: str
    calibrate: str
    sweep: str
    evaluate: str
    artifact: str


def identities(plan: Plan, weights: str, windows: Windows, held_out: Windows | None) -> Identities:
    """weights: `weights_key`. windows: of the calibration. held_out: of `evaluate`."""
    calibrate = calibrate_key(plan, weights, windows.digest)
    sweep = sweep_key(plan, weights, windows.digest)
    kv = plan.stage(KvQparams)
    evaluate = digest(
        [
            "evaluate",
            sweep,
            calibrate if kv else "",
            held_out.digest if held_out else "",
            kv.model_dump(mode="json") if kv else None,
            plan.packs[0].model_dump(mode="json") if plan.packs else None,
            *_device(plan.device),
            plan.measures_engine,
            computing_code(
                plan.checkpoint, *MEASURES, *(RUNS if plan.measures_engine else ()),
                alone=MEASUREMENT,
            ),
        ]
    )  # fmt: skip
    copied = tokenizer_files(plan.checkpoint.tokenizer_path)
    artifact = digest(
        [
            "artifact",
            {name: file_digest(file) for name, file in copied.items()},
            calibrate if plan.stage(Calibrate) else "",
            sweep,
            evaluate if held_out else "",
            portable(plan),
            code_digest(*WRITES, *DESCRIBES, alone=ARTIFACT),
        ]
    )
    return Identities(weights, calibrate, sweep, evaluate, artifact)


def calibrate_key(plan: Plan, weights: str, tokens: str) -> str:
    """Identity of the layers that the stages on the full-precision model made. tokens: the digest
    of the calibration windows."""
    return digest(
        [
            "calibrate",
            weights,
            tokens,
            plan.checkpoint.raw_config,
            plan.compute_dtype,
            *_device(plan.device),
            BATCH_TOKENS,
            *_stages(plan, original=True),
        ]
    )


def sweep_key(plan: Plan, weights: str, tokens: str) -> str:
    """Identity of the rounded layers."""
    return digest(
        [
            "sweep",
            weights,
            tokens if plan.needs_stream else "",
            plan.checkpoint.raw_config,
            plan.compute_dtype,
            *_device(plan.device),
            plan.recipe.seed,
            [[p.module, str(p.scheme)] for p in plan.linears],
            plan.scale_dtypes,
            plan.min_zero,
            plan.stream_windows,
            BATCH_TOKENS,
            *_stages(plan, original=False),
        ]
    )


def _stages(plan: Plan, *, original: bool) -> tuple[list[Any], str]:
    """The stages that a layer goes through together: what of their settings counts, and a digest of
    all code that computes their results."""
    stages = [stage for stage in plan.layer_stages if stage.original is original]
    modules = {module for stage in stages for module in stage.modules()}
    settings = [[stage.name, stage.identity()] for stage in stages]
    return settings, computing_code(plan.checkpoint, *sorted(modules), *READS, alone=LOOP)


def computing_code(checkpoint: Checkpoint, *modules: str, alone: tuple[str, ...] = ()) -> str:
    """`code_digest` of `modules` and of what computes this checkpoint's layers."""
    if checkpoint.architecture.library is None:
        return code_digest(*modules, *NATIVE, alone=alone)
    libraries = (*LIBRARIES, "transformers")
    return code_digest(*modules, *HOSTED, alone=alone, libraries=libraries)


def _device(device: str) -> tuple[str, ...]:
    return device, device_name(device), computed_by(device)
