"""`quantflow inspect`: what a checkpoint or artifact is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from quantflow.cli.console import by_reason, console, facts, reporting
from quantflow.cli.options import Debug, Json
from quantflow.paths import absent


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Model directory or artifact.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what is in a checkpoint. Architecture, scheme of every module, sizes, KV parameters and
    provenance. Reads headers."""
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
        summary = describe(directory)
        if as_json:
            print(json.dumps(summary, indent=2))
        else:
            _show(summary)


def describe(directory: Path) -> dict[str, Any]:
    """What `directory` is, from its headers, config and manifest."""
    from quantflow.artifacts.artifact import read_manifest
    from quantflow.formats.reader import Weights, checkpoint_folder

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
    table.add_row("size", f"{size(s['weight_bytes'])} in {s['files']} file(s)")
    for scheme, count in Counter(s["modules"].values()).items():
        table.add_row("linears", f"{count} × {scheme}")
    for line in by_reason(s["copied"]):
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
