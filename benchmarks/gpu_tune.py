"""Finds the tiles that are fastest on the GPU at hand, and prints them as an entry for
`quantflow_kernels/configs.py`.

    PYTHONPATH=.:kernels python benchmarks/gpu_tune.py [--minutes 6] [--output
    benchmarks/results/tuned_gpu.json]

Each regime is searched in two rounds over the linears of Llama-3-8B and 8192²: tiles, warps and
stages first, then for the best of them how far K is split. A candidate's score is the geometric
mean of its times over the shapes; one that is wrong, or needs more than the GPU has, is left out,
and said. What is compiled is compiled by all cores beforehand. The regime of exact mode is the best
one for a single token: it serves every number of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from quantflow_kernels import configs
from quantflow_kernels.attention import paged_attention
from quantflow_kernels.configs import AttentionConfig, MatmulConfig, Tuned
from quantflow_kernels.matmul import matmul
from quantflow_kernels.paging import KVCache, make_batch

from benchmarks.gpu import (
    COPIES_BYTES,
    SHAPES,
    copies_of,
    random_weight,
    relative,
    through_dense,
    timed,
)

SIZES = [*SHAPES["Llama-3-8B"], (8192, 8192)]
BEST = 4  # of a first round that go into the second
CONTEXTS = ((1, 512), (1, 16384), (32, 1024), (32, 8192))
# tokens that a regime is measured with, and its tile's
REGIMES = ((1, 16), (16, 16), (32, 32), (64, 64), (256, 128))

C = TypeVar("C")


def geometric_mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.exp(sum(map(math.log, numbers)) / len(numbers))


def best(
    candidates: Iterable[C], score: Callable[[C], float], until: float
) -> list[tuple[float, C]]:
    """Candidates by their score, the least first; those that fail are left out, and after `until`
    nothing new is begun."""
    scored = []
    for candidate in candidates:
        if time.monotonic() > until:
            print("no time for the rest")
            break
        try:
            scored.append((score(candidate), candidate))
        except Exception as error:  # whatever a candidate runs into, the others are tried
            print(f"  {candidate}: {type(error).__name__}: {str(error)[:100]}", flush=True)
    return sorted(scored, key=lambda pair: pair[0])


def tiles(block_m: int) -> list[MatmulConfig]:
    """The first round's candidates."""
    return [
        # Small tiles keep a GPU busy without splits, and save their sum.
        MatmulConfig(
            block_n=n,
            block_m=block_m,
            warps=warps,
            stages=stages,
            programs=264 if n >= 64 and block_m <= 32 else 0,
        )
        for n, warps, stages in itertools.product((16, 32, 64, 128), (1, 2, 4, 8), (2, 3, 4, 6))
        if n >= 16 * warps // 2
    ]


def splits(config: MatmulConfig) -> list[MatmulConfig]:
    """The second round's."""
    return [replace(config, programs=programs) for programs in (0, 132, 264, 396, 528)]


def _compile(job: tuple[MatmulConfig, int]) -> None:
    """In a process of its own: what is compiled stays in Triton's cache on disk."""
    config, tokens = job
    weight, *_ = random_weight(4096, 4096)
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    try:
        for programs in (0, 264):
            matmul(x, weight, None, replace(config, programs=programs))
    except Exception as error:  # the search says so again
        print(f"  {config}: {type(error).__name__}", flush=True)


def compile_all(jobs: list[tuple[MatmulConfig, int]]) -> None:
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(min(12, os.cpu_count() or 1)) as pool:
        pool.map(_compile, jobs, chunksize=4)
    print(f"compiled {len(jobs)} candidates in {time.monotonic() - began:.0f} s", flush=True)


class Products:
    """The weights that candidates are timed on, in as many copies as the L2 cache does not hold."""

    def __init__(self) -> None:
        self.packed = {size: copies_of(random_weight(*size)[0]) for size in SIZES}
        self.x: dict[tuple[int, int], torch.Tensor] = {}

    def activations(self, tokens: int, k: int) -> torch.Tensor:
        if (tokens, k) not in self.x:
            self.x[tokens, k] = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
        return self.x[tokens, k]

    def score(self, tokens: int, config: MatmulConfig) -> float:
        """Microseconds, the mean of all shapes. Raises ArithmeticError for a wrong result."""
        times = []
        for (_, k), weights in self.packed.items():
            x = self.activations(tokens, k)
            error = relative(
                matmul(x, weights[0], None, config), through_dense(x, weights[0]).float()
            )
            if not error < 1e-2:
                raise ArithmeticError(f"relative error {error:.2g}")
            times.append(timed(it=[partial(matmul, x, w, None, config) for w in weights])["it"])
        return geometric_mean(times)

    def dense_from(self, config: MatmulConfig) -> int:
        """Tokens from which on unpacking and cuBLAS are faster for most of the time."""
        for tokens in (96, 128, 192, 256, 384, 512, 1024):
            pairs = []
            for (_, k), weights in self.packed.items():
                x = self.activations(tokens, k)
                medians = timed(
                    ours=[partial(matmul, x, w, None, config) for w in weights],
                    dense=[partial(through_dense, x, w) for w in weights],
                )
                pairs.append(medians["ours"] / medians["dense"])
            if geometric_mean(pairs) > 1:
                return tokens
        return 2048


def attention_score(
    config: AttentionConfig, heads: int = 32, kv_heads: int = 8, d: int = 128, page: int = 64
) -> float:
    times = []
    for batch_size, context in CONTEXTS:
        pages = -(-context // page)
        # more than the L2 cache holds
        copies = int(COPIES_BYTES / (2 * batch_size * pages * page * kv_heads * d)) + 1
        table = (
            torch.randperm(copies * batch_size * pages, device="cuda")
            .int()
            .view(copies, batch_size, pages)
        )
        batches = [
            make_batch([1] * batch_size, [context] * batch_size, t, heads, kv_heads, config)
            for t in table
        ]
        q = torch.randn(batch_size, heads, d, device="cuda", dtype=torch.bfloat16)
        k, v = (
            torch.randint(
                -128, 128, (table.numel(), kv_heads, page, d), device="cuda", dtype=torch.int8
            )
            for _ in range(2)
        )
        scale = torch.full((kv_heads, d), 0.02, device="cuda")
        int8 = KVCache(k, v, scale[:, 0].contiguous(), scale, None, torch.zeros_like(scale))
        plain = KVCache((k * 0.02).bfloat16(), (v * 0.02).bfloat16())
        results = [
            paged_attention(q, cache, batches[0], d**-0.5, config).float()
            for cache in (int8, plain)
        ]
        if not relative(*results) < 2e-2:
            raise ArithmeticError(f"the caches' results differ by {relative(*results):.2g}")
        ways = {
            name: [partial(paged_attention, q, cache, batch, d**-0.5, config) for batch in batches]
            for name, cache in (("int8", int8), ("plain", plain))
        }
        times += timed(**ways).values()
    return geometric_mean(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="to spend, once all is compiled")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("quantflow: tuning needs a CUDA device, and torch finds none")
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    tuning, record = (
        configs.tuned(device),
        {
            "device": device,
            "triton": triton.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "rounds": {},
        },
    )
    compile_all([(config, tokens) for tokens, block_m in REGIMES for config in tiles(block_m)])
    products, regimes = Products(), []
    until = time.monotonic() + 60 * args.minutes  # what was compiled is for the next time too

    def note(name: str, ranked: list[tuple[float, Any]]) -> None:
        record["rounds"][name] = [{"us": us, **asdict(config)} for us, config in ranked]
        for us, config in ranked[:BEST]:
            print(f"{name}: {us:8.1f} µs  {config}", flush=True)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(record, indent=1) + "\n")

    share = (until - time.monotonic()) / (len(REGIMES) + 2)
    for tokens, block_m in REGIMES:
        stop = time.monotonic() + share
        first = best(tiles(block_m), partial(products.score, tokens), stop)
        note(f"{tokens} tokens", first)
        second = best(
            [c for _, config in first[:BEST] for c in splits(config)],
            partial(products.score, tokens),
            stop + share / 4,
        )
        note(f"{tokens} tokens, splits", second)
        regimes.append(
            (second or first)[0][1] if first else configs.matmul_config(tuning, tokens, exact=False)
        )
    candidates = [
        AttentionConfig(tile=tile, split=split, warps=warps, stages=stages)
        for tile, split, warps, stages in itertools.product(
            (32, 64, 128), (128, 256, 512), (2, 4, 8), (3, 5, 7)
        )
    ]
    attention = best(candidates, attention_score, time.monotonic() + share)
    note("attention", attention)
    one, *more = regimes
    fast = ((1, one), (16, more[0]), (32, more[1]), (64, more[2]), (2**31, more[3]))
    tuned = Tuned(
        exact=one,
        fast=fast,
        dense_from=products.dense_from(more[3]),
        attention=attention[0][1] if attention else tuning.attention,
    )
    record["tuned"] = asdict(tuned)
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n    {device!r}: {tuned!r},")


if __name__ == "__main__":
    main()
