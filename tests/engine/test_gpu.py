"""The engine on a GPU: recorded decodes against eager ones, in exact mode, bit for bit, and against
the CPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.engine.request import SamplingParams
from tests.engine.test_determinism import alone, mixed, requests, same
from tests.helpers.tiny import write_llama
from tests.helpers.zoo import specimen, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def engine(folder: Path, *, device: str = "cuda", **options: Any) -> Engine:
    return Engine(
        folder,
        EngineConfig(
            device=device, block_size=16, check=True, session_len=128, cache_bytes=2**26, **options
        ),
    )


@pytest.mark.parametrize("kv", ["full", "dynamic"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama3", torch.bfloat16), ("qwen3", torch.bfloat16), ("qwen", torch.float16)],
)
def test_recorded_decodes(name: str, dtype: torch.dtype, kv: str, tmp_path: Path) -> None:
    folder = write(tmp_path, specimen(name, dtype))
    eager, recorded = (
        engine(folder, kv=kv, graphs=graphs, max_batch_size=6) for graphs in (False, True)
    )
    assert (
        eager.describe()["decodes"] == "eager: asked for"
        and recorded.describe()["decodes"] == "CUDA graphs"
    )
    wanted = requests()
    expected = [alone(eager, *one) for one in wanted]
    assert all(map(same, [alone(recorded, *one) for one in wanted], expected))
    for seed in range(3):
        assert all(map(same, mixed(recorded, wanted, random.Random(seed)), expected))


def test_four_bits(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("pydantic")  # the artifact is made from a recipe
    artifact: Path = request.getfixturevalue("artifact")
    eager, recorded = (
        engine(artifact, graphs=graphs, max_batch_size=6) for graphs in (False, True)
    )
    wanted = requests()
    expected = [alone(eager, *one) for one in wanted]
    assert all(map(same, mixed(recorded, wanted, random.Random(0)), expected))


def test_a_context_beyond_one_split(tmp_path: Path) -> None:
    """Graphs for one, two and four splits of attention, in one text."""
    folder, found = write_llama(tmp_path, max_position_embeddings=512), []
    for graphs in (False, True):
        one = Engine(
            folder, EngineConfig(device="cuda", block_size=16, cache_bytes=2**26, graphs=graphs)
        )
        found.append(
            alone(
                one, list(range(2, 12)), SamplingParams(max_tokens=500, ignore_eos=True, logprobs=1)
            )
        )
    assert same(*found)


def test_the_same_text_as_on_a_cpu(tmp_path: Path) -> None:
    folder = write(tmp_path, specimen("llama3"))  # float32
    texts = [
        alone(engine(folder, device=device), [5, 6, 7, 8], SamplingParams(max_tokens=40))
        for device in ("cpu", "cuda")
    ]
    assert texts[0].completions[0].token_ids == texts[1].completions[0].token_ids
