"""`quantflow eval`: a checkpoint against its reference, on text; or on questions with right
answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from quantflow.cli.console import RUNNING, console, progress, reporting
from quantflow.cli.eval_tasks import evaluate_tasks, settings_of
from quantflow.cli.options import (
    KV,
    Debug,
    Device,
    DeviceOption,
    FieldOption,
    Json,
    KVOption,
    Mode,
    ModeOption,
)
from quantflow.errors import Problem, UserError

# Options that mean something in one of the two forms alone.
OF_TEXT = ("data", "field", "windows", "length", "skip", "engine")
OF_TASKS = ("delimiter", "few_shot", "limit", "batch", "stop", "max_tokens", "mode", "output")


def evaluate(
    context: typer.Context,
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Artifact or checkpoint, quantised or not.")
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="The full-precision model. With --tasks: any second model, for the paired test.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Text (<|endoftext|> between documents), JSON lines, JSON, CSV, Parquet.",
        ),
    ] = None,
    field: FieldOption = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows to take.")] = 64,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens a window.")] = 512,
    skip: Annotated[
        int, typer.Option("--skip", min=0, help="Documents left out at the start.")
    ] = 0,
    engine: Annotated[
        bool,
        typer.Option(
            "--engine", help="Measure the engine's own kernels and KV cache, not float32."
        ),
    ] = False,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="FILE",
            help="Questions with right answers, in place of text, as JSON lines; may be repeated.",
        ),
    ] = None,
    delimiter: Annotated[
        list[str] | None,
        typer.Option(
            "--delimiter",
            metavar="TEXT",
            help=(
                "Between question and answer, '\\nAnswer: ' say; one, or one a file. A space if not"
                " given."
            ),
        ),
    ] = None,
    few_shot: Annotated[
        int,
        typer.Option(
            "--few-shot",
            min=0,
            help="Questions at the start of each file that are shown with answers, not scored.",
        ),
    ] = 0,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Questions to take of each file.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Texts that run at once.")] = 64,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop", metavar="TEXT", help="What ends a generated answer; a new line if not given."
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="The longest generated answer.")
    ] = 64,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write the scores and every answer as JSON."),
    ] = None,
    mode: ModeOption = Mode.exact,
    kv: KVOption = KV.auto,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure on text or on tasks, beside the original. On text: perplexity of both models, KL
    divergence (mean, 99th percentile) and top-1 agreement, the reference in float32; with --tasks,
    the share of right answers to multiple-choice and exact-match questions, and whether two models
    differ (McNemar's test)."""
    with reporting(debug, RUNNING):
        sources = {name: context.get_parameter_source(name) for name in (*OF_TEXT, *OF_TASKS, "kv")}
        options = {
            name for name, source in sources.items() if source and source.name == "COMMANDLINE"
        }
        _check_form(options, bool(tasks), reference, data)
        if tasks:
            settings = settings_of(tasks, delimiter or [], few_shot, limit, stop or [], max_tokens)
            evaluate_tasks(
                directory,
                reference,
                tasks,
                settings,
                batch=batch,
                kv=kv.value,
                mode=mode.value,
                device=device.value,
                output=output,
                as_json=as_json,
            )
        elif reference is not None and data is not None:
            from quantflow import api
            from quantflow.cli.run import quality_table

            with progress() as watcher:
                divergence = api.measure(
                    directory,
                    reference,
                    data,
                    field=field,
                    windows=windows,
                    length=length,
                    skip=skip,
                    engine=engine,
                    kv=kv.value,
                    device=device.value,
                    progress=watcher,
                )
            if as_json:
                print(json.dumps(divergence.as_dict()))
            else:
                console.print(quality_table({directory: divergence.as_dict()}))


def _check_form(options: set[str], tasks: bool, reference: str | None, data: str | None) -> None:
    """Raises UserError for options of the other form, and for what is missing, all at once."""
    problem, hint = (
        ("given with --tasks", "It is about text")
        if tasks
        else ("given without --tasks", "It is about questions")
    )
    wrong = [
        Problem(f"--{name.replace('_', '-')}", problem, hint=hint)
        for name in (OF_TEXT if tasks else OF_TASKS)
        if name in options
    ]
    if not tasks:
        if "kv" in options and "engine" not in options:
            wrong.append(
                Problem(
                    "--kv",
                    "given without --engine or --tasks",
                    "one of them",
                    "In float32 no cache is measured",
                )
            )
        for name, value, meaning in (
            ("--reference", reference, "the full-precision model"),
            ("--data", data, "text, or --tasks with questions"),
        ):
            if value is None:
                wrong.append(Problem(name, "not given", meaning))
    if wrong:
        raise UserError(wrong)
