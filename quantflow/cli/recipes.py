"""Which file a recipe's name on the command line means."""

from __future__ import annotations

from pathlib import Path

from quantflow import bundled
from quantflow.cli.console import errors


def find(recipe: Path) -> Path:
    """The file itself, `NAME.yaml` for `NAME`, or the bundled recipe of that name, which is said.
    What is none of them stays as it is, for `load_recipe` to say so."""
    try:
        if recipe.exists():
            return recipe
        if not recipe.suffix and (local := recipe.with_suffix(".yaml")).is_file():
            return local
    except (OSError, ValueError):  # too long a name, a NUL
        return recipe
    path = bundled.recipe(recipe)
    if path:
        errors.print(
            f"{recipe}: no such file here, so the bundled recipe {path.stem} is taken: {path}"
        )
    return path or recipe
