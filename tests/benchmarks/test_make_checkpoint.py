"""Random checkpoints for benchmarks: what they are, and that others read them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from quantflow.engine.llm import LLM
from quantflow.engine.request import SamplingParams
from quantflow.formats.reader import Weights

ROOT = Path(__file__).resolve().parents[2]


def test_packed_linears(tmp_path: Path) -> None:
    script = [
        sys.executable,
        str(ROOT / "benchmarks" / "make_checkpoint.py"),
        "--shape",
        "llama-small",
        "--layers",
        "1",
        "--packed",
    ]
    subprocess.run(
        [*script, "--output", str(tmp_path)],
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""},
    )
    weights = Weights(tmp_path)
    found = weights.quantized("model.layers.0.mlp.down_proj")
    assert found.shape == (1536, 4096) and str(found.scheme) == "W4 g128 symmetric"
    # products are about the size of their inputs
    assert 0.9 < float(found.dequantize().square().sum(1).mean()) < 1.1
    assert weights.scheme_of("lm_head") is None
    llm = LLM(tmp_path, device="cpu", cache_bytes=2**26)
    assert (
        len(
            llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))[0]
            .completions[0]
            .token_ids
        )
        == 3
    )
    assert torch.isfinite(llm.engine.hidden_states([5, 6, 7])).all()
