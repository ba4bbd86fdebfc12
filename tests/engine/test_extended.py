"""Families whose decoder does more than Llama's: quantised, with an int8 cache, with what prompts
share, and over two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantflow
from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.engine.llm import LLM
from quantflow.engine.request import SamplingParams
from quantflow.errors import ModelError
from quantflow.evaluate.verify import verify
from tests.helpers.tiny import write_text
from tests.helpers.zoo import random_tokens, specimen, write
from tests.helpers.zoo_extended import EXTENDED

WHOLE = {  # and what of them no rank has a part of
    "olmo2": "norms are over all heads",
    "phi3": "q, k and v are one linear",
    "phi4_mini": "q, k and v are one linear",
    "glm": "gate and up are one linear",
    "glm4": "gate and up are one linear",
}


@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.parametrize("name", EXTENDED)
def test_a_quantised_artifact_runs(name: str, granularity: str, tmp_path: Path) -> None:
    """Layer by layer and in its log-probabilities as the dequantised weights in float32 with K and
    V rounded: whatever the order of channels, zero points of K, caps and windows do."""
    recipe = {
        "name": "engine",
        "model": str(write(tmp_path / "model", specimen(name))),
        "output": str(tmp_path / "out"),
        "calibration": {
            "data": str(write_text(tmp_path / "calib.txt", 0, 64)), "samples": 6, "seqlen": 24,
        },
        "weights": {"bits": 4, "group_size": 32},
        "stages": [
            "calibrate",
            "rtn",
            {"kv_qparams": {"granularity": granularity}},
            {"pack": {"format": "compressed-tensors"}},
        ],
    }  # fmt: skip
    output = quantflow.quantize(recipe, device="cpu").path
    engine = Engine(output, EngineConfig(device="cpu", dtype="float32"))
    assert "int8, calibrated" in engine.describe()["KV cache"]
    checks = {check.name: check for check in verify(output, None, "cpu")}
    for what in ("files", "loads", "layers", "logits", "generation"):
        assert checks[what].passed, checks[what]


@pytest.mark.parametrize("name", EXTENDED)
def test_what_prompts_share_changes_no_token(name: str, tmp_path: Path) -> None:
    """Blocks of the cache that another prompt filled, chunks of prompts, windows that end inside
    a block."""
    folder = write(tmp_path, specimen(name))
    shared = random_tokens(1, 40)[0].tolist()
    prompts = [[*shared, 7, 8, 9], [*shared, 11], shared[:20], [*shared, 7, 8, 9, 10]]
    params = SamplingParams(max_tokens=12, ignore_eos=True)

    def tokens(*, prefix_cache: bool) -> list[tuple[int, ...]]:
        llm = LLM(
            folder,
            device="cpu",
            dtype="float32",
            block_size=16,
            step_tokens=24,
            max_batch_size=3,
            prefix_cache=prefix_cache,
            check=True,
        )
        outputs = [output for prompt in prompts for output in llm.generate(prompt, params)]
        outputs += llm.generate(prompts, params)
        assert any(output.cached_tokens for output in outputs) is prefix_cache
        return [output.completions[0].token_ids for output in outputs]

    assert tokens(prefix_cache=True) == tokens(prefix_cache=False)


@pytest.mark.parametrize("name", EXTENDED)
def test_two_ranks_give_the_tokens_of_one_or_are_refused(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, specimen(name))
    params = SamplingParams(max_tokens=16, ignore_eos=True)

    def tokens(tp: int) -> list[tuple[int, ...]]:
        llm = LLM(folder, device="cpu", dtype="float32", block_size=16, tp=tp)
        try:
            outputs = llm.generate([[5, 9, 13, 17, 21], [3, 4] * 20], params)
            return [output.completions[0].token_ids for output in outputs]
        finally:
            llm.engine.close()

    if name in WHOLE:
        with pytest.raises(ModelError, match=WHOLE[name]):
            tokens(2)
        return
    assert tokens(2) == tokens(1)


@pytest.mark.parametrize("name", EXTENDED)
def test_bfloat16_is_near_float32(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, specimen(name, torch.bfloat16))
    checks = {check.name: check for check in verify(folder, None, "cpu")}
    assert checks["layers"].passed, checks["layers"]
