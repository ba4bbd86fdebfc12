"""What a plan says of layers that differ: which cache K and V, in what shape, and what they hand on
beside hidden states."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.errors import Problem
from quantflow.recipe import Recipe
from quantflow.stages.kv_qparams import KvQparams


def cache_notes(recipe: Recipe, checkpoint: Checkpoint) -> Iterator[str]:
    """Which layers `kv_qparams` passes over."""
    layers, cached = checkpoint.config.layers, checkpoint.cached_layers
    if cached and len(cached) < layers and any(isinstance(s, KvQparams) for s in recipe.stages):
        without = [index for index in range(layers) if index not in cached]
        yield (
            f"kv_qparams: {len(without)} of {layers} layers cache no K and V of their own and get"
            f" no parameters: {', '.join(_runs(without))}"
        )


def row_notes(recipe: Recipe, checkpoint: Checkpoint) -> Iterator[str]:
    """Said where more goes from layer to layer than hidden states: memory and disk grow by it."""
    calibration, hidden = recipe.calibration, checkpoint.config.hidden
    if calibration and any(stage.needs_calibration for stage in recipe.stages):
        row = checkpoint.row_channels(calibration.seqlen, torch.float32)
        if row > hidden:
            yield (
                f"calibration carries {row} numbers a token from layer to layer, {hidden} of them"
                " its hidden state: layers get more than that, or leave something for later ones"
            )


def cache_problems(recipe: Recipe, checkpoint: Checkpoint) -> Iterator[Problem]:
    if not any(isinstance(stage, KvQparams) for stage in recipe.stages):
        return
    if not checkpoint.cached_layers:
        found = f"no layer of {checkpoint.architecture.name} caches K and V"
        yield Problem("kv_qparams", found, "a model that does", "Leave the stage out")


def latent_problem(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """What keeps the cache from having one scale of K and one of V, and what engines expect."""
    for index in checkpoint.cached_layers:
        shapes = checkpoint.cached(index)
        if shapes and shapes[0] != shapes[1]:
            (k_heads, k_width), (v_heads, v_width) = shapes
            return (
                f"layer {index} caches {k_heads} × {k_width} and {v_heads} × {v_width} values a"
                " token, as latent attention does",
                "K and V of one shape: engines have no names for scales of anything else",
            )
    return None


def _runs(numbers: list[int]) -> Iterator[str]:
    """Ascending numbers, those that follow one another as a range: 0-2, 5."""
    start = previous = numbers[0]
    for number in [*numbers[1:], None]:
        if number is not None and number == previous + 1:
            previous = number
            continue
        yield str(start) if start == previous else f"{start}-{previous}"
        if number is not None:
            start = previous = number
