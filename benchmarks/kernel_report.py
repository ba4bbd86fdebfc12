"""What the compiler makes of every kernel in the shipped configurations, for each GPU generation.
Needs no GPU.

    python benchmarks/kernel_report.py [--capability 90]… [--json]

A row a kernel: registers a thread, bytes of stack (spilled registers), shared memory, and the bytes
that one thread's load of weights or of cached keys and values takes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from quantflow_kernels import activation, attention, dequantize, kv_store, matmul, norm, solver
from quantflow_kernels.configs import DEFAULT, DEVICES, AttentionConfig, MatmulConfig
from quantflow_kernels.paging import DYNAMIC, PLAIN, STATIC_CHANNEL, STATIC_HEAD
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 89, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bits, group size (0: one group a row), dtype.
VARIANTS = (
    (4, 128, "bf16"), (4, 32, "bf16"), (4, 64, "fp16"), (4, 0, "bf16"), (8, 0, "bf16"),
    (8, 128, "fp16"), (3, 128, "bf16"), (2, 64, "bf16"),
)  # fmt: skip
ITEM_BYTES = {"i8": 1, "i16": 2, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Job:
    """One kernel with its types. streamed: the dtypes of the tensors that the kernel streams from
    memory, [] for small kernels."""

    label: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    streamed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    kernel: str
    capability: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    load_bytes: int | None


def jobs(capability: int) -> Iterator[Job]:
    """Every kernel in the configurations that are shipped for GPUs of a capability, over the
    widths, groups and dtypes that compile to different code."""
    own = [tuning for its, tuning in DEVICES.values() if its == capability]
    for tuned in dict.fromkeys((DEFAULT, *own)):
        regimes = dict.fromkeys([tuned.exact, *(config for _, config in tuned.fast)])
        for bits, group, dtype in VARIANTS:
            for config in dict.fromkeys(regime.for_bits(bits) for regime in regimes):
                for split in (False, True) if config.programs else (False,):
                    yield _matmul(config, bits, group, dtype, split=split)
        for mode in (PLAIN, STATIC_HEAD, STATIC_CHANNEL, DYNAMIC):
            for parts in (True, False):
                yield _attention(tuned.attention, mode, parts)
            yield _attention(tuned.attention, mode, False, cap=True)
    for bits, group in ((4, 128), (3, 32), (8, 0)):
        yield _dequantize(bits, group)
    yield _merge()
    yield Job(
        "sum_splits",
        matmul.sum_splits_kernel,
        {"parts": "*fp32", "bias": "*bf16", "out": "*bf16", "M": "i32", "N": "i32"},
        {"SPLITS": 4, "HAS_BIAS": True, "BLOCK": 256},
    )
    for mode in (PLAIN, STATIC_HEAD, STATIC_CHANNEL, DYNAMIC):
        yield _kv_store(mode)
    yield Job(
        "rms_norm",
        norm.rms_norm_kernel,
        {
            "x": "*bf16",
            "residual": "*bf16",
            "weight": "*bf16",
            "out": "*bf16",
            "K": "i32",
            "eps": "fp32",
            "x_stride": "i32",
        },
        {"ADD": True, "BLOCK": 4096},
        warps=8,
    )
    wide = dict.fromkeys(("w", "codes", "errors", "ratios", "scales", "lowest", "highest"), "*fp32")
    sizes = dict.fromkeys(("N", "down", "across", "start", "stop"), "i32")
    yield Job(
        "gptq_columns",
        solver.gptq_columns_kernel,
        {**wide, "group_at": "*i64", **sizes},
        {"BLOCK": solver.BLOCK},
        warps=1,
    )
    names = (
        "values", "slope", "codes", "changes", "hessian", "scale", "lowest", "highest",
        "curvature",
    )  # fmt: skip
    sizes = dict.fromkeys(("N", "K", "start", "stop"), "i32")
    types = {**dict.fromkeys(names, "*fp32"), **sizes}
    yield Job(
        "refine_columns", solver.refine_columns_kernel, types, {"BLOCK": solver.BLOCK}, warps=1
    )
    yield Job(
        "silu_mul",
        activation.silu_mul_kernel,
        {"gate_up": "*bf16", "out": "*bf16", "K": "i32", "stride": "i32"},
        {"BLOCK": 1024},
    )


def _matmul(config: MatmulConfig, bits: int, group: int, dtype: str, *, split: bool) -> Job:
    types = {
        "x": f"*{dtype}",
        "words": "*i16",
        "high": "*i16",
        "scales": f"*{dtype}",
        "zeros": "*u8",
        "bias": f"*{dtype}",
        "out": "*fp32" if split else f"*{dtype}",
        **dict.fromkeys(("M", "N", "K", "x_stride", "blocks", "blocks_per_split"), "i32"),
    }
    constants = {
        "BITS": bits, "GROUP": group, "SLICE": 32 if group == 32 else 64, "WHOLE_BLOCKS": True,
        "HAS_BIAS": False, "SPLIT": split, "AHEAD": config.ahead,
        "MAGIC": 1024 if dtype == "fp16" else 0 if bits == 8 else 128, "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m, "STAGES": config.stages,
    }  # fmt: skip
    words = (
        f"W{bits} {f'g{group}' if group else 'channel'} {dtype} {config.block_n}×{config.block_m}"
    )
    label = f"matmul {words}{', K split' if split else ''}{', ahead' if config.ahead else ''}"
    return Job(label, matmul.matmul_kernel, types, constants, config.warps, config.stages, ("i16",))


def _dequantize(bits: int, group: int) -> Job:
    types = {
        "words": "*i16",
        "high": "*i16",
        "scales": "*bf16",
        "zeros": "*u8",
        "out": "*bf16",
        "N": "i32",
        "K": "i32",
    }
    constants = {
        "BITS": bits,
        "GROUP": group,
        "SLICE": 32 if group == 32 else 64,
        "BLOCK_N": dequantize.BLOCK_N,
    }
    return Job(
        f"dequantize W{bits} {f'g{group}' if group else 'channel'}",
        dequantize.dequantize_kernel,
        types,
        constants,
    )


def _attention(config: AttentionConfig, mode: int, parts: bool, cap: bool = False) -> Job:
    cache = "bf16" if mode == PLAIN else "i8"
    floats = ("part_out", "part_ml", "k_scale", "k_zero", "v_scale", "v_zero")
    ints = ("block_table", "tile_sequence", "tile_start", "query_start", "contexts")
    types = {
        "q": "*bf16",
        "k_cache": f"*{cache}",
        "v_cache": f"*{cache}",
        "out": "*bf16",
        **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(ints, "*i32"),
        **dict.fromkeys(("sm_scale", "cap"), "fp32"),
        **dict.fromkeys(("window", "queries", "max_blocks", "q_stride"), "i32"),
    }
    constants = {
        "HEADS": 32, "KV_HEADS": 8, "D": 128, "BLOCK_D": 128, "PAGE": 16, "MODE": mode,
        "V_ZERO": mode < DYNAMIC, "WINDOW": False, "CAP": cap, "K_ZERO": mode < DYNAMIC,
        "SPLIT_PARTS": parts, "BLOCK_Q": config.block_q,
        "SHARED": 4, "TILE": config.tile, "SPLIT": config.split, "STAGES": config.stages,
    }  # fmt: skip
    label = (
        f"attention {['int8 head', 'int8 channel', 'int8 token', 'bf16'][mode]}"
        f" {'decode' if parts else 'prefill'}{' capped' if cap else ''}"
    )
    return Job(
        label, attention.attention_kernel, types, constants, config.warps, config.stages, (cache,)
    )


def _merge() -> Job:
    types = {
        **dict.fromkeys(("part_out", "part_ml"), "*fp32"),
        "out": "*bf16",
        **dict.fromkeys(("v_scale", "v_zero"), "*fp32"),
        "query_last": "*i32",
        "queries": "i32",
    }
    constants = {
        "HEADS": 32,
        "KV_HEADS": 8,
        "D": 128,
        "BLOCK_D": 128,
        "MODE": STATIC_HEAD,
        "V_ZERO": True,
        "SPLIT": DEFAULT.attention.split,
    }
    return Job("merge_splits", attention.merge_splits_kernel, types, constants)


def _kv_store(mode: int) -> Job:
    cache = "*bf16" if mode == PLAIN else "*i8"
    types = {
        **dict.fromkeys(("q", "k", "v"), "*bf16"),
        "cos": "*fp32",
        "sin": "*fp32",
        "slots": "*i64",
        "k_cache": cache,
        "v_cache": cache,
        **dict.fromkeys(
            ("k_scale", "v_scale", "k_zero", "v_zero"), "*bf16" if mode == PLAIN else "*fp32"
        ),
        **dict.fromkeys(("q_stride", "k_stride", "v_stride"), "i32"),
    }
    constants = {
        "HEADS": 32, "KV_HEADS": 8, "D": 128, "HALF": 64, "PAGE": 16, "MODE": mode, "ROTATE": True,
        "K_ZERO": mode < DYNAMIC, "V_ZERO": mode < DYNAMIC,
    }  # fmt: skip
    return Job(
        f"kv_store {['int8 head', 'int8 channel', 'int8 token', 'bf16'][mode]}",
        kv_store.kv_store_kernel,
        types,
        constants,
        1,
    )


def compile_job(job: Job, capability: int) -> Row:
    """Compiles the kernel as a launch with aligned pointers and sizes that are multiples of 16
    would."""
    names = job.kernel.arg_names
    general = {
        p.name for p in job.kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment
    }
    multiples = ("N", "K", "x_stride", "stride", "q_stride", "k_stride", "v_stride")
    aligned = [
        n
        for n, kind in job.types.items()
        if (kind.startswith("*") or n in multiples) and n not in general
    ]
    source = ASTSource(
        fn=job.kernel,
        signature={n: job.types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in job.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": job.warps, "num_stages": job.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return Row(
        job.label,
        capability,
        registers,
        stack,
        compiled.metadata.shared,
        _load_bytes(compiled.asm, job.streamed),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert match, listing
    return int(match[1]), int(match[2])


def _load_bytes(asm: dict[str, Any], streamed: tuple[str, ...]) -> int | None:
    """The smallest piece that a thread takes of a two-dimensional tensor of those dtypes, by the
    layouts of the loads; checked against the widest access that stands in the PTX."""
    if not streamed:
        return None
    text, widths = str(asm["ttgir"]), []
    declared = re.findall(r"(#blocked\d*) = #ttg.blocked<{sizePerThread = \[([\d, ]+)\]", text)
    layouts = {name: [int(v) for v in sizes.split(",")] for name, sizes in declared}
    for line in text.splitlines():
        if "tt.load" in line or "async_copy_global_to_local" in line:
            for kind, layout in re.findall(r"tensor<\d+x\d+x!tt.ptr<(\w+)>, (#blocked\d*)>", line):
                if kind in streamed:
                    widths.append(max(layouts[layout]) * ITEM_BYTES[kind])
    ptx = str(asm["ptx"])
    widest = (
        16
        if re.search(r"cp\.async\.cg[^;]*, 0x10|ld\.global[\w.:]*\.v4\.b32|cp\.async\.bulk", ptx)
        else 0
    )
    return min([*widths, widest]) if widths else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--capability",
        type=int,
        action="append",
        help=f"compute capabilities; default {', '.join(map(str, CAPABILITIES))}",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [compile_job(job, c) for c in args.capability or CAPABILITIES for job in jobs(c)]
    if args.json:
        json.dump([asdict(row) for row in rows], sys.stdout, indent=1)
        return
    print(
        f"{'kernel':44} {'sm':>4} {'registers':>9} {'stack':>6} {'shared':>7} {'bytes a load':>13}"
    )
    for r in rows:
        print(
            f"{r.kernel:44} {r.capability:>4} {r.registers:>9} {r.stack_bytes:>6}"
            f" {r.shared_bytes:>7} {r.load_bytes or '':>13}"
        )


if __name__ == "__main__":
    main()
