"""`quantflow release`: several recipes, judged together, with provenance and a comparison with the
previous release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from quantflow.cli.console import console, progress, reporting
from quantflow.cli.options import Debug, Device, DeviceOption, Json, Set
from quantflow.cli.recipes import find


def release(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="Recipes, YAML files.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="DIR",
            help="The release: an artifact a recipe, by the recipe's name.",
        ),
    ],
    previous: Annotated[
        Path | None,
        typer.Option(
            "--previous",
            metavar="DIR",
            help="The previous release, or its release.json, to compare with.",
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            help="How much worse than in the previous release a number may be: 0.1 is a tenth.",
        ),
    ] = 0.1,
    set_: Set = None,
    device: DeviceOption = Device.auto,
    builder_id: Annotated[
        str | None,
        typer.Option(
            "--builder-id",
            envvar="QUANTFLOW_BUILDER_ID",
            metavar="URI",
            help="Who builds, in the provenance.",
        ),
    ] = None,
    invocation_id: Annotated[
        str | None,
        typer.Option(
            "--invocation-id",
            envvar="QUANTFLOW_INVOCATION_ID",
            metavar="ID",
            help="Which of its runs this is.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run several recipes into one folder, with checksums.

    Beside SHA256SUMS lie signature-ready provenance and what has changed since the last release.

    What is finished is found again. All recipes are run before a missed gate, or a number that is
    worse than before, ends the command with exit code 3; the artifacts are kept.
    """
    with reporting(debug):
        from uuid import uuid4

        from quantflow.artifacts.provenance import LOCAL_BUILDER, Invocation
        from quantflow.errors import GateError
        from quantflow.pipeline.release import plan_release, release
        from quantflow.pipeline.release_comparison import METRICS, table

        plans = plan_release(
            [find(recipe) for recipe in recipes], output, set_ or (), device=device.value
        )
        invocation = Invocation(builder_id or LOCAL_BUILDER, invocation_id or str(uuid4()))
        with progress() as watcher:
            done = release(
                plans, output, invocation, watcher, previous=previous, tolerance=tolerance
            )
        if as_json:
            print(
                json.dumps(
                    {
                        "output": str(done.output),
                        **done.index,
                        "comparison": done.comparison,
                        "others": done.others,
                    },
                    indent=2,
                )
            )
        else:
            heads, rows = table(done.index, done.comparison)
            shown = Table(*heads, title=str(done.output))
            for column in shown.columns:
                column.overflow = "fold"  # on a narrow terminal, rather than cut
            for column in shown.columns[2 : 2 + len(METRICS)]:
                column.justify = "right"
            for row in rows:
                shown.add_row(*row)
            console.print(shown)
            for name in done.comparison["gone"] if done.comparison else ():
                console.print(f"{name} is no longer in the release.")
            if done.others:
                console.print(
                    f"Also in {done.output}, and no part of this release: {', '.join(done.others)}"
                )
        if done.failures:
            raise GateError(done.failures)
