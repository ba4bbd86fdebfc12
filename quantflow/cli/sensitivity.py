"""`quantflow sensitivity`: what each part of a model loses at each width, and the widths that a
budget buys."""

from __future__ import annotations

import json
import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from quantflow.cli.console import Hints, console, errors, progress, reporting, show_notes
from quantflow.cli.options import Debug, Device, DeviceOption, FieldOption, Json
from quantflow.units import size

if TYPE_CHECKING:
    from quantflow.pipeline.sensitivity import Findings

MEASURING = Hints(
    "What was measured is in the store: run the same command to go on.",
    "Lower --samples or --length, set QUANTFLOW_ACTIVATION_BYTES, or free memory; run again to"
    " go on.",
)
SHOWN = 5  # of the most sensitive parts


class By(StrEnum):
    fused = "fused"
    module = "module"
    layer = "layer"


def sensitivity(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="The full-precision model, a directory or hub id.")
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Text to measure on: text, JSON lines, JSON, CSV, Parquet, or a data set's name.",
        ),
    ],
    field: FieldOption = None,
    bits: Annotated[
        str, typer.Option("--bits", metavar="N,…", help="Widths to measure, from 2 to 8.")
    ] = "2,3,4,8",
    group_size: Annotated[
        int,
        typer.Option("--group-size", help="Input channels that share a scale; -1: the whole row."),
    ] = 128,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Fix the zero point at the middle code.")
    ] = False,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Windows to take.")] = 16,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens a window.")] = 512,
    skip: Annotated[
        int, typer.Option("--skip", min=0, help="Documents left out at the start.")
    ] = 0,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="SIZE",
            help="Choose widths so that all weights take at most this: 4GB, 900MiB.",
        ),
    ] = None,
    average_bits: Annotated[
        float | None,
        typer.Option(
            "--average-bits",
            help="Choose widths that take no more than all linears in so many bits would.",
        ),
    ] = None,
    granularity: Annotated[
        By,
        typer.Option(
            "--granularity",
            help=(
                "What gets a width of its own. fused: what engines fuse (q, k, v; gate, up)"
                " together."
            ),
        ),
    ] = By.fused,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Where the measurements go; a recipe with the widths goes beside it.",
        ),
    ] = Path("sensitivity.json"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what is in the store.")] = False,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find out what each part's bits cost, and spend them well. Every part is measured at several
    widths; then widths are chosen for a size."""
    with reporting(debug, MEASURING):
        from quantflow.errors import Problem, UserError
        from quantflow.pipeline.sensitivity import run
        from quantflow.pipeline.sensitivity_job import Settings, prepare
        from quantflow.pipeline.windows import left_out_notes
        from quantflow.recipe.values import parse_bytes

        # The options, with everything that is wrong with them.
        problems, most = [], None
        widths: tuple[int, ...] = ()
        if all(part.strip().isdecimal() for part in bits.split(",")):
            widths = tuple(sorted(int(part) for part in bits.split(",")))
        else:
            problems.append(
                Problem("--bits", repr(bits), "widths from 2 to 8, separated by commas")
            )
        try:
            most = (
                None
                if budget is None
                else parse_bytes(int(budget) if budget.isdecimal() else budget)
            )
        except ValueError as error:
            problems.append(Problem("--budget", repr(budget), str(error)))
        if problems:
            raise UserError(problems)
        # What will be measured, and about how long it takes.
        job = prepare(
            Settings(
                model,
                data,
                output,
                widths,
                group_size,
                symmetric,
                samples,
                length,
                skip,
                granularity.value,
                device.value,
                most,
                average_bits,
                field,
            )
        )
        show_notes(left_out_notes(text=job.windows))
        errors.print(
            f"{len(job.parts)} parts at {len(widths)} widths on {samples} windows of {length}"
            f" tokens: layers are computed {job.layer_runs()} times over them, in the order of"
            f" {_time(job.seconds())}. Fewer --samples or --bits take less; what is in the store"
            " takes nothing."
        )
        # The measurement.
        with progress() as watcher:
            findings = run(job, watcher, fresh=fresh)
        if as_json:
            print(json.dumps(findings.record))
            return
        _show(findings)


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} minutes"
        if seconds < 7200
        else f"{seconds / 3600:.0f} hours"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(
        *columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _show(findings: Findings) -> None:
    widths, settings = _widths(findings), findings.settings
    table = _table(
        "KL divergence in nats a token, that part alone rounded to nearest",
        "part",
        *(f"{b} bits" for b in widths),
    )
    worst = sorted(findings.measured, key=lambda m: -m.kl_mean[widths[0]])[:SHOWN]
    for m in worst:
        table.add_row(m.part.name, *(f"{m.kl_mean[b]:.2e}" for b in widths))
    if len(findings.measured) > SHOWN:
        others = [m for m in findings.measured if m not in worst]
        table.add_row(
            f"the other {len(others)}, mean",
            *(f"{sum(m.kl_mean[b] for m in others) / len(others):.2e}" for b in widths),
        )
    console.print(table)
    table = _table("The whole model", "linears", "all weights", "sum of its parts", "measured")
    for b, whole in findings.uniform.items():
        table.add_row(
            f"all in {b} bits",
            size(whole.stored_bytes),
            f"{whole.predicted:.4g}",
            f"{whole.measured:.4g}",
        )
    if mixed := findings.mixed:
        table.add_row(
            f"mixed, {mixed.average_bits:.2f} bits",
            size(mixed.stored_bytes),
            f"{mixed.predicted:.4g}",
            f"{mixed.measured:.4g}",
            style="bold",
        )
    console.print(table)
    console.print(
        "The sum assumes that errors add up, which they do while they are small; what counts is"
        " measured."
    )
    console.print(f"{settings.output} written.")
    if mixed and findings.recipe:
        held = ", ".join(findings.formats) or "no packed format"
        console.print(
            f"{findings.recipe} written: {mixed.average_bits:.2f} bits a weight within"
            f" {size(mixed.budget)}; formats that hold these widths together: {held}."
        )
        if not settings.symmetric and len(set(mixed.widths.values())) > 1:
            console.print(
                "transformers (5.23) loads mixed widths of compressed-tensors only with"
                " --symmetric."
            )
        console.print(f"Next: quantflow run {shlex.quote(str(findings.recipe))}")
    else:
        console.print(
            "Next: the same command with --budget SIZE or --average-bits N, which measures nothing"
            " again."
        )


def _widths(findings: Findings) -> tuple[int, ...]:
    """The measured widths, the fewest bits first."""
    return tuple(sorted(findings.settings.widths))
