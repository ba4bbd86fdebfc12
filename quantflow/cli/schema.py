"""`quantflow schema`: the JSON schema of recipes, for editors, or the same as a page to read."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from quantflow.cli.console import reporting
from quantflow.cli.options import Debug


def schema(
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Print the reference of recipes instead: docs/recipe.md."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Print the JSON schema of a recipe."""
    with reporting(debug):
        from quantflow.recipe import json_schema
        from quantflow.recipe.reference import markdown as page
        from quantflow.stages.registry import STAGES

        print(page(STAGES) if markdown else json.dumps(json_schema(STAGES), indent=2))
