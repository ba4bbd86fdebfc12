"""`quantflow report` and `quantflow compare`: an artifact's page, and several side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from quantflow.cli.console import console, facts, reporting
from quantflow.cli.options import Debug, Json
from quantflow.units import size

Page = Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Where the page goes.")]


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact.")],
    output: Page = None,
    debug: Debug = False,
) -> None:
    """Draw the page of an artifact anew. report.html is made from report.json: into the artifact,
    or to --output."""
    with reporting(debug):
        from quantflow.report.page import rebuild

        console.print(f"{rebuild(directory, output)} written.")


def compare(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR DIR…",
            help="Artifacts or exports; the first is what the others are held against.",
        ),
    ],
    output: Page = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Set artifacts side by side. Quality, size, errors, and where their recipes differ; --output
    writes a page."""
    with reporting(debug):
        from quantflow.report.comparison import comparison_page, make_comparison
        from quantflow.report.page import showing, write_page

        with showing(Path("report.json")):
            comparison = make_comparison(directories)
            page = comparison_page(comparison) if output else ""
            tables = _tables(comparison.as_dict()["artifacts"])
        if output:
            write_page(output, page)
        if as_json:
            print(json.dumps(comparison.as_dict(), indent=2))
            return
        for table in tables:
            console.print(table)
        for difference in comparison.differences:
            console.print(f"  {difference.path}: {' | '.join(difference.shown())}")
        for note in comparison.notes:
            console.print(f"note: {note}")
        if output:
            console.print(f"{output} written.")


HEADS = ("size", "perplexity", "KL mean", "KL p99", "top-1", "output error")


def _tables(rows: list[dict[str, Any]]) -> list[Table]:
    """One table, or on a narrow terminal one for each artifact."""
    if console.width < 80:
        return [_upright(row) for row in rows]
    table = Table("", *HEADS, title="Side by side", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify, column.overflow = "right", "fold"  # a number that is cut is another number
        column.min_width = 7
    for row in rows:
        table.add_row(row["name"], *_figures(row))
    return [table]


def _upright(row: dict[str, Any]) -> Table:
    table = facts(row["name"])
    for head, figure in zip(HEADS, _figures(row), strict=True):
        table.add_row(head, figure)
    return table


def _figures(row: dict[str, Any]) -> tuple[str, ...]:
    quality, error = row["quality"], row["median_error"]
    measured = (
        (
            f"{quality['perplexity']:.4f}",
            f"{quality['kl_mean']:.5f}",
            f"{quality['kl_p99']:.4f}",
            f"{quality['top1']:.2%}",
        )
        if quality
        else ("–",) * 4
    )
    return (
        size(row["bytes"]) if row["bytes"] else "–",
        *measured,
        f"{error:.2e}" if error is not None else "–",
    )
