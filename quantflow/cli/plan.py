"""`quantflow plan`: what a run would do and cost, before any weight is read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantflow.cli.console import by_reason, console, facts, reporting
from quantflow.cli.options import Debug, Device, DeviceOption, Json, Model, Output, Set
from quantflow.cli.recipes import find
from quantflow.errors import Problem, UserError
from quantflow.units import size

if TYPE_CHECKING:
    from quantflow.pipeline.plan import Plan


def plan(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[RECIPE]", help="The recipe; not needed with --fit and --model."),
    ] = None,
    model: Model = None,
    output: Output = None,
    set_: Set = None,
    device: DeviceOption = Device.auto,
    config_only: Annotated[
        bool,
        typer.Option("--config-only", help="Plan from config.json alone, without weight files."),
    ] = False,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE",
            help="Propose what fits a device with so much memory: 24GB, 16GiB.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=1,
            help="With --fit: tokens of a text, answer included. Default: 4096, or the model's.",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="With --fit: texts at once. Default: 1.")
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option("--tp", min=1, help="With --fit: just so many devices, not 1 to 8."),
    ] = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            "--sensitivity",
            metavar="FILE",
            help="With --fit: what `quantflow sensitivity` measured.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a run would do and need; with --fit, what fits a device. That is the resolved
    steps, what the store already has, estimates of memory, disk and time, and every problem."""
    with reporting(debug):
        if fit is not None:
            from quantflow.cli.advice import show_advice

            # a device that may be another machine's
            where = "cpu" if device == Device.cpu else "cuda"
            show_advice(
                recipe,
                model,
                set_ or [],
                fit,
                context,
                batch,
                where,
                tp,
                sensitivity,
                config_only=config_only,
                as_json=as_json,
            )
            return
        options = {"--context": context, "--batch": batch, "--tp": tp, "--sensitivity": sensitivity}
        problems = [
            Problem(name, "without --fit", "--fit SIZE beside it")
            for name, value in options.items()
            if value is not None
        ]
        if recipe is None:
            problems.append(
                Problem("RECIPE", "none given", "a recipe, or --fit SIZE with --model DIR")
            )
        if problems or recipe is None:
            raise UserError(problems)
        from quantflow import api
        from quantflow.pipeline.status import stored_layers

        resolved = api.plan(
            find(recipe),
            model=model,
            output=output,
            overrides=set_ or (),
            device=device.value,
            config_only=config_only,
        )
        summary = summarise(resolved, stored_layers(resolved) if not config_only else None)
        if as_json:
            print(json.dumps(summary, indent=2))
        else:
            _show(summary)


def summarise(plan: Plan, stored: int | None) -> dict[str, Any]:
    """The plan as JSON-able data. stored: finished layers in the store, None where that is not
    known without reading weights."""
    from quantflow.pipeline.estimate import estimate
    from quantflow.pipeline.text_samples import Sample
    from quantflow.recipe import dump

    cost = estimate(plan)
    schemes = Counter(str(p.scheme) if p.scheme else f"kept ({p.reason})" for p in plan.linears)
    return {
        "name": plan.recipe.name,
        "model": plan.model,
        "architecture": plan.checkpoint.architecture.name,
        "layers": plan.config.layers,
        "device": plan.device,
        "output": str(plan.output),
        "calibration": _calibration(plan),
        "samples": {
            name: sample.begins
            for name, sample in plan.samples.items()
            if isinstance(sample, Sample) and (name != "calibration" or plan.reads_calibration)
        },
        "steps": dump(plan.recipe)["stages"],
        "linears": dict(schemes),
        "others": dict(Counter(plan.others.values())),
        "stored_layers": stored,
        "weight_bytes": plan.checkpoint.weight_bytes,
        "tensors": plan.account.as_dict() if not plan.checkpoint.config_only else None,
        "estimate": {
            "peak_memory_bytes": cost.memory_bytes,
            "store_bytes": cost.store_bytes,
            "artifact_bytes": cost.artifact_bytes,
            "seconds": round(cost.seconds, 1),
        },
        "notes": [*plan.notes, *plan.text_notes],
        "warnings": list(plan.warnings),
    }


def _calibration(plan: Plan) -> dict[str, Any] | None:
    section = plan.recipe.calibration if plan.reads_calibration else None
    return (
        {"data": section.file or section.data, "windows": section.samples, "length": section.seqlen}
        if section
        else None
    )


def _show(summary: dict[str, Any]) -> None:
    table = facts(f"Plan of {summary['name']}")
    weights = size(summary["weight_bytes"])
    table.add_row(
        "model",
        f"{summary['model']} ({summary['architecture']}, {summary['layers']} layers, {weights})",
    )
    table.add_row("output", summary["output"])
    table.add_row("device", summary["device"])
    if text := summary["calibration"]:
        table.add_row(
            "calibration", f"{text['windows']} windows of {text['length']} tokens of {text['data']}"
        )
    for name, text in summary["samples"].items():
        # with line breaks and control characters spelled out
        table.add_row("first text", f"of {name}: {text!r}")
    for step in summary["steps"]:
        ((name, settings),) = step.items()
        shown = ", ".join(
            f"{k} {v}" for k, v in settings.items() if v is not None and not isinstance(v, dict)
        )
        table.add_row("step", f"{name}{': ' if shown else ''}{shown}")
    for scheme, count in summary["linears"].items():
        table.add_row("linears", f"{count} × {scheme}")
    for reason, count in summary["others"].items():
        table.add_row("kept", f"{count} × {reason}")
    stored = summary["stored_layers"]
    table.add_row(
        "in the store",
        "not known before the weights are hashed"
        if stored is None
        else f"{stored} of {summary['layers']} layers",
    )
    estimate = summary["estimate"]
    table.add_row("peak memory", f"about {size(estimate['peak_memory_bytes'])} above the imports")
    table.add_row(
        "disk",
        f"about {size(estimate['artifact_bytes'])} artifact, {size(estimate['store_bytes'])} store",
    )
    table.add_row("time", f"about {estimate['seconds']:.0f} s")
    for fate in ("copied", "left_out"):
        for line in by_reason((summary["tensors"] or {}).get(fate, {})):
            table.add_row(fate.replace("_", " "), line)
    for note in summary["notes"]:
        table.add_row("note", note)
    console.print(table)
    for warning in summary["warnings"]:
        console.print(f"Warning: {warning}.")
