"""`quantflow bench`: an artifact beside the model it came from, in full precision, with int8 KV, in
transformers and in llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from quantflow.cli.console import RUNNING, console, errors, reporting
from quantflow.cli.options import (
    Debug,
    Device,
    DeviceOption,
    Json,
    Mode,
    ModelDirectory,
    ModeOption,
)
from quantflow.errors import Problem, UserError
from quantflow.paths import write_text

if TYPE_CHECKING:
    from quantflow.evaluate.throughput import Row


def _numbers(option: str, text: str) -> list[int]:
    """Raises UserError."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UserError(Problem(option, repr(text), "numbers of at least 1, separated by commas"))
    return [int(part) for part in parts]


def bench(
    model: ModelDirectory,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="The unquantised model, for the other rows of the comparison.",
        ),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", metavar="N,…", help="Batch sizes.")] = "1,8",
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="N,…", help="Tokens a prompt.")
    ] = "8,512",
    new: Annotated[int, typer.Option("--new", min=2, help="Tokens to generate.")] = 32,
    transformers: Annotated[
        bool, typer.Option("--transformers/--no-transformers", help="Measure transformers too.")
    ] = True,
    gguf: Annotated[
        Path | None,
        typer.Option(
            "--gguf",
            metavar="FILE",
            help="A GGUF file for a row by llama.cpp, where llama-cpp-python is installed.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FILE", help="Write the rows as JSON, with device and versions."
        ),
    ] = None,
    mode: ModeOption = Mode.exact,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure speed and memory, beside other engines. Prefill, decode, time to the first token and
    memory: 16 bits, quantised weights, int8 KV, both, transformers, llama.cpp."""
    with reporting(debug, RUNNING):
        from quantflow.checkpoints.checkpoint import resolve_model
        from quantflow.evaluate.throughput import Case, measure, memory_table
        from quantflow.formats.reader import Weights
        from quantflow.machine import resolve_device

        # What is measured, and whether it fits.
        where = resolve_device(device.value)
        quantised = str(resolve_model(model))
        if (
            reference is not None
            and resolve_model(reference).resolve() == Path(quantised).resolve()
        ):
            raise UserError(
                Problem("--reference", reference, "another model than the one that is measured")
            )
        original = str(resolve_model(reference)) if reference else None
        batches, prompts = _numbers("--batch", batch), _numbers("--prompt", prompt)
        for path in filter(None, (quantised, original)):
            # what is wrong with a model is reported before anything is measured
            config = Weights(Path(path)).checkpoint.config
            if max(prompts) + new > config.context and not config.stretches:
                problem = f"{max(prompts)} tokens and {new} new ones"
                raise UserError(
                    Problem(
                        "--prompt, --new",
                        problem,
                        f"at most the {config.context} positions of {path}",
                    )
                )
        # The rows: this model, the original, other software.
        kinds = [
            ("weights", "quantflow", quantised, "full"),
            ("weights + KV int8", "quantflow", quantised, "int8"),
        ]
        if original:
            full = [
                ("full precision", "quantflow", original, "full"),
                ("KV int8", "quantflow", original, "int8"),
            ]
            kinds = [
                *full,
                *kinds,
                *([("transformers", "transformers", original, "full")] if transformers else []),
            ]
        if gguf:
            _check_gguf(gguf, Path(quantised))
            kinds.append(("llama.cpp", "llama.cpp", str(gguf), "full"))
        # Every row at every batch and prompt.
        cases = [
            Case(name, engine, path, kv, mode.value, where, b, p, new)
            for b in batches
            for p in prompts
            for name, engine, path, kv in kinds
        ]
        memory = memory_table(original or quantised, batches, [1024, 2048, 4096])
        record = {**_machine(where), "mode": mode.value, "rows": [], "memory": memory}
        names = ", ".join(name for name, *_ in kinds)
        errors.print(
            f"{len(cases)} rows: {names}; batch {batch}, prompt {prompt}, {new} new tokens,"
            f" {mode.value} mode, {where}. Each is measured in a process of its own."
        )
        # Each case is measured in a process of its own.
        if not as_json:
            _line(*COLUMNS)
        for number, case in enumerate(cases, 1):
            _write(output, record)  # what has been measured is not lost to what follows
            if as_json or not console.is_terminal:
                errors.print(
                    f"{number} of {len(cases)}: {case.name}, batch {case.batch}, prompt"
                    f" {case.prompt}"
                )
            row = measure(case)
            record["rows"].append(row.as_dict())
            if not as_json:
                _line(*_cells(row))
        _write(output, record)
        if as_json:
            print(json.dumps(record))
            return
        console.print(
            "first: seconds to the first token; prefill, decode: tokens a second; step: ms; peak,"
            " weights, KV: MiB\n"
        )
        console.print(_memory(memory, original or quantised))


COLUMNS = ("", "batch", "prompt", "first", "prefill", "decode", "step", "peak", "weights", "KV")
WIDTHS = (17, 5, 6, 6, 7, 6, 6, 6, 7, 5)


def _line(name: str, *cells: str) -> None:
    """A line of the table, shown when it is measured: nobody waits for the last to see the
    first."""
    print(
        f"{name:<{WIDTHS[0]}}",
        *(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS[1:], strict=True)),
        flush=True,
    )


def _cells(row: Row) -> tuple[str, ...]:
    case = row.case
    return (
        case.name,
        str(case.batch),
        str(case.prompt),
        f"{row.first_token_s:.3f}",
        f"{row.prefill_tokens_s:.0f}",
        f"{row.decode_tokens_s:.1f}",
        f"{row.step_ms:.1f}",
        *(f"{b / 2**20:.0f}" for b in (row.peak_bytes, row.weight_bytes)),
        f"{row.cache_bytes / 2**20:.0f}" if row.cache_bytes else "-",
    )


def _check_gguf(gguf: Path, model: Path) -> None:
    """Raises UserError unless llama.cpp can be measured, with a file of the model's shape."""
    from quantflow.formats.reader import Weights

    if not gguf.is_file():
        raise UserError(
            Problem(
                "--gguf",
                f"{gguf}, which is no file",
                "a GGUF file",
                "quantflow export DIR --format gguf makes one",
            )
        )
    if importlib.util.find_spec("llama_cpp") is None:
        hint = "pip install llama-cpp-python, which compiles llama.cpp for this machine"
        raise UserError(Problem("--gguf", "llama-cpp-python is not installed", hint=hint))
    theirs, ours = Weights(gguf).checkpoint.config, Weights(model).checkpoint.config
    shapes = [
        f"{c.layers} layers, hidden {c.hidden}, vocabulary {c.vocabulary}" for c in (theirs, ours)
    ]
    if shapes[0] != shapes[1]:
        raise UserError(Problem(f"--gguf {gguf}", shapes[0], f"{model}'s {shapes[1]}"))


def _write(output: Path | None, record: dict[str, Any]) -> None:
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(record, indent=1) + "\n")


def _memory(memory: list[dict[str, int]], model: str) -> Table:
    table = Table(
        "batch",
        "context",
        "weights MiB",
        "16-bit KV MiB",
        "int8 KV MiB",
        box=SIMPLE_HEAD,
        title=f"Computed: {model}",
    )
    for column in table.columns:
        column.justify = "right"
    for m in memory:
        sizes = (f"{m[name] / 2**20:.0f}" for name in ("weight_bytes", "kv_bytes", "kv_int8_bytes"))
        table.add_row(str(m["batch"]), str(m["context"]), *sizes)
    return table


def _machine(device: str) -> dict[str, Any]:
    import torch

    from quantflow.machine import processor

    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    versions = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    return {"device": name, "threads": torch.get_num_threads(), **versions}
