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
Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="DIR_OR_ID", help="Model directory or hub id, in place of the recipe's."
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output", metavar="DIR", help="Where the artifact goes, in place of the recipe's."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="dotted.path=value",
        help="Change one value of the recipe; may be repeated.",
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute.")]
FieldOption = Annotated[
    str | None,
    typer.Option(
        "--field",
        metavar="NAME",
        help="Field or column of --data that holds the text, if not a usual one.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Mode(StrEnum):
    exact = "exact"
    fast = "fast"


class KV(StrEnum):
    auto = "auto"
    int8 = "int8"
    dynamic = "dynamic"
    full = "full"


ModelDirectory = Annotated[
    str, typer.Argument(metavar="DIR", help="Artifact, checkpoint or hub id.")
]
ModeOption = Annotated[
    Mode,
    typer.Option(
        "--mode",
        help="exact: the same tokens whatever else runs. fast: last bits depend on the batch.",
    ),
]
KVOption = Annotated[
    KV,
    typer.Option(
        "--kv",
        help=(
            "The KV cache. auto: int8 where the artifact has parameters for it. int8: calibrated,"
            " else dynamic. dynamic: int8, a scale a token and head. full: the model's dtype."
        ),
    ),
]
SessionLength = Annotated[
    int | None,
    typer.Option("--session-len", min=1, help="The longest context; by default the model's."),
]
CacheShare = Annotated[
    float | None,
    typer.Option(
        "--cache-max-entry-count",
        min=0.0,
        max=1.0,
        help="Share of the free memory for the KV cache.",
    ),
]
TensorParallel = Annotated[
    int, typer.Option("--tp", min=1, help="Tensor-parallel ranks, each a process.")
]
DialogueName = Annotated[
    str | None,
    typer.Option(
        "--dialogue", metavar="NAME", help="A dialogue format, in place of the model's own."
    ),
]
Eager = Annotated[
    bool, typer.Option("--eager", help="On a GPU, launch kernels one by one: no CUDA graphs.")
]
