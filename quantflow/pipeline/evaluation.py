"""`evaluate` in a run: what was written is measured, and its gates are judged."""

from __future__ import annotations

from quantflow.evaluate.gates import judge
from quantflow.pipeline.build import Build
from quantflow.pipeline.measure import measure
from quantflow.stages.evaluate import Evaluate


def evaluate(settings: Evaluate, build: Build) -> None:
    written = build.folder / next(iter(build.formats.values()), ".")
    build.measured = measure(build, written, build.texts[settings.name])
    figures = {name: variant["figures"] for name, variant in build.measured.items()}
    build.verdicts = judge(figures, settings.gates.model_dump())
