"""The statistics of `calibrate` as one file of the artifact."""

from __future__ import annotations

from quantflow.artifacts.artifact import STATISTICS
from quantflow.checkpoints.tensor_file import TensorFile, TensorWriter, dtype_name
from quantflow.pipeline.build import Build
from quantflow.stages.calibrate import Calibrate


def write_statistics(settings: Calibrate, build: Build) -> None:
    plan = build.plan
    layers, key = range(plan.config.layers), build.identity.calibrate
    files = [TensorFile(plan.store.layer(key, i)) for i in layers]
    prefixes = [plan.checkpoint.architecture.layer_prefix(i) for i in layers]
    specs = {
        f"{p}.{n}": (info.dtype, info.shape)
        for p, f in zip(prefixes, files, strict=True)
        for n, info in f.tensors.items()
    }
    with TensorWriter(build.folder / STATISTICS, specs) as writer:
        for prefix, file in zip(prefixes, files, strict=True):
            for name in file.tensors:
                tensor = file.read(name)
                assert dtype_name(tensor.dtype) == "F32"
                writer.write(f"{prefix}.{name}", tensor)
