"""`quantflow export` and `quantflow formats`: what is quantised once, for other software."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from quantflow.cli.console import Hints, console, progress, reporting
from quantflow.cli.options import Debug, Json

EXPORTING = Hints("", "Free memory: a few tensors are held at a time.")


def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Artifact, quantised checkpoint, or hub id.")],
    format: Annotated[str, typer.Option("--format", help="compressed-tensors, awq, gptq or gptq_v2: see `quantflow formats`.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the checkpoint goes.")],
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel ranks to cut beside the whole.")] = 1,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Bytes a file, at most: 5GB, 512MiB, or a number.")] = "5GB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a quantised checkpoint in another format, exactly or not at all."""
    with reporting(debug, EXPORTING):
        from quantflow.errors import Problem, UserError
        from quantflow.pipeline import export as exporting
        from quantflow.recipe.schema import parse_bytes

        try:
            most = parse_bytes(int(max_shard_size) if max_shard_size.isdecimal() else max_shard_size)
        except ValueError as error:
            raise UserError(Problem("--max-shard-size", repr(max_shard_size), str(error))) from error
        with progress() as shown:
            done = exporting.export(source, format, output, tp=tp, max_shard_bytes=most, progress=shown)
        if as_json:
            print(json.dumps({"output": str(done.output), "from": done.source_format, "to": done.format, "modules": done.modules}))
        else:
            console.print(
                f"{done.output} written: {done.modules} linears of {done.scheme}, {done.source_format} to {done.format}.", markup=False
            )


def formats(as_json: Json = False, debug: Debug = False) -> None:
    """Show what each checkpoint format can hold, and which engines read it."""
    with reporting(debug):
        from dataclasses import asdict, fields

        from quantflow.formats.abilities import ABILITIES, Ability

        if as_json:
            print(json.dumps({name: asdict(ability) for name, ability in ABILITIES.items()}, indent=2))
            return
        table = Table(title="Checkpoint formats")
        table.add_column("")
        for name in ABILITIES:
            table.add_column(name, no_wrap=len(name) > 10, overflow="fold")
        for field in fields(Ability):
            values = [getattr(ability, field.name) for ability in ABILITIES.values()]
            table.add_row(field.name.replace("_", " "), *(", ".join(map(str, v)) if isinstance(v, tuple) else v for v in values))
        console.print(table)
