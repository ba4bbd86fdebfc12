"""The decoder in bfloat16, as calibration runs it, by compiled kernels and by torch, against
float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantflow_kernels import cpu_causal, cpu_kernels

from quantflow.decoder import native as decoder
from quantflow.formats.reader import Weights
from tests.helpers.zoo import decoder_logits, random_tokens, specimen, write

COMPILED = ("rms_norm", "silu_mul", "rotate", "causal_attention")


@pytest.mark.parametrize("name", ["llama3", "internlm", "qwen", "qwen2", "qwen3"])
def test_a_model_in_bfloat16(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, tokens = Weights(write(tmp_path, specimen(name, torch.bfloat16))), random_tokens(2, 20)
    exact = decoder_logits(weights, tokens, torch.float64)

    def error() -> float:
        return float(
            (decoder_logits(weights, tokens, torch.bfloat16).double() - exact).norm() / exact.norm()
        )

    called: set[str] = set()
    for module in (cpu_kernels, cpu_causal):
        for function in (name for name in COMPILED if hasattr(module, name)):
            original = getattr(module, function)
            monkeypatch.setattr(
                module,
                function,
                lambda *a, f=original, n=function, **k: called.add(n) or f(*a, **k),
            )
    compiled = error()
    if cpu_causal.supports(torch.zeros(weights.checkpoint.config.head_dim, dtype=torch.bfloat16)):
        assert called == set(COMPILED)
    monkeypatch.setattr(cpu_causal, "supports", lambda x: False)
    monkeypatch.setattr(decoder, "_compiled", lambda x: False)
    called.clear()
    plain = error()
    assert not called
    assert compiled < 0.02 and plain < 0.02 and compiled < 1.5 * plain
