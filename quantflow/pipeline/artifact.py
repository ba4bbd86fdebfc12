"""What a run gives back: where the artifact is, and how good."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantflow.errors import GateError, Problem


@dataclass(frozen=True)
class Artifact:
    """What a recipe has made.

    Attributes:
        path: The directory: the checkpoint (of several formats, a folder each), its manifest, its
            report.
        existed: Whether it was there already, and nothing was done.
        quality: What was measured beside full precision, by variant: `weights`, `kv` and
            `weights_and_kv`, each with `perplexity`, `reference_perplexity`, `kl_mean` and `kl_p99`
            (nats a token), `top1` (a share) and `tokens`; empty without the stage `evaluate`.
        failures: The quality gates that were missed, each in a sentence.
        seconds: The time that each phase took; empty where it existed.
        report: The content of `report.json`.
    """

    path: Path
    existed: bool
    quality: dict[str, Any]
    failures: list[str]
    seconds: dict[str, float]
    report: dict[str, Any]

    def check_gates(self) -> None:
        """Raises where a quality gate was missed.

        Raises:
            GateError: With every gate that was.
        """
        hint = "The artifact is kept, marked as failed"
        if self.failures:
            raise GateError(
                [Problem(str(self.path), failure, hint=hint) for failure in self.failures]
            )
