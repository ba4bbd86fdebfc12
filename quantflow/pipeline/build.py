"""An artifact on its way: what the stages that work on the finished result are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from quantflow.calibration.data import Windows
from quantflow.evaluate.gates import Verdict
from quantflow.pipeline.identities import Identities
from quantflow.pipeline.plan import Plan
from quantflow.pipeline.progress import Progress
from quantflow.pipeline.sweep import MeasuredReader, SweepReader


@dataclass
class Build:
    """folder: where the artifact is made. reader: the layers' results. texts: the windows of the
    sections that name one.

    What the stages leave for the report and the manifest: formats, format -> folder relative to the
    artifact; inexact, format -> what had to be put on another grid or rounded -> its relative
    error; measured, variant -> its figures and its profile; verdicts on gates; manifest, what else
    stands there.
    """

    plan: Plan
    folder: Path
    reader: SweepReader
    identity: Identities
    texts: Mapping[str, Windows]
    progress: Progress
    formats: dict[str, str] = field(default_factory=dict)
    inexact: dict[str, dict[str, float]] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def original(self) -> MeasuredReader:
        """What was measured on the full-precision model."""
        return MeasuredReader(self.plan.store, self.identity.calibrate)
