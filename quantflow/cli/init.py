"""`quantflow init`: a recipe for a model and an engine, to run as it is or to change by hand."""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from quantflow.cli.console import console, reporting
from quantflow.cli.options import Debug, Json


class EngineName(StrEnum):
    vllm = "vllm"
    lmdeploy = "lmdeploy"
    sglang = "sglang"
    transformers = "transformers"
    llama_cpp = "llama.cpp"


def init(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="DIR_OR_ID",
            help="Model directory or hub id; its config.json is enough.",
        ),
    ],
    bits: Annotated[int, typer.Option("--bits", min=2, max=8, help="Bits a weight.")] = 4,
    engine: Annotated[
        EngineName, typer.Option("--for", help="What is to load the result.")
    ] = EngineName.vllm,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Calibration text, a file or a data set's name; by default the bundled one.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Where the recipe goes; by default MODEL_wBITS_ENGINE.yaml, here.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a recipe for a model and an engine. Nothing is computed, and no file is replaced
    without --force."""
    with reporting(debug):
        from quantflow.checkpoints.checkpoint import Checkpoint, resolve_model
        from quantflow.errors import OutputError, Problem, UserError
        from quantflow.paths import write_text
        from quantflow.pipeline.plan import make_plan
        from quantflow.pipeline.starter import starter
        from quantflow.stages.registry import load_recipe

        # The recipe, and where it goes.
        path = resolve_model(model)
        checkpoint = Checkpoint(path, config_only=True)
        recipe = starter(
            checkpoint, model, bits, engine.value, data, str(output) if output else None
        )
        place = output or Path(f"{recipe.name}.yaml")
        if place.is_dir() or (place.exists() and not force):
            there = "a directory" if place.is_dir() else "there is such a file"
            raise OutputError(
                Problem(
                    str(place),
                    there,
                    "a new file",
                    "" if place.is_dir() else "--force replaces it; --output FILE",
                )
            )
        # Would it run?
        with tempfile.TemporaryDirectory() as folder:
            draft = Path(folder) / place.name
            write_text(draft, recipe.text)
            try:
                # A recipe that cannot run is refused before it is written: all that `plan` finds,
                # once there is more than a config.
                make_plan(
                    load_recipe(draft),
                    config_only=path.is_dir() and not any(path.glob("*.safetensors")),
                )
            except UserError as error:
                raise UserError(
                    [replace(p, where=p.where.replace(f"{folder}/", "")) for p in error.problems]
                ) from error
        # It would: write it.
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, recipe.text)
        if as_json:
            print(json.dumps({"recipe": str(place), "name": recipe.name}))
            return
        typed = shlex.quote(str(place))
        console.print(
            f"{place} written. To look at before it is run: quantflow plan {typed}\nNext: quantflow"
            f" run {typed}"
        )
