"""`quantflow export` and `quantflow formats`: what is quantised once, for other software."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from quantflow.cli.console import Hints, by_reason, console, progress, reporting
from quantflow.cli.options import Debug, Json

EXPORTING = Hints("", "Free memory: a few tensors are held at a time.")


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Artifact, checkpoint, workspace, .gguf file, or hub id."
        ),
    ],
    format: Annotated[
        str, typer.Option("--format", help="As in a recipe's pack: see `quantflow formats`.")
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Where the checkpoint goes.")
    ],
    tp: Annotated[
        int, typer.Option("--tp", min=1, help="Tensor-parallel ranks to cut beside the whole.")
    ] = 1,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize", help="Round what the format cannot hold, and report the error."
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="With huggingface: float32 (exact), float16 or bfloat16."),
    ] = None,
    kv_scales: Annotated[
        str | None,
        typer.Option(
            "--kv-scales",
            metavar="fp8",
            help="Write scales of an fp8 KV cache into a compressed-tensors checkpoint.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str,
        typer.Option("--max-shard-size", help="Bytes a file, at most: 5GB, 512MiB, or a number."),
    ] = "5GB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint in another format: exactly, or not at all."""
    with reporting(debug, EXPORTING):
        from quantflow import api

        with progress() as watcher:
            done = api.export(
                source,
                format,
                output,
                tp=tp,
                max_shard_size=max_shard_size,
                requantize=requantize,
                dtype=dtype,
                kv_scales=kv_scales,
                progress=watcher,
            )
        if as_json:
            value = {
                "output": str(done.output),
                "from": done.source_format,
                "to": done.format,
                "modules": done.modules,
                "relative_errors": dict(done.errors),
                "left_out": dict(done.left_out),
                "notes": list(done.notes),
                "warnings": list(done.warnings),
            }
            print(json.dumps(value))
            return
        content = f"{done.modules} linears of {done.scheme}" if done.scheme else "plain weights"
        console.print(f"{done.output} written: {content}, {done.source_format} to {done.format}.")
        for line in by_reason(done.left_out):
            console.print(f"Left out: {line}.")
        for note in done.notes:
            console.print(f"Note: {note}.")
        for warning in done.warnings:
            console.print(f"Warning: {warning}.")
        if done.errors:
            worst = max(done.errors, key=lambda name: done.errors[name])
            mean = sum(done.errors.values()) / len(done.errors)
            console.print(
                f"Not exact: {len(done.errors)} tensors were put on another grid or rounded."
                f" Relative error {mean:.2e} on average, {done.errors[worst]:.2e} at most"
                f" ({worst}); each is in requantized.json."
            )


def formats(as_json: Json = False, debug: Debug = False) -> None:
    """Show what each format holds, and which engines load it."""
    with reporting(debug):
        from dataclasses import asdict, fields

        from quantflow.formats import FORMATS
        from quantflow.formats.engines import rows

        if as_json:
            shown = {
                name: {**asdict(form.ability), "engines": [asdict(row) for row in rows(name)]}
                for name, form in FORMATS.items()
            }
            print(json.dumps(shown, indent=2))
            return
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, style="bold")
        table.add_column(no_wrap=True, style="dim")
        for name, form in FORMATS.items():
            first = name
            for field in fields(form.ability):
                value = getattr(form.ability, field.name)
                text = ", ".join(map(str, value)) if isinstance(value, tuple) else value
                if text:
                    table.add_row(first, field.name.replace("_", " "), text)
                    first = ""
            for i, row in enumerate(rows(name)):
                engine, *_, known, note = row.cells
                table.add_row(
                    "",
                    "" if i else "engines",
                    f"{engine}: {row} [{known}]{f'; {note}' if note else ''}",
                )
            table.add_row()
        console.print(table)
