"""The stages that a recipe may have, in the order in which it may have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantflow import recipe
from quantflow.recipe import Recipe, Stage
from quantflow.stages.awq import Awq
from quantflow.stages.block_ap import BlockAp
from quantflow.stages.calibrate import Calibrate
from quantflow.stages.evaluate import Evaluate
from quantflow.stages.gptq import Gptq
from quantflow.stages.kv_qparams import KvQparams
from quantflow.stages.nf4 import Nf4
from quantflow.stages.pack import Pack
from quantflow.stages.rtn import Rtn
from quantflow.stages.shard import Shard
from quantflow.stages.signround import Signround

STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (
        Calibrate,
        Awq,
        Gptq,
        Rtn,
        Nf4,
        BlockAp,
        Signround,
        KvQparams,
        Pack,
        Shard,
        Evaluate,
    )
}


def load_recipe(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    output: str | None = None,
) -> Recipe:
    """The recipe in a YAML file, or in what one would hold, as `quantflow.recipe.load` reads it, of
    these stages."""
    return recipe.load(source, STAGES, overrides, model=model, output=output)
