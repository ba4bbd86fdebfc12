"""The engine on a GPU with a random model of Llama-3-8B's shape: decode at some batch sizes, 4-bit
weights beside 16-bit ones.

    PYTHONPATH=.:kernels python benchmarks/gpu_engine.py [--shape llama-8b] [--folder DIR] [--output
    benchmarks/results/engine_gpu.json]

The checkpoints are made in --folder (22 GB), by default a temporary one. Each row is a process of
its own, as in `quantflow bench`, with scheduler, sampler and all. `of_limit` is the time in which a
stream copy's rate, measured here, would read what a step must read (weights without the embedding,
keys and values), over the median step's.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import DATASHEET_GB_S, stream_copy_gb_s
from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.errors import QuantFlowError
from quantflow.evaluate.throughput import Case, measure

ROOT = Path(__file__).resolve().parents[1]


def made(shape: str, folder: Path, *, packed: bool) -> Path:
    target = folder / (f"{shape}-w4" if packed else shape)
    if not (target / "config.json").is_file():
        script = [
            sys.executable,
            str(ROOT / "benchmarks" / "make_checkpoint.py"),
            "--shape",
            shape,
            "--output",
            str(target),
        ]
        subprocess.run([*script, *(["--packed"] if packed else [])], check=True)
    return target


def write(output: Path | None, record: dict[str, Any]) -> None:
    """After every row: what was measured is there if the time runs out."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--batch", default="1,8,32,128", help="sequences at once")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=129)
    parser.add_argument("--device", default="cuda", help="cpu tries the script out")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("quantflow: this benchmark needs a CUDA device, and torch finds none")
    device = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine()
    )
    peak = stream_copy_gb_s() if args.device == "cuda" else None
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    record: dict[str, Any] = {
        "device": device, "shape": args.shape, "copy_gb_s": peak,
        "datasheet_gb_s": DATASHEET_GB_S.get(device), "torch": torch.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), "commit": commit,
        "rows": [], "failed": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for name, packed, kv, mode in (
            ("W4A16", True, "full", "fast"),
            ("W4A16", True, "full", "exact"),
            ("W4A16 + int8 KV", True, "dynamic", "fast"),
            ("16 bits", False, "full", "fast"),
        ):
            model = made(args.shape, folder, packed=packed)
            embedding = Checkpoint(model).tensor("model.embed_tokens.weight").nbytes
            for batch in map(int, args.batch.split(",")):
                try:
                    row = measure(
                        Case(
                            name,
                            "quantflow",
                            str(model),
                            kv,
                            mode,
                            args.device,
                            batch,
                            args.prompt,
                            args.new,
                        ),
                        timeout_s=150,
                    )
                except QuantFlowError as error:
                    record["failed"].append(
                        {"name": name, "mode": mode, "batch": batch, "why": str(error)}
                    )
                    print(f"{name} {mode} batch {batch}: {error}", flush=True)
                    write(args.output, record)
                    continue
                read = row.weight_bytes - embedding + row.cache_bytes
                of_limit = read / 1e6 / peak / row.step_ms if peak else None
                record["rows"].append(
                    {**row.as_dict(), "mode": mode, "read_bytes": read, "of_limit": of_limit}
                )
                limit = f", {of_limit:.0%} of the limit" if of_limit else ""
                print(
                    f"{name} {mode} batch {batch}: {row.decode_tokens_s:.0f} tok/s, step"
                    f" {row.step_ms:.2f} ms{limit}; prefill {row.prefill_tokens_s:.0f} tok/s, peak"
                    f" {row.peak_bytes / 2**30:.1f} GiB",
                    flush=True,
                )
                write(args.output, record)


if __name__ == "__main__":
    main()
