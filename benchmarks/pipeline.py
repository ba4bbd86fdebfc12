"""Time, memory and quality of pipeline runs: prints a row a run, and writes them with device,
versions and date.

    python benchmarks/pipeline.py RECIPE… [--set dotted.path=value]… [--output
    benchmarks/results/NAME.json]

Every run starts from an empty store, in a process of its own. `memory above imports` is the peak
resident size of that process (mapped pages included) less its size once everything is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHILD = """
import json, sys, time
import torch, tokenizers
from quantflow.pipeline.estimate import estimate
from quantflow.machine import peak_resident_bytes, resident_bytes
from quantflow.pipeline.plan import make_plan
from quantflow.pipeline.progress import Silent
from quantflow.pipeline.run import run
from quantflow.stages.registry import load_recipe
import torch.nn.functional
torch.ones(64, 64) @ torch.ones(64, 64)
imports = resident_bytes()
recipe, output, sets = json.loads(sys.argv[1])
plan = make_plan(load_recipe(recipe, sets, output=output))
began = time.perf_counter()
result = run(plan, Silent())
seconds = time.perf_counter() - began
peak = peak_resident_bytes()
figures = {"seconds": result.seconds, "total": seconds, "quality": result.quality}
sizes = {"imports_bytes": imports, "peak_bytes": peak}
planned = {"estimate_bytes": estimate(plan).memory_bytes}
print(json.dumps({**figures, **sizes, **planned, "weight_bytes": plan.checkpoint.weight_bytes}))
"""


def measure(recipe: str, sets: list[str]) -> dict[str, Any]:
    """One run in a fresh process and a fresh store."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("QUANTFLOW_BENCH_DIR")) as folder:
        argument = json.dumps([recipe, str(Path(folder) / "out"), sets])
        done = subprocess.run(
            [sys.executable, "-c", CHILD, argument], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(
            f"{recipe}: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for recipe in args.recipes:
        row = {"recipe": Path(recipe).stem, **measure(recipe, args.sets)}
        rows.append(row)
        stages = ", ".join(f"{k} {v:.1f} s" for k, v in row["seconds"].items() if v >= 0.05)
        above = row["peak_bytes"] - row["imports_bytes"]
        rate = row["weight_bytes"] / 1e6 / row["total"]
        print(
            f"{row['recipe']}: {row['total']:.1f} s ({stages}); {rate:.0f} MB/s of weights; memory"
            f" above imports {above / 2**20:.0f} MiB, planned"
            f" {row['estimate_bytes'] / 2**20:.0f} MiB",
            flush=True,
        )
        for name, quality in row["quality"].items():
            print(
                f"    {name}: ppl {quality['perplexity']:.4f} KL {quality['kl_mean']:.5f} top-1"
                f" {quality['top1']:.4f}"
            )
    if args.output:
        import torch

        record = {
            "date": time.strftime("%Y-%m-%d"),
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "sets": args.sets,
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
