"""Kernels on a GPU: time, bandwidth, share of the limit, and the ratio to bf16, each checked for
correctness first.

    PYTHONPATH=.:kernels python benchmarks/gpu.py [--quick] [--output
    benchmarks/results/kernels_gpu.json]

What is compared is captured in CUDA graphs that go through copies of the operands, more of them
than the L2 cache holds, so that every call reads from memory; the graphs are replayed in turn, and
the median of a call is told. The comparison is cuBLAS on a bf16 weight, for attention our own
kernel on a bf16 cache. `exact` and `fast` are the engine's two modes; `triton` and `dense` are the
two ways that fast chooses from by the number of tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from quantflow_kernels import attention, configs, reference
from quantflow_kernels.attention import paged_attention
from quantflow_kernels.dequantize import dequantize
from quantflow_kernels.layout import PackedWeight, pack
from quantflow_kernels.linear import linear
from quantflow_kernels.matmul import bytes_moved, matmul, operations
from quantflow_kernels.paging import KVCache, make_batch

# Model: the [N, K] of its linears, fused as the engine fuses them.
SHAPES = {
    "square": [(8192, 8192)],
    "Llama-2-7B": [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)],
    "Llama-3-8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "Llama-3-70B": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "Qwen2.5-7B": [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)],
    "large": [(81920, 8192)],
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
DATASHEET_GB_S = {"NVIDIA H200": 4800, "NVIDIA H100 80GB HBM3": 3350}
COPIES_BYTES = 400e6  # of operands that a graph goes through: several times the L2 cache
GRAPH_US = 2000.0  # a graph runs at least about as long, so that launching it does not count


def capture(calls: list[Callable[[], Any]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph that goes through `calls` often enough, and the number of calls in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        calls[0]()  # compiles, and lets libraries take their workspaces
    torch.cuda.current_stream().wait_stream(stream)
    once = _recorded(calls, 1)
    once.replay()
    start.record()
    once.replay()
    stop.record()
    stop.synchronize()
    repeats = max(1, min(50, round(GRAPH_US / max(1.0, start.elapsed_time(stop) * 1e3))))
    return _recorded(calls, repeats) if repeats > 1 else once, repeats * len(calls)


def _recorded(calls: list[Callable[[], Any]], repeats: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    return graph


def timed(**ways: list[Callable[[], Any]]) -> dict[str, float]:
    """Median microseconds of one call of each way; the ways take turns."""
    graphs = {name: capture(calls) for name, calls in ways.items()}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(12):
        for name, (graph, count) in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if turn >= 2:
                samples[name].append(start.elapsed_time(stop) * 1e3 / count)
    return {name: statistics.median(times) for name, times in samples.items()}


def stream_copy_gb_s() -> float:
    """What a copy of 1 GB reads and writes a second."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e3 / timed(copy=[lambda: target.copy_(source)])["copy"]


def random_weight(
    n: int, k: int, group: int = 128
) -> tuple[PackedWeight, torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(n, k // group, device="cuda") * 0.01 + 0.001).bfloat16()
    zeros = torch.randint(0, 16, (n, k // group), dtype=torch.uint8, device="cuda")
    return pack(codes, scales, zeros, group, 4), codes, scales, zeros


def copies_of(weight: PackedWeight) -> list[PackedWeight]:
    return [
        replace(
            weight,
            words=weight.words.clone(),
            scales=weight.scales.clone(),
            zeros=weight.zeros.clone(),
        )
        for _ in range(int(COPIES_BYTES / weight.nbytes) + 1)
    ]


def through_dense(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """The product by way of the weight in 16 bits."""
    return F.linear(x, dequantize(weight, x.dtype))


def relative(computed: torch.Tensor, expected: torch.Tensor) -> float:
    return float((computed.float() - expected).norm() / expected.norm())


def matmul_rows(
    shapes: dict[str, list[tuple[int, int]]], tokens: tuple[int, ...], peak: float
) -> Iterator[dict[str, Any]]:
    tuning = configs.tuned(torch.cuda.get_device_name())
    models = {
        size: [m for m, sizes in shapes.items() if size in sizes]
        for sizes in shapes.values()
        for size in sizes
    }
    for (n, k), names in models.items():
        weight, codes, scales, zeros = random_weight(n, k)
        dense = reference.dequantize(codes, scales.float(), zeros, 128)
        del codes
        packed = copies_of(weight)
        plain = [dense.bfloat16() for _ in range(int(COPIES_BYTES / (2 * n * k)) + 1)]
        for m in tokens:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            expected = x.float() @ dense.T
            exact, triton_ = (configs.matmul_config(tuning, m, exact=e) for e in (True, False))
            ways: dict[str, Callable[[PackedWeight], torch.Tensor]] = {
                "fast": partial(linear, x, exact=False, tuning=tuning),
                "triton": partial(matmul, x, bias=None, config=triton_),
            }
            if m <= 1024:
                ways["exact"] = partial(matmul, x, bias=None, config=exact)
            if m >= 64:
                ways["dense"] = partial(through_dense, x)
            errors = {name: relative(way(weight), expected) for name, way in ways.items()}
            times = timed(
                bf16=[partial(F.linear, x, w) for w in plain],
                **{name: [partial(way, w) for w in packed] for name, way in ways.items()},
            )
            for name in ways:
                us = times[name]
                gb_s = bytes_moved(weight, m) / 1e3 / us
                yield {
                    "kernel": "matmul",
                    "models": names,
                    "n": n,
                    "k": k,
                    "m": m,
                    "mode": name,
                    "us": us,
                    "gb_s": gb_s,
                    "of_copy": gb_s / peak,
                    "tflop_s": operations(weight, m) / 1e6 / us,
                    "bf16_us": times["bf16"],
                    "speedup": times["bf16"] / us,
                    "error": errors[name],
                    "right": errors[name] < 5e-3,
                }
        del dense, packed, plain, weight
        torch.cuda.empty_cache()


def attention_rows(
    cases: list[tuple[int, int]], peak: float, heads: int = 32, kv_heads: int = 8, d: int = 128
) -> Iterator[dict[str, Any]]:
    """Decode: one query a sequence."""
    config, page = configs.tuned(torch.cuda.get_device_name()).attention, 16
    for batch_size, context in cases:
        pages = -(-context // page)
        bytes_int8 = 2 * batch_size * pages * page * kv_heads * d
        copies = int(COPIES_BYTES / bytes_int8) + 1
        table = (
            torch.randperm(batch_size * pages * copies, device="cuda")
            .int()
            .view(copies, batch_size, pages)
        )
        batches = [
            make_batch([1] * batch_size, [context] * batch_size, t, heads, kv_heads, config)
            for t in table
        ]
        q = torch.randn(batch_size, heads, d, device="cuda", dtype=torch.bfloat16)
        shape = (table.numel(), kv_heads, page, d)
        k, v = (torch.randint(-128, 128, shape, device="cuda", dtype=torch.int8) for _ in range(2))
        scale = torch.full((kv_heads, d), 0.02, device="cuda")
        quantised = KVCache(k, v, scale[:, 0].contiguous(), scale, None, torch.zeros_like(scale))
        plain = KVCache((k * 0.02).bfloat16(), (v * 0.02).bfloat16())
        at, errors = torch.tensor([context - 1], device="cuda"), {"bf16": 0.0, "int8": 0.0}
        for s in {0, batch_size - 1}:
            ends = [reference.pages(t, table[0, s], context).float() * 0.02 for t in (k, v)]
            expected = reference.attention(q[s : s + 1].float(), *ends, at, d**-0.5)
            for name, cache in (("bf16", plain), ("int8", quantised)):
                errors[name] = max(
                    errors[name],
                    relative(
                        paged_attention(q, cache, batches[0], d**-0.5, config)[s : s + 1], expected
                    ),
                )
        times = timed(
            bf16=[partial(paged_attention, q, plain, b, d**-0.5, config) for b in batches],
            int8=[partial(paged_attention, q, quantised, b, d**-0.5, config) for b in batches],
        )
        for name, cache in (("bf16", plain), ("int8", quantised)):
            gb_s = (
                attention.bytes_moved(cache, [context] * batch_size, heads, batch_size)
                / 1e3
                / times[name]
            )
            yield {
                "kernel": "attention",
                "batch": batch_size,
                "context": context,
                "cache": name,
                "mode": "exact",
                "us": times[name],
                "gb_s": gb_s,
                "of_copy": gb_s / peak,
                "speedup": times["bf16"] / times[name],
                "error": errors[name],
                "right": errors[name] < 2e-2,
            }
        del k, v, quantised, plain
        torch.cuda.empty_cache()


def shown(row: dict[str, Any]) -> str:
    if row["kernel"] == "attention":
        what = f"attention {row['cache']:5} batch {row['batch']:4} context {row['context']:6}"
    else:
        what = f"matmul {row['n']:6}×{row['k']:<6} M={row['m']:<5} {row['mode']:6}"
    wrong = "" if row["right"] else f"  WRONG: relative error {row['error']:.3g}"
    return (
        f"{what} {row['us']:9.1f} µs {row['gb_s']:6.0f} GB/s {row['of_copy']:5.0%} of copy"
        f" {row['speedup']:5.2f}× bf16{wrong}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few shapes")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("quantflow: this benchmark needs a CUDA device, and torch finds none")
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    peak = stream_copy_gb_s()
    print(f"{device}: copy {peak:.0f} GB/s", flush=True)
    shapes = {name: SHAPES[name] for name in ("square", "Llama-3-8B")} if args.quick else SHAPES
    tokens = (1, 16, 64, 256) if args.quick else TOKENS
    every = [(b, c) for b in (1, 8, 32, 128) for c in (128, 1024, 8192, 32768) if b * c <= 2**19]
    cases = [(1, 512), (1, 32768), (32, 8192)] if args.quick else every
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    record: dict[str, Any] = {
        "device": device,
        "copy_gb_s": peak,
        "datasheet_gb_s": DATASHEET_GB_S.get(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "rows": [],
    }
    for row in chain(attention_rows(cases, peak), matmul_rows(shapes, tokens, peak)):
        record["rows"].append(row)
        print(shown(row), flush=True)
        if args.output:  # after every row: what was measured is there if the time runs out
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(record, indent=1) + "\n")
    if not all(row["right"] for row in record["rows"]):
        raise SystemExit("quantflow: some results are wrong")


if __name__ == "__main__":
    main()
