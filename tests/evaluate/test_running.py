"""Quality as the engine's kernels and cache have it, beside the same in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.evaluate.divergence import Variant, compare
from quantflow.evaluate.running import Running
from quantflow.formats.reader import Weights
from tests.helpers.runs import invoke, make_bench
from tests.helpers.zoo import random_tokens, specimen, write


def running(folder: Path, **options: object) -> Running:
    return Running(
        lambda: Engine(
            folder, EngineConfig(device="cpu", max_batch_size=1, block_size=16, **options)
        )
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama3", "opt", "mistral"])
def test_in_float32_the_engine_is_the_float32_decoder(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, specimen(name, torch.float32))
    windows = random_tokens(3, 40).tolist()
    steps: list[float] = []
    found = compare(
        Variant(Weights(folder)),
        {"engine": running(folder, step_tokens=17)},
        windows,
        step=steps.append,
    )["engine"]
    assert found.kl_mean < 1e-7 and found.top1 == 1 and found.tokens == 120
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-6)
    assert sum(steps) == pytest.approx(4)  # two layers each


def test_an_int8_cache_costs_more_than_none(tiny: Path) -> None:
    windows = random_tokens(4, 60).clamp(max=300).tolist()
    models = {
        "full": running(tiny, kv="full", dtype="float32"),
        "int8": running(tiny, kv="dynamic", dtype="float32"),
    }
    found = compare(Variant(Weights(tiny)), models, windows)
    assert found["full"].kl_mean < 1e-7 < found["int8"].kl_mean < 1e-3


def test_a_recipe_can_measure_the_engine(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, intermediate_size=128)
    stages = ["calibrate", "gptq", "kv_qparams", {"pack": {"format": "awq"}}]
    weights = {"bits": 4, "group_size": 32}
    quality = []
    for engine in (False, True):
        result = invoke(
            "run",
            bench.recipe(weights=weights, stages=[*stages, bench.evaluate(engine=engine)]),
            "--json",
        )
        assert result.exit_code == 0, result.output
        quality.append(json.loads(result.stdout)["quality"])
    in_float32, by_engine = quality
    assert set(by_engine) == {"weights", "kv", "weights_and_kv"}
    for name, found in by_engine.items():
        assert found != in_float32[name]  # bfloat16 shows
        assert found["perplexity"] == pytest.approx(in_float32[name]["perplexity"], rel=0.01)
        assert found["kl_mean"] == pytest.approx(in_float32[name]["kl_mean"], abs=2e-3)


def test_eval_with_the_engine_on_the_command_line(artifact: Path) -> None:
    root = artifact.parents[1]
    arguments = [
        "eval", artifact, "--reference", root / "model", "--data", root / "eval.txt", "--windows",
        "2", "--length", "32",
    ]  # fmt: skip
    found = [
        json.loads(invoke(*arguments, "--json", *more).stdout)
        for more in ([], ["--engine"], ["--engine", "--kv", "full"])
    ]
    assert len({f["kl_mean"] for f in found}) == 3
    assert all(f["perplexity"] == pytest.approx(found[0]["perplexity"], rel=0.02) for f in found)
