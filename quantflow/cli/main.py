"""The command line. One file a verb; nothing heavy is imported before a verb runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from quantflow import __version__
from quantflow.cli import (
    bench,
    chat,
    export,
    generate,
    init,
    inspect,
    plan,
    release,
    report,
    run,
    schema,
    sensitivity,
    serve,
    verify,
)
from quantflow.cli import eval as eval_command
from quantflow.cli.console import UNREAD, flush, reporting

# Every verb, in the order that one comes to use them. What it is for is the first sentence of its
# docstring.
VERBS: dict[str, dict[str, Callable[..., None]]] = {
    "Make": {"init": init.init, "plan": plan.plan, "run": run.run, "export": export.export},
    "Check": {
        "report": report.report,
        "compare": report.compare,
        "verify": verify.verify,
        "eval": eval_command.evaluate,
    },
    "Run": {
        "generate": generate.generate,
        "chat": chat.chat,
        "serve": serve.serve,
        "bench": bench.bench,
    },
    "More": {
        "inspect": inspect.inspect,
        "sensitivity": sensitivity.sensitivity,
        "release": release.release,
        "formats": export.formats,
        "schema": schema.schema,
    },
}
_FIRST = (
    "First, with a model directory DIR:  quantflow run w4 --model DIR\nA verb's options:  quantflow"
    " VERB -h"
)


def purpose(verb: Callable[..., None]) -> str:
    """The first sentence of a verb's docstring, in one line."""
    words = " ".join((verb.__doc__ or "").split())
    return words.partition(". ")[0].removesuffix(".") + "."


class _Verbs(TyperGroup):
    """Shows the verbs by what they are for, in this order."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, verbs in VERBS.items():
            with formatter.section(title):
                formatter.write_dl([(name, purpose(verb)) for name, verb in verbs.items()])
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
    for _name, _verb in _verbs.items():
        app.command(_name)(_verb)


def _version(asked: bool) -> None:
    if asked:
        print(f"quantflow {__version__}")
        raise typer.Exit


@app.callback()
def quantflow(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Make large language models small: from a YAML recipe to a checkpoint that other software
    loads, with proof of its quality."""


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # a terminal without × or … shows ? rather than ending the command
            stream.reconfigure(errors="replace")
    with reporting(debug=False):
        stdout, code = sys.stdout, None
        try:
            app()
        except SystemExit as ended:
            code = ended.code
        read = flush()
        # typer puts another there when nobody reads its help
        if sys.stdout is not stdout or not (read or code):
            code = UNREAD
        sys.exit(code)


if __name__ == "__main__":
    main()
