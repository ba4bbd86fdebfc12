"""`quantflow verify`: is an artifact what it says, and does it run?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from quantflow.cli.console import RUNNING, console, progress, reporting
from quantflow.cli.options import Debug, Device, DeviceOption, Json


def verify(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Artifact, or another checkpoint that QuantFlow reads."),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="The unquantised model, to compare every layer with.",
        ),
    ] = None,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check files, every layer, and text. It loads, compares every layer with the dequantised
    weights, and generates. Exit code 3 if anything is off."""
    with reporting(debug, RUNNING):
        from quantflow.checkpoints.checkpoint import resolve_model
        from quantflow.errors import GateError, Problem
        from quantflow.evaluate.verify import verify as run

        with progress() as watcher:
            folder = resolve_model(str(directory))
            checks = run(
                folder,
                reference,
                device.value,
                lambda steps: watcher.phase("verify", steps),
                watcher.step,
            )
        if as_json:
            print(json.dumps([check.as_dict() for check in checks], indent=2))
        else:
            table = Table("check", "", "what was found", title=str(directory))
            table.columns[2].overflow = "fold"
            for check in checks:
                mark = (
                    "-"
                    if check.passed is None
                    else "ok"
                    if check.passed
                    else Text("off", style="bold red")
                )
                table.add_row(check.name, mark, check.detail)
            console.print(table)
        off = [
            Problem(f"{directory} {check.name}", check.detail)
            for check in checks
            if check.passed is False
        ]
        if off:
            raise GateError(off)
