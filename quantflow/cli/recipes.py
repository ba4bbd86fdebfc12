"""Which file a recipe's name on the command line means."""

from __future__ import annotations

from pathlib import Path

from quantflow import bundled
from quantflow.cli.console import errors


def find(recipe: Path) -> Path:
    """The file that the name means, as `bundled.find` has it; a bundled one is said."""
    place = bundled.find(recipe)
    if place != recipe and place.parent == bundled.folder() / "recipes":
        errors.print(
            f"{recipe}: no such file here, so the bundled recipe {place.stem} is taken: {place}"
        )
    return place
