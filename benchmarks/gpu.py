"""Kernels on a GPU: time, bandwidth, share of the limit, and the ratio to bf16, each checked for correctness first.

    PYTHONPATH=.:kernels python benchmarks/gpu.py [--quick] [--output benchmarks/results/gpu_NAME.json]

Every figure is the median of replays of a CUDA graph that goes through copies of its operands, more of them than the L2 cache holds,
so that each call reads from memory. bf16 (cuBLAS, for attention our own kernel on a bf16 cache) is measured in turn with it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from quantflow_kernels import attention, configs, reference
from quantflow_kernels.attention import paged_attention
from quantflow_kernels.dequantize import dequantize
from quantflow_kernels.layout import PackedWeight, pack
from quantflow_kernels.matmul import bytes_moved, matmul
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
COPIES_BYTES = 300e6  # of operands that a graph goes through


def timed(calls: list[Callable[[], Any]], replays: int = 12) -> float:
    """Median microseconds of one of `calls`, which a graph runs one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()  # compiles, and lets libraries take their workspaces
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    found = []
    for i in range(replays + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if i >= 2:
            found.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(found)


def stream_copy_gb_s() -> float:
    """What a copy of 1 GB reads and writes a second."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e3 / timed([lambda: target.copy_(source)])


def random_weight(n: int, k: int, group: int = 128) -> tuple[PackedWeight, torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(n, k // group, device="cuda") * 0.01 + 0.001).bfloat16()
    zeros = torch.randint(0, 16, (n, k // group), dtype=torch.uint8, device="cuda")
    return pack(codes, scales, zeros, group, 4), codes, scales, zeros


def copies_of(weight: PackedWeight) -> list[PackedWeight]:
    count = max(1, min(64, int(COPIES_BYTES / weight.nbytes) + 1))
    return [weight] + [
        PackedWeight(weight.words.clone(), None, weight.scales.clone(), weight.zeros.clone(), 4, weight.group_size, weight.in_features)
        for _ in range(count - 1)
    ]


def through_dense(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """The product by way of the weight in 16 bits."""
    return F.linear(x, dequantize(weight, x.dtype))


def matmul_rows(shapes: dict[str, list[tuple[int, int]]], tokens: tuple[int, ...], peak: float) -> Iterator[dict[str, Any]]:
    tuned = configs.tuned(torch.cuda.get_device_name())
    for model, sizes in shapes.items():
        for n, k in sizes:
            weight, codes, scales, zeros = random_weight(n, k)
            dense = reference.dequantize(codes, scales.float(), zeros, 128)
            del codes
            packed = copies_of(weight)
            plain = [dense.bfloat16()]
            plain += [plain[0].clone() for _ in range(max(0, min(63, int(COPIES_BYTES / plain[0].nbytes))))]
            for m in tokens:
                x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                expected = x[:64].float() @ dense.T
                bf16 = timed([partial(F.linear, x, w) for w in plain])
                for mode in ("exact", "fast"):
                    if mode == "exact" and m > 256:
                        continue
                    config = configs.matmul_config(tuned, m, exact=mode == "exact")
                    error = float((matmul(x[:64], weight, None, config).float() - expected).norm() / expected.norm())
                    assert error < 5e-3, f"W4 {n}×{k} M={m} {mode}: relative error {error}"
                    us = timed([partial(matmul, x, w, None, config) for w in packed])
                    gb_s = bytes_moved(weight, m) / 1e3 / us
                    yield {"kernel": "matmul", "model": model, "n": n, "k": k, "m": m, "mode": mode, "us": us, "gb_s": gb_s,
                           "of_copy": gb_s / peak, "bf16_us": bf16, "speedup": bf16 / us, "error": error}  # fmt: skip
                if m >= 64:
                    us = timed([partial(through_dense, x, w) for w in packed[:8]])
                    yield {"kernel": "dequantize + cuBLAS", "model": model, "n": n, "k": k, "m": m, "mode": "fast", "us": us,
                           "bf16_us": bf16, "speedup": bf16 / us}  # fmt: skip
            del dense, packed, plain, weight
            torch.cuda.empty_cache()


def attention_rows(cases: list[tuple[int, int]], peak: float, heads: int = 32, kv_heads: int = 8, d: int = 128) -> Iterator[dict[str, Any]]:
    """Decode: one query a sequence."""
    config, page = configs.tuned(torch.cuda.get_device_name()).attention, 16
    for batch_size, context in cases:
        pages = -(-context // page)
        bytes_int8 = 2 * batch_size * pages * page * kv_heads * d
        copies = max(1, min(32, int(COPIES_BYTES / bytes_int8) + 1))
        table = torch.randperm(batch_size * pages * copies, device="cuda").int().view(copies, batch_size, pages)
        batches = [make_batch([1] * batch_size, [context] * batch_size, t, heads, kv_heads, config) for t in table]
        q = torch.randn(batch_size, heads, d, device="cuda", dtype=torch.bfloat16)
        shape = (table.numel(), kv_heads, page, d)
        k, v = (torch.randint(-128, 128, shape, device="cuda", dtype=torch.int8) for _ in range(2))
        scale = torch.full((kv_heads, d), 0.02, device="cuda")
        quantised = KVCache(k, v, scale[:, 0].contiguous(), scale, None, torch.zeros_like(scale))
        plain = KVCache((k * 0.02).bfloat16(), (v * 0.02).bfloat16())
        found = paged_attention(q, quantised, batches[0], d**-0.5, config)
        ends = [reference.pages(t, table[0, 0], context).float() * 0.02 for t in (k, v)]
        expected = reference.attention(q[:1].float(), *ends, torch.tensor([context - 1], device="cuda"), d**-0.5)
        error = float((found[:1].float() - expected).norm() / expected.norm())
        assert error < 2e-2, f"attention {batch_size}×{context}: relative error {error}"
        times = {
            name: timed([partial(paged_attention, q, cache, b, d**-0.5, config) for b in batches])
            for name, cache in (("bf16", plain), ("int8", quantised))
        }
        for name, cache in (("bf16", plain), ("int8", quantised)):
            gb_s = attention.bytes_moved(cache, [context] * batch_size, heads, batch_size) / 1e3 / times[name]
            yield {"kernel": "attention", "batch": batch_size, "context": context, "cache": name, "mode": "exact", "us": times[name],
                   "gb_s": gb_s, "of_copy": gb_s / peak, "speedup": times["bf16"] / times[name], "error": error}  # fmt: skip
        del k, v, quantised, plain
        torch.cuda.empty_cache()


def shown(row: dict[str, Any]) -> str:
    if row["kernel"] == "attention":
        what = f"attention {row['cache']:5} batch {row['batch']:4} context {row['context']:6}"
    else:
        what = f"{row['kernel']:20} {row['n']:6}×{row['k']:<6} M={row['m']:<5} {row['mode']:5}"
    share = f"{row['gb_s']:6.0f} GB/s {row['of_copy']:5.0%} of copy" if "gb_s" in row else " " * 28
    return f"{what} {row['us']:9.1f} µs {share} {row['speedup']:5.2f}× bf16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    rows = []
    for row in matmul_rows(shapes, tokens, peak):
        rows.append(row)
        print(shown(row), flush=True)
    for row in attention_rows(cases, peak):
        rows.append(row)
        print(shown(row), flush=True)
    if args.output:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
        record = {
            "device": device, "copy_gb_s": peak, "datasheet_gb_s": DATASHEET_GB_S.get(device), "torch": torch.__version__,
            "triton": triton.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"), "commit": commit, "rows": rows,
        }  # fmt: skip
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
