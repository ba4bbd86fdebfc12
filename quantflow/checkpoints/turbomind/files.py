"""What the files of a TurboMind workspace are called, and which of them lie in a folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from quantflow.checkpoints.turbomind.config import CONFIG, WEIGHTS
from quantflow.errors import ModelError, Problem

TOKENIZER = "triton_models/tokenizer"  # where LMDeploy looks for its files

KV_PARTS = ("k_scale", "k_zero_point", "v_scale", "v_zero_point")


def kv_name(layer: int, part: str) -> str:
    return f"model.layers.{layer}.self_attn.{part}"


def kv_file(layer: int, rank: int) -> str:
    return f"layers.{layer}.past_kv_scale.{rank}.weight"


def is_workspace(path: Path) -> bool:
    """Whether a directory holds a TurboMind workspace."""
    return os.path.isfile(path / WEIGHTS / CONFIG)


def weight_files(path: Path) -> tuple[dict[str, int], list[Problem]]:
    """Name -> bytes of the regular files beside config.ini, and what must not be there: links that
    leave the workspace."""
    root, weights = os.path.realpath(path), path / WEIGHTS
    sizes: dict[str, int] = {}
    problems = []
    try:
        entries = list(os.scandir(weights))
    except OSError as error:
        raise ModelError(
            Problem(str(weights), error.strerror or str(error), "a readable directory")
        ) from error
    for entry in entries:
        target = os.path.realpath(entry.path)
        if os.path.commonpath((root, target)) != root:
            problems.append(
                Problem(entry.path, f"a link to {target}", "a file inside the workspace")
            )
            continue
        try:
            status = entry.stat()
        except OSError as error:
            problems.append(Problem(entry.path, error.strerror or str(error), "a readable file"))
            continue
        if stat.S_ISREG(status.st_mode):
            sizes[entry.name] = status.st_size
    return sizes, sorted(problems, key=lambda problem: problem.where)
