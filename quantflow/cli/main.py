"""The command line. One file a verb; nothing heavy is imported before a verb runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from quantflow import __version__
from quantflow.cli import bench, chat, export, generate, init, inspect, plan, release, report, run, schema, sensitivity, serve, verify
from quantflow.cli import eval as eval_command

# Every verb and what it is for, in the order that one comes to use them.
VERBS: dict[str, dict[str, tuple[Callable[..., None], str]]] = {
    "Make": {
        "init": (init.init, "Write a recipe for a model and an engine."),
        "plan": (plan.plan, "Show what a run would do and need; with --fit, what fits a device."),
        "run": (run.run, "Quantise: from a recipe to an artifact, and proof of its quality."),
        "export": (export.export, "Write a checkpoint in another format."),
    },
    "Check": {
        "report": (report.report, "Draw the page of an artifact anew."),
        "compare": (report.compare, "Set artifacts side by side."),
        "verify": (verify.verify, "Check files, every layer, and text."),
        "eval": (eval_command.evaluate, "Measure on text or on tasks, beside the original."),
    },
    "Run": {
        "generate": (generate.generate, "Go on from a text."),
        "chat": (chat.chat, "Chat in the terminal."),
        "serve": (serve.serve, "Serve a model over HTTP: OpenAI's API, and a chat page."),
        "bench": (bench.bench, "Measure speed and memory, beside other engines."),
    },
    "More": {
        "inspect": (inspect.inspect, "Show what is in a checkpoint."),
        "sensitivity": (sensitivity.sensitivity, "Find out what each part's bits cost, and spend them well."),
        "release": (release.release, "Run several recipes into one folder, with checksums."),
        "formats": (export.formats, "Show what each format holds, and who reads it."),
        "schema": (schema.schema, "Print the JSON schema of recipes."),
    },
}
_FIRST = "First, with a model directory DIR:  quantflow run w4 --model DIR\nA verb's options:  quantflow VERB -h"


class _Verbs(TyperGroup):
    """Shows the verbs by what they are for, in this order."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, verbs in VERBS.items():
            with formatter.section(title):
                formatter.write_dl([(name, words) for name, (_, words) in verbs.items()])
        formatter.write_paragraph()
        formatter.write(f"{_FIRST}\n")


app = typer.Typer(
    name="quantflow",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _verbs in VERBS.values():
    for _name, (_verb, _) in _verbs.items():
        app.command(_name)(_verb)


def _version(asked: bool) -> None:
    if asked:
        print(f"quantflow {__version__}")
        raise typer.Exit


@app.callback()
def quantflow(
    version: Annotated[bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Make large language models small: from a YAML recipe to a checkpoint that other software loads, with proof of its quality."""


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × or … shows ? rather than ending the command
    app()


if __name__ == "__main__":
    main()
