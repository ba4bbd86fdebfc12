"""Packing beside a plain copy: GB/s of each packing function and of each format's `encode` and
`decode` of one linear.

    PYTHONPATH=. python benchmarks/packing.py [--seconds 3] [--output
    benchmarks/results/packing_cpu.json]

A call's bytes are those of the codes, uint8 `[N, K]`. The plain copy is of the same bytes into a
new tensor (`clone`), as the measured functions make their result anew; beside it `copy_` into a
tensor that is there already, which spares the kernel's zeroing of new pages and is three to four
times as fast for large tensors. The three are taken in turn, and the fastest of each counts: what
else the machine does only adds time. Memory: each `encode` and `decode` in a process of its own,
its peak resident size (VmHWM) less the size before the call, over the codes' size; the result
counts, unless it shares the memory of what was there: some of 8 bits are views, and their GB/s say
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantflow.formats import FORMATS
from quantflow.formats.base import ConfigRequest
from quantflow.machine import give_back_freed_memory, peak_resident_bytes, processor, resident_bytes
from quantflow.quant import packing
from quantflow.quant.numbers.integer import IntegerTensor
from quantflow.quant.scheme import Scheme

SHAPES = ((4096, 4096), (11008, 4096))
CASES = (
    ("awq", 4),
    *((name, bits) for name in ("gptq", "compressed-tensors") for bits in (4, 8, 3, 2)),
)
GOAL = 0.25


def linear(n: int, k: int, bits: int) -> IntegerTensor:
    scales = (torch.rand(n, k // 128) * 0.01 + 0.001).half()
    zeros = torch.randint(1, 2**bits, (n, k // 128), dtype=torch.uint8)
    return IntegerTensor(
        Scheme(bits, 128, False),
        torch.randint(0, 2**bits, (n, k), dtype=torch.uint8),
        scales,
        zeros,
    )


def format_calls(name: str, tensor: IntegerTensor) -> dict[str, Callable[[], Any]]:
    """`encode` and `decode` of one linear."""
    form = FORMATS[name]
    config = form.quantization_config(ConfigRequest({"m": tensor.scheme}, [], tensor.scheme))
    encoded = form.encode("m", tensor, torch.float16)
    return {
        "encode": lambda: form.encode("m", tensor, torch.float16),
        "decode": lambda: form.decode("m", encoded, config),
    }


def function_calls(tensor: IntegerTensor) -> dict[str, Callable[[], Any]]:
    """Every function of `packing` that takes these codes."""
    bits, codes, (n, k) = tensor.scheme.bits, tensor.codes, tensor.shape
    rows, columns = packing.pack_rows(codes, bits).clone(), packing.pack_columns(codes, bits)
    calls: dict[str, Callable[[], Any]] = {
        "pack_rows": lambda: packing.pack_rows(codes, bits),
        "unpack_rows": lambda: packing.unpack_rows(rows, bits, k),
        "pack_columns": lambda: packing.pack_columns(codes, bits),
        "unpack_columns": lambda: packing.unpack_columns(columns, bits, n),
    }
    if bits == 4:
        words = packing.pack_awq(codes)
        calls |= {
            "pack_awq": lambda: packing.pack_awq(codes),
            "unpack_awq": lambda: packing.unpack_awq(words),
        }
    return calls


def fastest(calls: list[Callable[[], Any]], seconds: float) -> list[float]:
    """The least seconds of each call, taken in turn."""
    best = [float("inf")] * len(calls)
    began, rounds = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or rounds < 10:
        rounds += 1
        for i, call in enumerate(calls):
            start = time.perf_counter()
            result = call()
            best[i] = min(best[i], time.perf_counter() - start)
            del result
    return best


def speed(call: Callable[[], Any], n: int, k: int, seconds: float) -> dict[str, Any]:
    source, target = torch.ones(n, k, dtype=torch.uint8), torch.zeros(n, k, dtype=torch.uint8)
    took, copy, there = fastest([call, source.clone, lambda: target.copy_(source)], seconds)
    rates = {
        "gb_s": n * k / 1e9 / took,
        "copy_gb_s": n * k / 1e9 / copy,
        "copy_in_place_gb_s": n * k / 1e9 / there,
    }
    return {
        "ms": took * 1e3,
        **rates,
        "of_copy": copy / took,
        "of_copy_in_place": there / took,
        "reached": copy / took >= GOAL,
    }


def extra_memory(name: str, bits: int, n: int, k: int, direction: str) -> float:
    """Peak memory beyond the input, result included, in sizes of the codes."""
    argument = json.dumps([name, bits, n, k, direction])
    done = subprocess.run(
        [sys.executable, __file__, "--memory", argument], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def print_extra_memory(name: str, bits: int, n: int, k: int, direction: str) -> None:
    """In a fresh process: small tensors first, so that no code is loaded in the measured call."""
    call = format_calls(name, linear(256, 256, bits))[direction]
    call()
    call = format_calls(name, linear(n, k, bits))[direction]
    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = resident_bytes()
    call()
    print((peak_resident_bytes() - before) / (n * k))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--only", default="", help="rows whose name begins with this")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.memory:
        print_extra_memory(*json.loads(args.memory))
        return
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        extra = (
            f"  extra memory {row['extra_memory']:5.2f} × codes" if "extra_memory" in row else ""
        )
        print(
            f"{row['what']:28} {row['bits']} bit {row['n']:5}×{row['k']} {row['ms']:8.2f} ms"
            f" {row['gb_s']:6.1f} GB/s  copy {row['copy_gb_s']:5.1f}  {row['of_copy']:5.0%} of the"
            f" copy, {row['of_copy_in_place']:5.0%} of one in place"
            f" {'' if row['reached'] else '(short of 25%)'}{extra}",
            flush=True,
        )

    for n, k in SHAPES:
        for bits in (4, 8, 3, 2):
            for what, call in function_calls(linear(n, k, bits)).items():
                if what.startswith(args.only):
                    report(
                        {
                            "what": what,
                            "bits": bits,
                            "n": n,
                            "k": k,
                            **speed(call, n, k, args.seconds),
                        }
                    )
        for name, bits in CASES:
            for what, call in format_calls(name, linear(n, k, bits)).items():
                if not f"{name} {what}".startswith(args.only):
                    continue
                row = {
                    "what": f"{name} {what}",
                    "bits": bits,
                    "n": n,
                    "k": k,
                    **speed(call, n, k, args.seconds),
                }
                report({**row, "extra_memory": extra_memory(name, bits, n, k, what)})
    if args.output:
        record = {
            "device": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "date": time.strftime("%Y-%m-%d"),
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
