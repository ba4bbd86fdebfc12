"""Options that several verbs share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Model = Annotated[str | None, typer.Option("--model", metavar="DIR_OR_ID", help="Model directory or hub id, in place of the recipe's.")]
Output = Annotated[str | None, typer.Option("--output", metavar="DIR", help="Where the artifact goes, in place of the recipe's.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="dotted.path=value", help="Change one value of the recipe; may be repeated.")
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
