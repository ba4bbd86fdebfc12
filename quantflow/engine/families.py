"""Which families the engine computes: those that have a table."""

from __future__ import annotations

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.errors import Problem
from quantflow.models.registry import ARCHITECTURES, not_followed


def engine_problem(checkpoint: Checkpoint) -> Problem | None:
    """What to say to who wants the engine to run a checkpoint that it cannot; None where it can."""
    if checkpoint.architecture.library is None:
        return None
    why = not_followed(checkpoint.raw_config)
    lacks = (
        f"which QuantFlow's own engine does not run so: {why}"
        if why
        else "which QuantFlow's own engine has no table for"
    )
    return Problem(
        str(checkpoint.path),
        f"{checkpoint.architecture.name}, {lacks}",
        "" if why else f"one of {', '.join(sorted(ARCHITECTURES))}",
        f"transformers runs it, and vLLM: `vllm serve {checkpoint.path}`",
    )
