"""What the user wrote: a YAML file, parsed once at the edge into frozen, typed objects."""

from quantflow.bundled import BUNDLED, BUNDLED_NEW
from quantflow.recipe.loader import load_recipe
from quantflow.recipe.schema import (
    AUTO,
    DATA_NAMES,
    STAGE_TYPES,
    Awq,
    Calibrate,
    Calibration,
    Evaluate,
    Gates,
    Gptq,
    KvQparams,
    Nf4,
    Override,
    Pack,
    Recipe,
    Rtn,
    Shard,
    Stage,
    Weights,
    dump,
    json_schema,
)

__all__ = [
    "AUTO", "BUNDLED", "BUNDLED_NEW", "DATA_NAMES", "STAGE_TYPES", "Awq", "Calibrate",
    "Calibration", "Evaluate", "Gates", "Gptq", "KvQparams", "Nf4", "Override", "Pack", "Recipe",
    "Rtn", "Shard", "Stage", "Weights", "dump", "json_schema", "load_recipe",
]  # fmt: skip
