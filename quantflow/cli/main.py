"""The command line. One file a verb; nothing heavy is imported before a verb runs."""

from __future__ import annotations

import sys
from io import TextIOWrapper

import typer

from quantflow.cli import bench, chat, export, generate, inspect, plan, release, report, run, schema, sensitivity, serve, verify
from quantflow.cli import eval as eval_command

app = typer.Typer(
    name="quantflow",
    help="Quantise large language models from a YAML recipe into checkpoints that other software loads, with proof of quality.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("plan")(plan.plan)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("release")(release.release)
app.command("inspect")(inspect.inspect)
app.command("eval")(eval_command.evaluate)
app.command("report")(report.report)
app.command("compare")(report.compare)
app.command("export")(export.export)
app.command("formats")(export.formats)
app.command("verify")(verify.verify)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("chat")(chat.chat)
app.command("bench")(bench.bench)
app.command("schema")(schema.schema)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × or … shows ? rather than ending the command
    app()


if __name__ == "__main__":
    main()
