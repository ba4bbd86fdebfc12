"""What the user wrote: a YAML file, parsed once at the edge into frozen, typed objects."""

from quantflow.bundled import BUNDLED, BUNDLED_NEW
from quantflow.recipe.loader import load
from quantflow.recipe.schema import (
    Calibration,
    Override,
    Recipe,
    Weights,
    dump,
    json_schema,
    read_recipe,
)
from quantflow.recipe.stage import Stage, Stages
from quantflow.recipe.values import AUTO, DATA_NAMES, NamesText

__all__ = [
    "AUTO", "BUNDLED", "BUNDLED_NEW", "DATA_NAMES", "Calibration", "NamesText", "Override",
    "Recipe", "Stage", "Stages", "Weights", "dump", "json_schema", "load", "read_recipe",
]  # fmt: skip
