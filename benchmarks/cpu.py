"""Kernels on a CPU: the time of a 4-bit product, its ratio to bf16's, and what it reads against the
machine's read bandwidth.

PYTHONPATH=.:kernels python benchmarks/cpu.py [--output benchmarks/results/kernels_cpu.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quantflow_kernels import cpu, cpu_matmul, linear

from quantflow.machine import processor

SHAPES = ((11008, 4096), (4096, 11008), (4096, 4096))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def timed(*calls: Callable[[], Any]) -> list[float]:
    """Median milliseconds of each call, taken in turn for about a second."""
    for call in calls:
        call()
        call()
    samples: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    while time.perf_counter() - began < 1.0 or len(samples[0]) < 5:
        for call, times in zip(calls, samples, strict=True):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times) for times in samples]


def read_gb_s() -> float:
    """What a sum over 400 MB reads a second."""
    data = torch.ones(100_000_000)
    (ms,) = timed(data.sum)
    return data.nbytes / 1e6 / ms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    peak = read_gb_s()
    print(f"{processor()}, {torch.get_num_threads()} threads: read {peak:.1f} GB/s")
    rows = []
    for n, k in SHAPES:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        scales = (torch.rand(n, k // 128) * 0.01 + 0.001).bfloat16()
        zeros = torch.randint(0, 16, (n, k // 128), dtype=torch.uint8)
        weight = linear.prepare(codes, scales, zeros, 128, 4, torch.bfloat16)
        dense = (
            ((codes.float().view(n, -1, 128) - zeros[..., None]) * scales.float()[..., None])
            .view(n, k)
            .bfloat16()
        )
        way = linear.way(weight)
        print(f"{n}×{k} g128, {way}")
        for m in TOKENS:
            x = torch.randn(m, k).bfloat16()
            bf16, fast, exact = timed(
                lambda x=x, dense=dense: F.linear(x, dense),
                lambda x=x, weight=weight: linear.linear(x, weight, exact=False),
                lambda x=x, weight=weight: linear.linear(x, weight, exact=True),
            )
            row = {
                "n": n,
                "k": k,
                "m": m,
                "bf16_ms": bf16,
                "fast_ms": fast,
                "exact_ms": exact,
                "speedup": bf16 / fast,
            }
            share = ""
            # beyond, arithmetic is the limit
            if isinstance(weight, cpu_matmul.Int4Weight | cpu.CpuWeight) and m <= 4:
                row["of_read"] = weight.nbytes / 1e6 / fast / peak
                share = f" {row['of_read']:.0%} of the read bandwidth"
            rows.append(row)
            print(
                f"  M={m:<4} bf16 {bf16:8.2f} ms  fast {fast:8.2f} ms ({bf16 / fast:4.2f}×)  exact"
                f" {exact:8.2f} ms{share}",
                flush=True,
            )
    if args.output:
        record = {
            "cpu": processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "way": way,
            "read_gb_s": peak,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
