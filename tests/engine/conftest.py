"""Models that the engine's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.runs import invoke, make_bench
from tests.helpers.tiny import write_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama in bfloat16."""
    return write_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It in 4 bits, with calibrated parameters of an int8 KV cache."""
    bench = make_bench(tmp_path_factory.mktemp("artifact"), intermediate_size=128)
    stages = ["calibrate", "gptq", "kv_qparams", {"pack": {"format": "compressed-tensors"}}]
    result = invoke("run", bench.recipe(weights={"bits": 4, "group_size": 32}, stages=stages))
    assert result.exit_code == 0, result.output
    return bench.output
