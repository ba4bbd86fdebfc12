"""What 4 bits cost a model, by QuantFlow's ways and by llm-compressor's, on the same windows.

    python benchmarks/quality.py MODEL --calibration TEXT --text TEXT [--llmcompressor PYTHON]
    [--output benchmarks/results/NAME.json]

Every result is loaded and measured by transformers with the compressed-tensors package, in float32;
llm-compressor's by its own versions of them, which PYTHON has: newer ones do not load what it
writes with zero points. Seconds are of quantisation, in a process of its own with what that
imports.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from quantflow.calibration.data import cut_windows, documents
from quantflow.tokenizers.load import load_tokenizer

WAYS = {  # name -> stages, symmetric
    "rtn": (["rtn"], False),
    "gptq": (["gptq"], False),
    "awq + gptq": (["awq", "gptq"], False),
    "rtn, symmetric": (["rtn"], True),
    "gptq, symmetric": (["gptq"], True),
}
THEIRS = "llm-compressor gptq"
LLM_COMPRESSOR = """
import json, sys, torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model, windows, judged, group, output = json.loads(sys.argv[1])
ids = json.load(open(windows))
data = Dataset.from_list([{"input_ids": each, "attention_mask": [1] * len(each)} for each in ids])
weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
linears = {"targets": ["Linear"], "weights": {**weights, "symmetric": False}}
modifier = GPTQModifier(config_groups={"all": linears}, ignore=["lm_head"])
net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
oneshot(model=net, processor=AutoTokenizer.from_pretrained(model), dataset=data, recipe=modifier,
        num_calibration_samples=len(ids), max_seq_length=len(ids[0]),
        shuffle_calibration_samples=False)
net.save_pretrained(output, save_compressed=True)
del net
net = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
with torch.inference_mode():
    logits = [net(torch.tensor([each])).logits[0] for each in json.load(open(judged))]
answers = [each.float().log_softmax(-1) for each in logits]
answers = {str(n): each for n, each in enumerate(answers)}
save_file(answers, output + "/log_probabilities.safetensors")
"""


def quantise(
    model: Path,
    calibration: str,
    samples: int,
    length: int,
    group: int,
    stages: list[str],
    symmetric: bool,
    output: Path,
) -> None:
    recipe = output.with_suffix(".yaml")
    recipe.write_text(
        f"name: quality\nmodel: {model}\ncalibration: {{data: {calibration}, samples: {samples},"
        f" seqlen: {length}}}\nweights: {{bits: 4, group_size: {group}, symmetric:"
        f" {str(symmetric).lower()}, ignore: [lm_head]}}\nstages:\n"
        + "".join(f"  - {stage}\n" for stage in stages)
        + "  - pack: {format: compressed-tensors}\n"
    )
    quantflow = [sys.executable, "-c", "from quantflow.cli.main import main; main()"]
    run(
        [*quantflow, "run", recipe, "--output", output],
        QUANTFLOW_STORE=str(output.with_suffix(".store")),
    )


def run(command: list[Any], **more: str) -> None:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=os.environ | more
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


@torch.inference_mode()
def log_probabilities(folder: Path, windows: list[list[int]]) -> list[torch.Tensor]:
    """float32 `[L, V]` of each window."""
    net = load(folder)
    return [net(torch.tensor([window])).logits[0].float().log_softmax(-1) for window in windows]


def stored(folder: Path, windows: int) -> list[torch.Tensor]:
    """The same, as whoever made the model has measured it."""
    found = load_file(folder / "log_probabilities.safetensors")
    return [found[str(number)] for number in range(windows)]


def compare(
    reference: list[torch.Tensor], logprobs: list[torch.Tensor], windows: list[list[int]]
) -> dict[str, float]:
    divergence = [(a.exp() * (a - b)).sum(-1) for a, b in zip(reference, logprobs, strict=True)]
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(reference, logprobs, strict=True)]
    return {
        "perplexity": perplexity(logprobs, windows),
        "kl_mean": float(torch.cat(divergence).double().mean()),
        "top1": float(torch.cat(same).double().mean()),
    }


def perplexity(logprobs: list[torch.Tensor], windows: list[list[int]]) -> float:
    surprise = [
        -b[:-1].gather(1, torch.tensor(w)[1:, None]) for b, w in zip(logprobs, windows, strict=True)
    ]
    return math.exp(float(torch.cat(surprise).double().mean()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--llmcompressor", metavar="PYTHON")
    parser.add_argument(
        "--only", action="append", choices=[*WAYS, THEIRS], help="one of the ways; may be repeated"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    calibration = cut_windows(
        tokenizer, documents(args.calibration), count=args.samples, length=args.length
    ).tokens
    windows = cut_windows(
        tokenizer, documents(args.text), count=args.windows, length=args.length
    ).tokens
    reference = log_probabilities(args.model, windows)
    rows: dict[str, dict[str, float]] = {
        "full precision": {"perplexity": perplexity(reference, windows)}
    }
    with tempfile.TemporaryDirectory(dir=os.environ.get("QUANTFLOW_BENCH_DIR")) as scratch:
        places = [Path(scratch) / name for name in ("windows.json", "judged.json")]
        for place, each in zip(places, (calibration, windows), strict=True):
            place.write_text(json.dumps(each))
        ways: list[tuple[str, Any]] = list(WAYS.items())
        if args.llmcompressor:
            ways.append((THEIRS, None))
        for number, (name, way) in enumerate(ways):
            if args.only and name not in args.only:
                continue
            output, began = Path(scratch) / str(number), time.perf_counter()
            if way:
                quantise(
                    args.model,
                    args.calibration,
                    args.samples,
                    args.length,
                    args.group,
                    *way,
                    output,
                )
            else:
                given = json.dumps([str(args.model), *map(str, places), args.group, str(output)])
                run([args.llmcompressor, "-c", LLM_COMPRESSOR, given], PYTHONPATH="")
            seconds = time.perf_counter() - began
            logprobs = log_probabilities(output, windows) if way else stored(output, len(windows))
            rows[name] = {"seconds": round(seconds, 1), **compare(reference, logprobs, windows)}
            print(name, rows[name], flush=True)
            keep(args, rows)


def keep(args: argparse.Namespace, rows: dict[str, dict[str, float]]) -> None:
    """What there is so far."""
    if args.output:
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "cpu": processor(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "model": args.model.name,
            "bits": 4,
            "group_size": args.group,
            "calibration": [Path(args.calibration).name, args.samples, args.length],
            "text": [Path(args.text).name, args.windows, args.length],
            "rows": rows,
        }
        args.output.write_text(json.dumps(record, indent=2) + "\n")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


if __name__ == "__main__":
    main()
