"""What every stage in the registry says of itself."""

from __future__ import annotations

import inspect

import pytest
import yaml

from quantflow.recipe import Stage, read_recipe
from quantflow.stages.base import PlannedStage, code
from quantflow.stages.registry import STAGES
from quantflow.stages.rounding import RoundingStage


@pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))
def test_its_code_is_where_it_says(stage: type[PlannedStage]) -> None:
    """Each takes the stage, or for a rounder the rules of grids, and what it works on."""
    places = [place for place in (stage.layer, stage.finish) if place]
    if issubclass(stage, RoundingStage) and stage.rounder:
        places.append(stage.rounder)
    for place in places:
        assert len(inspect.signature(code(place)).parameters) == 2, place
    assert places or stage.name == "shard"  # whose ranks `pack` writes


@pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))
def test_its_examples_are_of_itself(stage: type[Stage]) -> None:
    for example in (stage.example, *stage.examples.values()):
        (entry,) = yaml.safe_load(example)
        recipe = read_recipe({"name": "x", "stages": [entry]}, STAGES)
        assert type(recipe.stages[0]) is stage
