"""`quantflow run`: the recipe from start to finish."""

from __future__ import annotations

import json
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table

from quantflow.cli.console import console, errors, progress, reporting, show_notes
from quantflow.cli.options import Debug, Device, DeviceOption, Json, Model, Output, RecipePath, Set
from quantflow.cli.recipes import find


def run(
    recipe: RecipePath,
    model: Model = None,
    output: Output = None,
    set_: Set = None,
    device: DeviceOption = Device.auto,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget this recipe's stored layers and begin again.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantise: from a recipe to an artifact, and proof of its quality.

    A killed or interrupted run goes on where it stopped. Exit codes: 0 done, 2 wrong input, 3 a
    quality gate failed, 4 disk or memory, 130 interrupted, 1 a fault of QuantFlow's.
    """
    with reporting(debug):
        from quantflow import api

        plan = api.plan(
            find(recipe), model=model, output=output, overrides=set_ or (), device=device.value
        )
        show_notes(plan.checkpoint.remarks)
        for warning in plan.warnings if not as_json else ():
            errors.print(f"Warning: {warning}.")
        with progress() as watcher:
            artifact = api.quantize(plan, fresh=fresh, enforce_gates=False, progress=watcher)
        show_notes(note for note in artifact.report["notes"] if note not in plan.notes)
        if as_json:
            value = {
                "output": str(artifact.path),
                "existed": artifact.existed,
                "quality": artifact.quality,
                "failed_gates": artifact.failures,
                "seconds": artifact.seconds,
                "warnings": list(plan.warnings),
            }
            print(json.dumps(value, indent=2))
        else:
            if artifact.existed:
                console.print(f"{artifact.path} is up to date: nothing to do.")
            else:
                took = ", ".join(
                    f"{name} {seconds:.1f} s" for name, seconds in artifact.seconds.items()
                )
                console.print(
                    f"{artifact.path} written ({took}).\nTo look at: {artifact.path}/report.html"
                )
            _show(artifact.report)
            if artifact.quality:
                console.print(quality_table(artifact.quality))
        artifact.check_gates()


def _show(report: dict[str, Any]) -> None:
    lines = report["linears"]
    lost = sorted(line["error"] for line in lines.values() if "error" in line)
    text = (
        f"{len(lines)} linears quantised, {len(report['kept'])} kept"
        if lines
        else "No weight was changed"
    )
    if lost:
        text += f"; output error: median {median(lost):.2e}, largest {lost[-1]:.2e}"
    console.print(text + ".")
    for name, fallback in list(report["fallbacks"].items())[:8]:
        console.print(f"  fallback: {name}: {fallback}")
    if len(report["fallbacks"]) > 8:
        console.print(f"  … {len(report['fallbacks']) - 8} more in report.json")


def quality_table(quality: dict[str, Any]) -> Table:
    """The quality of each variant beside full precision."""
    from quantflow.evaluate.variants import VARIANTS

    table = Table("", "perplexity", "KL mean", "KL p99", "top-1", title="Quality on held-out text")
    for column in table.columns[1:]:
        column.justify = "right"
    first = next(iter(quality.values()))
    table.add_row("full precision", f"{first['reference_perplexity']:.4f}", "0", "0", "100.00%")
    for name, q in quality.items():
        table.add_row(
            VARIANTS.get(name, name),
            f"{q['perplexity']:.4f}",
            f"{q['kl_mean']:.5f}",
            f"{q['kl_p99']:.4f}",
            f"{q['top1']:.2%}",
        )
    return table
