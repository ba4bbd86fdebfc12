"""`quantflow eval`: a checkpoint against its reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from quantflow.cli.console import console, progress, reporting
from quantflow.cli.options import KV, Debug, Device, DeviceOption, Json, KVOption


def evaluate(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Artifact or checkpoint, quantised or not.")],
    reference: Annotated[str, typer.Option("--reference", metavar="MODEL", help="The full-precision model.")],
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="Text: .txt with <|endoftext|> between documents, .json or .jsonl.")],
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows to take.")] = 64,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens a window.")] = 512,
    skip: Annotated[int, typer.Option("--skip", min=0, help="Documents left out at the start.")] = 0,
    engine: Annotated[bool, typer.Option("--engine", help="Measure the engine's own kernels and KV cache, not float32.")] = False,
    kv: KVOption = KV.auto,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Perplexity of both models, KL divergence (mean, 99th percentile) and top-1 agreement, the reference in float32."""
    with reporting(debug):
        from quantflow.calibration.data import cut_windows, documents
        from quantflow.cli.run import quality_table
        from quantflow.engine.engine import Engine, EngineConfig
        from quantflow.engine.kv_cache import KVPrecision
        from quantflow.errors import ModelError, Problem
        from quantflow.evaluate.divergence import Model, Variant, compare
        from quantflow.evaluate.running import Running
        from quantflow.formats.reader import Weights
        from quantflow.machine import resolve_device
        from quantflow.models.checkpoint import resolve_model
        from quantflow.models.tokenizer import load_tokenizer

        original, found = (
            Weights(resolve_model(reference)),
            Weights(Path(directory) if Path(directory).is_dir() else resolve_model(directory)),
        )
        a, b = original.checkpoint.config, found.checkpoint.config
        if a.vocabulary != b.vocabulary:
            raise ModelError(Problem(directory, f"a vocabulary of {b.vocabulary}", f"{a.vocabulary}, that of {reference}"))
        if a.rope.kind == "default" and length > a.max_positions:
            raise ModelError(Problem("--length", str(length), f"at most the model's {a.max_positions} positions"))
        tokenizer = load_tokenizer(original.checkpoint.tokenizer_path)
        text = cut_windows(tokenizer, documents(data), count=windows, length=length, skip=skip, source=data)
        with progress() as watcher:
            watcher.phase("evaluate", a.layers + b.layers)
            where = resolve_device(device.value)
            variant: Model = Variant(found)
            if engine:
                options = EngineConfig(device=where, kv=KVPrecision(kv.value), max_batch_size=1)
                variant = Running(lambda: Engine(found.checkpoint.path, options))
            result = compare(Variant(original), {"weights": variant}, text.tokens, where, watcher.step)
        if as_json:
            print(json.dumps(result["weights"].as_dict()))
        else:
            console.print(quality_table({directory: result["weights"].as_dict()}))
