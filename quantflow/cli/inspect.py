"""`quantflow inspect`: what a checkpoint or artifact is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantflow.cli.console import by_reason, console, facts, reporting
from quantflow.cli.options import Debug, Json
from quantflow.paths import absent

if TYPE_CHECKING:
    from quantflow.checkpoints.checkpoint import Checkpoint


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Model directory or artifact.")],
    config_only: Annotated[
        bool,
        typer.Option("--config-only", help="Of a model's config.json alone, without weight files."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what is in a checkpoint, and whether it is supported. Architecture, scheme of every
    module, sizes, KV parameters and provenance; of a model that is not quantised, what of it a
    recipe would quantise, what is kept and why, and what runs the result. Reads headers."""
    with reporting(debug):
        from quantflow.checkpoints.checkpoint import resolve_model
        from quantflow.checkpoints.gguf.file import gguf_file
        from quantflow.checkpoints.hub_cache import snapshot
        from quantflow.errors import ModelError, Problem

        directory = snapshot(directory.expanduser())
        if directory.is_file():
            directory = resolve_model(str(directory))  # which says what it should be
        if not directory.is_dir() and not gguf_file(directory):
            raise ModelError(
                Problem(
                    str(directory),
                    absent(directory, "directory"),
                    "a model directory, an artifact or a .gguf file",
                )
            )
        summary = describe_config(directory) if config_only else describe(directory)
        if as_json:
            print(json.dumps(summary, indent=2))
        else:
            _show(summary)


def describe(directory: Path) -> dict[str, Any]:
    """What `directory` is, from its headers, config and manifest."""
    from quantflow.artifacts.artifact import read_manifest
    from quantflow.formats.reader import Weights, checkpoint_folder
    from quantflow.pipeline.support import support

    folder = checkpoint_folder(directory)
    weights = Weights(folder)
    checkpoint, config = weights.checkpoint, weights.checkpoint.config
    modules: dict[str, str] = {}
    for index in range(config.layers):
        prefix = checkpoint.architecture.layer_prefix(index)
        for linear in checkpoint.linears(index):
            module = f"{prefix}.{linear}"
            scheme = weights.scheme_of(module)
            modules[module] = str(scheme) if scheme else checkpoint.dtype_of(f"{module}.weight")
    manifest = read_manifest(directory)
    return {
        **_numbers(directory, checkpoint),
        "format": weights.format.name if weights.format else "full precision",
        "weight_bytes": checkpoint.weight_bytes,
        "files": len(checkpoint.files),
        "modules": modules,
        "copied": checkpoint.copied,
        "left_out": weights.left_out,
        "notes": list(weights.notes),
        "artifact": (
            {
                k: manifest.get(k)
                for k in (
                    "kind",
                    "name",
                    "status",
                    "formats",
                    "tensor_parallel",
                    "kv_qparams",
                    "quality",
                    "source",
                    "quantflow",
                )
            }
            if manifest
            else None
        ),
        "support": None if weights.format or manifest else support(checkpoint).as_dict(),
    }


def describe_config(directory: Path) -> dict[str, Any]:
    """The same of a model whose weights are not there."""
    from quantflow.checkpoints.checkpoint import Checkpoint
    from quantflow.pipeline.support import support

    checkpoint = Checkpoint(directory, config_only=True)
    return {
        **_numbers(directory, checkpoint),
        "format": f"{checkpoint.config.dtype}, by config.json",
        "weight_bytes": checkpoint.weight_bytes,
        "files": 0,
        "modules": {},
        "copied": {},
        "left_out": {},
        "notes": list(checkpoint.notes),
        "artifact": None,
        "support": support(checkpoint).as_dict(),
    }


def _numbers(directory: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    return {
        "directory": str(directory),
        "architecture": checkpoint.architecture.name,
        "model_type": checkpoint.raw_config["model_type"],
        "layers": config.layers,
        "hidden": config.hidden,
        "intermediate": config.intermediate,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "vocabulary": config.vocabulary,
        "experts": config.experts,
    }


def _show(summary: dict[str, Any]) -> None:
    from quantflow.cli.run import quality_table
    from quantflow.units import size

    table = facts(summary["directory"])
    s = summary
    table.add_row(
        "architecture",
        f"{s['architecture']}: {s['layers']} layers, hidden {s['hidden']}, {s['heads']} heads,"
        f" {s['kv_heads']} KV heads",
    )
    table.add_row("format", s["format"])
    where = f"in {s['files']} file(s)" if s["files"] else "by config.json"
    table.add_row("size", f"{size(s['weight_bytes'])} {where}")
    for scheme, count in Counter(s["modules"].values()).items():
        table.add_row("linears", f"{count} × {scheme}")
    for row in _support_rows(s["support"]):  # which have what is copied
        table.add_row(*row)
    for line in by_reason({} if s["support"] else s["copied"]):
        table.add_row("copied", line)
    for line in by_reason(s["left_out"]):
        table.add_row("left out", line)
    for note in s["notes"]:
        table.add_row("note", note)
    artifact = s["artifact"]
    if artifact:
        table.add_row(
            "artifact",
            f"{artifact['name']} ({artifact['status']}), formats {', '.join(artifact['formats'])},"
            f" tp {artifact['tensor_parallel']}",
        )
        source = artifact["source"]
        origin = f", exported from {source['format']}" if artifact["kind"] == "export" else ""
        weights = f", weights {source['weights'][:16]}…" if source["weights"] else ""
        table.add_row("source", f"{source['model']}{origin}{weights}")
        kv = artifact["kv_qparams"]
        table.add_row(
            "KV cache",
            (
                f"{kv['bits']} bit, one scale a {kv['granularity']}, symmetric {kv['symmetric']}"
                if kv
                else "as computed"
            ),
        )
    console.print(table)
    if artifact and artifact["quality"]:
        console.print(quality_table(artifact["quality"]))


def _support_rows(support: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """What is said of a model that can be quantised."""
    from quantflow.units import size

    if support is None:
        return
    problems = support["problems"]
    how = f"computed by {support['computed_by']}, written as {support['written_as']}"
    yield "supported", f"yes: {how}" if not problems else f"{how}, but for what is in the way"
    yield from (("in the way", problem) for problem in problems)
    matrices = support["quantised"]
    yield "quantised", f"{matrices['tensors']} matrices, {size(matrices['bytes'])}"
    for reason, part in support["kept"].items():
        number = f"{part['tensors']} tensor{'s' if part['tensors'] != 1 else ''}"
        yield "kept", f"{reason}: {number}, {size(part['bytes'])}"
    for engine in support["engines"]:
        yield "runs in", f"{engine['engine']}: {engine['answer']}, {engine['how']}"
