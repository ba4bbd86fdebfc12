"""What an artifact's quality was measured against and on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantflow.artifacts.fingerprint import digest


def measured_on(report: Mapping[str, Any]) -> str | None:
    """Identity of the original weights, of the tokens (which windows of which text, by which
    tokenizer) and of the way of measuring; None where nothing was measured. Numbers of two reports
    that differ in it cannot be set against each other.

    What the artifact itself is, its int8 KV cache included, is no part of it: that is what is
    measured.
    """
    evaluation = report["evaluation"]
    return (
        digest([report["source"]["weights"], evaluation["tokens"], evaluation["engine"]])
        if evaluation
        else None
    )
