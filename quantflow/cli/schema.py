"""`quantflow schema`: the JSON schema of recipes, for editors."""

from __future__ import annotations

import json

from quantflow.cli.console import reporting
from quantflow.cli.options import Debug


def schema(debug: Debug = False) -> None:
    """Print the JSON schema of a recipe."""
    with reporting(debug):
        from quantflow.recipe import json_schema

        print(json.dumps(json_schema(), indent=2))
