"""A recipe as it may be written into an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantflow.pipeline.plan import Plan
from quantflow.recipe import dump


def portable(plan: Plan) -> dict[str, Any]:
    """The recipe without what is particular to a machine: places of files become their names, the
    output is left out."""

    def shorten(section: dict[str, Any]) -> dict[str, Any]:
        return {
            k: Path(v).name
            if k in ("data", "file", "model") and isinstance(v, str) and Path(v).exists()
            else v
            for k, v in section.items()
        }

    recipe = shorten({k: v for k, v in dump(plan.recipe).items() if k != "output"})
    recipe["calibration"] = shorten(recipe["calibration"]) if recipe["calibration"] else None
    recipe["stages"] = [
        {name: shorten(settings) for name, settings in stage.items()} for stage in recipe["stages"]
    ]
    return recipe
