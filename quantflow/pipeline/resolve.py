"""What a recipe leaves to the model, `auto`, and the notes about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from quantflow.bundled import BUNDLED, BUNDLED_TEXT
from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.formats import FORMATS
from quantflow.formats.weight import LEAST_GROUP, usual_group
from quantflow.pipeline.linears import LinearPlan, inputs_of_rank, planned_linears
from quantflow.recipe import AUTO, Recipe
from quantflow.stages.base import planned
from quantflow.stages.pack import Pack

# tokens of a window of calibration, where the recipe says auto
SEQLEN = 2048
GROUPS = (128, 64, 32)  # sizes that engines have kernels for, the best known first


def resolved(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The recipe with the model's numbers where it says `auto`: lengths within its positions, and a
    group that fits all linears; and the first pack's choice of symmetric weights or not."""
    most, changes = checkpoint.config.max_positions, dict[str, object]()
    if recipe.weights.symmetric is None:
        first = next(
            (FORMATS[stage.format] for stage in recipe.stages if isinstance(stage, Pack)), None
        )
        symmetric = first is not None and first.prefers_symmetric(
            experts=bool(checkpoint.config.experts)
        )
        recipe = recipe.model_copy(
            update={"weights": recipe.weights.model_copy(update={"symmetric": symmetric})}
        )
    if recipe.calibration and recipe.calibration.seqlen == AUTO:
        changes["calibration"] = recipe.calibration.model_copy(update={"seqlen": min(SEQLEN, most)})
    changes["stages"] = tuple(stage.resolved(checkpoint.config) for stage in planned(recipe))
    if recipe.weights.group_size == AUTO:
        ranks = max(stage.ranks for stage in planned(recipe))
        linears = [
            p
            for p in planned_linears(recipe, checkpoint)
            if p.scheme is not None and p.scheme.group_size == AUTO
        ]
        shared = math.gcd(*(inputs_of_rank(checkpoint, ranks, p) for p in linears))
        changes["weights"] = recipe.weights.model_copy(
            update={"group_size": auto_group(shared) if linears else GROUPS[0]}
        )
    return recipe.model_copy(update=changes)


def auto_group(channels: int) -> int:
    """The largest of the group sizes that engines have kernels for that divides so many input
    channels, else the largest that does and is worth its scales, else -1: the whole row."""
    return next((size for size in GROUPS if channels % size == 0), 0) or usual_group(
        channels, GROUPS[0]
    )


def group_notes(asked: Recipe, recipe: Recipe, linears: Iterable[LinearPlan]) -> Iterator[str]:
    """Said where `auto` became a group that engines may have no kernels for. recipe: what was
    `asked`, resolved."""
    size = recipe.weights.group_size
    if asked.weights.group_size != AUTO or size in GROUPS:
        return
    odd = min(
        (p for p in linears if p.scheme and p.scheme.group_size == size),
        key=lambda p: math.gcd(p.shape[1], GROUPS[0]),
    )
    why = (
        f"none of {', '.join(map(str, GROUPS))} divides the inputs of all linears ({odd.name} has"
        f" {odd.shape[1]})"
    )
    what = (
        f"{size}, the largest that does"
        if size > 0
        else f"-1, a scale a row: no size from {LEAST_GROUP} up does"
    )
    yield f"weights.group_size auto is {what}; {why}"


def recipe_notes(recipe: Recipe) -> Iterator[str]:
    """What is to be known of what a recipe reads and does, each in a sentence."""
    calibration = recipe.calibration
    reads = any(stage.needs_calibration for stage in recipe.stages)
    if calibration and reads and not calibration.file and calibration.data == BUNDLED:
        yield (
            f"calibration reads {BUNDLED_TEXT}: --set calibration.data=FILE takes text like what"
            " the model will be asked"
        )
    for stage in planned(recipe):
        yield from stage.notes()
