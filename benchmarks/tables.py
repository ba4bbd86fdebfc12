"""The tables of docs/performance.md, made from the files under `benchmarks/results/`.

    python benchmarks/tables.py [--check]

Each table stands between `<!-- NAME -->` and `<!-- end of NAME -->`. --check changes nothing and
fails where a table is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"


GPU_SHAPES = ((8192, 8192), (28672, 4096), (81920, 8192))


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def gpu(record: dict[str, Any] | None) -> list[str]:
    """W4A16 products and decode attention on a GPU."""
    if record is None:
        return ["On a GPU: not yet measured."]
    products = [
        r
        for r in record["rows"]
        if r["kernel"] == "matmul"
        and (r["n"], r["k"]) in GPU_SHAPES
        and r["mode"] in ("fast", "exact")
    ]
    attention = [r for r in record["rows"] if r["kernel"] == "attention"]
    place = (
        f"{record['device']}, torch {record['torch']}, triton {record['triton']}, {record['date']},"
        f" commit {record['commit'][:8]}"
    )

    def speeds(r: dict[str, Any]) -> list[str]:
        return [f"{r['us']:.1f}", f"{r['gb_s']:.0f}", f"{r['of_copy']:.0%}", f"{r['speedup']:.2f}"]

    return [
        f"{place}; `make bench-gpu`; a stream copy moves {record['copy_gb_s']:.0f} GB/s.",
        "",
        _row("W4A16 g128", "M", "mode", "µs", "GB/s", "of the copy", "× bf16 cuBLAS"),
        _row(*["---"] * 7),
        *(_row(f"{r['n']}×{r['k']}", r["m"], r["mode"], *speeds(r)) for r in products),
        "",
        _row(
            "decode attention, 32 heads on 8", "cache", "µs", "GB/s", "of the copy", "× bf16 cache"
        ),
        _row(*["---"] * 6),
        *(
            _row(f"batch {r['batch']}, context {r['context']}", r["cache"], *speeds(r))
            for r in attention
        ),
    ]


def cpu(record: dict[str, Any] | None) -> list[str]:
    """4-bit products on a CPU."""
    if record is None:
        return ["On a CPU: not yet measured."]
    place = (
        f"{record['cpu']} ({record['capability']}), {record['threads']} threads, torch"
        f" {record['torch']}, {record['date']}"
    )
    rows = [r for r in record["rows"] if (r["n"], r["k"]) == (11008, 4096)]
    return [
        (
            f"{place}; `make bench-cpu`; a sum over 400 MB reads {record['read_gb_s']:.0f} GB/s."
            " Weight 11008×4096, 4 bit, group 128."
        ),
        "",
        _row("tokens", "bf16 ms", "4 bit, fast: ms", "× bf16", "4 bit, exact: ms"),
        _row(*["---"] * 5),
        *(
            _row(
                r["m"],
                f"{r['bf16_ms']:.2f}",
                f"{r['fast_ms']:.2f}",
                f"{r['speedup']:.2f}",
                f"{r['exact_ms']:.2f}",
            )
            for r in rows
        ),
    ]


def serve(record: dict[str, Any] | None) -> list[str]:
    """The server under load and faults."""
    if record is None:
        return ["Not yet measured."]
    place = (
        f"{record['device']}, {record['threads']} threads, torch {record['torch']},"
        f" {record['date']}; `python benchmarks/serve.py`"
    )
    load, gone, fuzz, slow = record["load"], record["disconnect"], record["fuzz"], record["slow"]
    speeds, part = load["tokens_per_s"], load["of_offline"]
    answered = ", ".join(f"{status}: {count}" for status, count in fuzz["statuses"].items())
    return [
        f"{place}; the demo model.",
        "",
        _row("under", "result"),
        _row("---", "---"),
        _row(
            f"{load['clients']} clients, {load['requests']} requests of {load['new_tokens']} new"
            " tokens, tokens/s",
            f"{speeds['whole']:.0f} in one answer, {speeds['stream']:.0f} streamed:"
            f" {part['whole']:.0%} and {part['stream']:.0%} of `LLM.generate` on the same requests"
            f" ({speeds['offline']:.0f})",
        ),
        _row(
            f"{gone['requests']} requests, a third of which go away at random moments",
            f"then {gone['left']['sequences_running']:.0f} running,"
            f" {gone['left']['kv_blocks_used']:.0f} blocks used; resident memory"
            f" {gone['grown_in_the_second_half_mib']:+.0f} MiB in the second half",
        ),
        _row(
            f"{fuzz['requests']} fuzzed bodies and headers",
            f"{len(fuzz['server_errors'])} server errors, {len(fuzz['hangs'])} hangs ({answered})",
        ),
        _row(
            f"{slow['readers']} streams that are hardly read",
            f"others' requests take {slow['ratio']:.2f} times as long",
        ),
    ]


def engine(record: dict[str, Any] | None) -> list[str]:
    """The engine beside transformers on a CPU."""
    if record is None:
        return ["Not yet measured."]

    def mib(size: int) -> str:
        return f"{size / 2**20:.0f}" if size else "–"

    place = (
        f"{record['device']}, {record['threads']} threads, torch {record['torch']},"
        f" {record['date']}"
    )
    names = (
        "", "batch", "prompt", "first token s", "prefill tok/s", "decode tok/s", "step ms",
        "peak MiB", "weights MiB", "KV MiB",
    )  # fmt: skip
    lines = [
        f"{place}; {record['mode']} mode, {record['rows'][0]['case']['new']} new tokens.",
        "",
        _row(*names),
        _row(*["---"] * 10),
    ]
    for r in record["rows"]:
        case, sizes = (
            r["case"],
            (mib(r[what]) for what in ("peak_bytes", "weight_bytes", "cache_bytes")),
        )
        speeds = (
            f"{r['first_token_s']:.2f}",
            f"{r['prefill_tokens_s']:.0f}",
            f"{r['decode_tokens_s']:.1f}",
            f"{r['step_ms']:.0f}",
        )
        lines.append(_row(case["name"], case["batch"], case["prompt"], *speeds, *sizes))
    return lines


def engine_gpu(record: dict[str, Any] | None) -> list[str]:
    """The engine's decode on a GPU."""
    if record is None:
        return ["On a GPU: not yet measured."]
    place = (
        f"{record['device']}, torch {record['torch']}, {record['date']}, commit"
        f" {record['commit'][:8]}; `make bench-gpu`"
    )
    names = (
        "", "mode", "batch", "decode tok/s", "step ms", "of the limit", "prefill tok/s",
        "peak GiB",
    )  # fmt: skip
    lines = [
        (
            f"{place}; random weights of {record['shape']}'s shape, prompts of"
            f" {record['rows'][0]['case']['prompt']} tokens."
        ),
        "",
    ]
    lines += [_row(*names), _row(*["---"] * len(names))]
    for r in record["rows"]:
        speeds = (
            f"{r['decode_tokens_s']:.0f}",
            f"{r['step_ms']:.2f}",
            f"{r['of_limit']:.0%}",
            f"{r['prefill_tokens_s']:.0f}",
        )
        lines.append(
            _row(
                r["case"]["name"],
                r["mode"],
                r["case"]["batch"],
                *speeds,
                f"{r['peak_bytes'] / 2**30:.1f}",
            )
        )
    return lines


def quality(record: dict[str, Any] | None) -> list[str]:
    """What 4 bits cost a chat model, by each way."""
    if record is None:
        return ["Not yet measured."]
    (calibration, samples, length), (text, windows, cut) = record["calibration"], record["text"]
    rows = record["rows"].items()
    return [
        (
            f"{record['cpu']}, torch {record['torch']}, {record['date']}. W4 in groups of"
            f" {record['group_size']}, asymmetric unless a line says otherwise; calibrated on"
            f" {samples} × {length} tokens of `{calibration}`, judged on {windows} × {cut} of"
            f" `{text}`."
        ),
        "",
        _row("", "perplexity", "KL", "top-1"),
        _row(*["---"] * 4),
        *(
            _row(
                name,
                f"{r['perplexity']:.2f}",
                *([f"{r['kl_mean']:.3f}", f"{r['top1']:.1%}"] if "kl_mean" in r else ["0", "100%"]),
            )
            for name, r in rows
        ),
    ]


def hostile(record: dict[str, Any] | None) -> list[str]:
    """What honest clients and probes see beside hostile ones."""
    if record is None:
        return ["Hostile clients of every kind at once: not yet measured."]
    health, honest, left, loop = (
        record["health"],
        record["honest"],
        record["left"],
        record["loop_thread"],
    )
    place = (
        f"{record['device']}, {record['threads']} threads, torch {record['torch']},"
        f" {record['date']}"
    )
    share = loop["waited_s"] / (loop["ran_s"] + loop["waited_s"])
    busy = (
        f"others used the machine, too: the loop's thread had no processor for {share:.0%} of the"
        " time in which it had work"
    )
    rows = [
        (
            "`/health`",
            (
                f"{health['asked']} answers; median {health['p50_s'] * 1000:.0f} ms, 99th"
                f" percentile {health['p99_s']:.2f} s"
            ),
        ),
        (
            "honest requests",
            (
                f"{honest['answered']} answered, {honest['not_answered']} not; median"
                f" {honest['p50_s']:.1f} s"
            ),
        ),
        (
            "then",
            ", ".join(
                f"{int(left[k])}"
                f" {k.replace('_', ' ').removeprefix('sequences ').removeprefix('kv ')}"
                for k in left
            ),
        ),
        ("resident memory", f"{record['resident_growth'] / 2**20:+.0f} MiB after the first minute"),
        ("lines in the log", f"{record['log_lines']}"),
    ]
    *most, last = (what for kind, what in ATTACKS.items() if kind in record["hostile"])
    only = "".join(f" --only {kind}" for kind in record["hostile"])
    command = (
        f"python benchmarks/serve_hostile.py{only if len(record['hostile']) < len(ATTACKS) else ''}"
    )
    return [
        (
            f"{place}; `{command}`: {record['seconds']:.0f} s of {', '.join(most)} and {last} at"
            f" once ({busy})."
        ),
        "",
        _row("beside them", "result"),
        _row("---", "---"),
        *(_row(*row) for row in rows),
    ]


ATTACKS = {  # of serve_hostile
    "tokenise": "4 MB tokenised again and again",
    "lists": "lists of 126 prompts one of them bad",
    "leave": "32 clients that go away",
    "slow": "300 slow connections",
    "malformed": "malformed requests",
    "grammars": "grammars of 60 KB with a string that is not closed",
    "brackets": "4 MB of brackets",
    "scores": "log-probabilities of 128 prompts",
    "counted": "4 MB counted for clients that go away",
    "items": "lists of a hundred thousand wrong items",
}
TABLES = {
    "quality_smollm2": quality,
    "engine_gpu": engine_gpu,
    "kernels_gpu": gpu,
    "kernels_cpu": cpu,
    "engine_cpu": engine,
    "serve_cpu": serve,
    "serve_hostile_cpu": hostile,
}


def written(text: str) -> str:
    """The page with its tables as the results have them."""
    for name, table in TABLES.items():
        path = RESULTS / f"{name}.json"
        lines = table(json.loads(path.read_text()) if path.is_file() else None)
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
        if len(pattern.findall(text)) != 1:
            raise SystemExit(f"{PAGE.name}: expected {begin} … {end} once")
        body = "\n".join([begin, *lines, end])
        text = pattern.sub(lambda _, body=body: body, text)  # type: ignore[misc]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    new = written(text)
    if args.check and new != text:
        raise SystemExit(
            "docs/performance.md: a table is not what benchmarks/results holds; run python"
            " benchmarks/tables.py"
        )
    if not args.check:
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
