"""Recorded decodes, with a recorder that computes anew what a CUDA graph would replay: padding,
buffers and sizes are the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.engine.graphs import NOWHERE, obstacle, sizes
from quantflow.engine.request import SamplingParams
from tests.engine.test_determinism import alone, mixed, requests, same
from tests.helpers.tiny import write_llama
from tests.helpers.zoo import specimen, write


class Stand:
    """In place of CUDA graphs: `records` and `replays` are counted. A replay is into the tensor
    that the recording gave."""

    def __init__(self) -> None:
        self.records = self.replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.records += 1
        found = run()

        def replay() -> None:
            self.replays += 1
            found.copy_(run())

        return found, replay


def engine(folder: Path, **options: Any) -> Engine:
    return Engine(
        folder, EngineConfig(device="cpu", block_size=16, check=True, session_len=128, **options)
    )


@pytest.mark.parametrize("name", ["llama3", "internlm", "qwen", "qwen2", "opt", "qwen3"])
def test_a_step_has_the_same_bits_recorded_and_eager(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, specimen(name))
    wanted = requests()
    eager = engine(folder, max_batch_size=6)
    expected = [alone(eager, *one) for one in wanted]
    recorded, stand = engine(folder, max_batch_size=6), Stand()
    recorded.runner.record_decodes(6, recorded.context, stand)
    for seed in range(2):
        found = mixed(recorded, wanted, random.Random(seed))
        assert all(map(same, found, expected))
    assert stand.records <= len(sizes(6)) and stand.replays > 40


def test_a_text_over_several_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording for one, two and four splits, once with the angles of all positions and once with
    each row's."""
    folder = write_llama(tmp_path, max_position_embeddings=512)
    params, config = (
        SamplingParams(max_tokens=400, ignore_eos=True, logprobs=1),
        EngineConfig(device="cpu", max_batch_size=2),
    )
    expected = alone(Engine(folder, config), list(range(2, 12)), params)
    for most in (2**16, 16):
        monkeypatch.setattr("quantflow.engine.graphs.MOST_POSITIONS", most)
        one, stand = Engine(folder, config), Stand()
        one.runner.record_decodes(2, one.context, stand)
        assert same(alone(one, list(range(2, 12)), params), expected)
        assert one.runner.graphs is not None and sorted(one.runner.graphs._recorded) == [
            (1, 1),
            (1, 2),
            (1, 4),
        ]
        assert stand.replays > 390


def test_rows_too_many_write_nowhere(tmp_path: Path) -> None:
    one, stand = engine(write(tmp_path, specimen("llama3")), max_batch_size=8), Stand()
    one.runner.record_decodes(8, one.context, stand)
    with torch.inference_mode():
        for cache in one.caches:
            cache.k.fill_(7.0)
            cache.v.fill_(7.0)
    for i in range(3):  # three sequences in graphs of four rows
        one.submit([5 + i, 6, 7], SamplingParams(max_tokens=9))
    for _ in one.tokens():
        pass
    assert stand.replays
    used = {
        b
        for b in range(one.blocks.count)
        if any(bool((cache.k[b] != 7).any()) for cache in one.caches)
    }
    assert len(used) == 3
    for cache in one.caches:  # 3 + 9 tokens, the last of which is not computed
        assert all(bool((part[sorted(used), :, 11:] == 7).all()) for part in (cache.k, cache.v))


class NoQuestions(TorchDispatchMode):
    """Raises where the host would have to wait for the device, as a recording would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "item",
            "is_nonzero",
        ), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama3", "internlm", "qwen", "qwen2", "opt", "qwen3"])
def test_nothing_recorded_asks_the_device(name: str, tmp_path: Path) -> None:
    one = engine(write(tmp_path, specimen(name)))
    asked = 0

    def record(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        nonlocal asked
        asked += 1
        with NoQuestions():
            found = run()
        return found, lambda: None

    one.runner.record_decodes(4, one.context, record)
    one.submit([5, 6, 7], SamplingParams(max_tokens=3))
    for _ in one.tokens():
        pass
    assert asked == 1


def test_what_cannot_be_recorded_says_why(tmp_path: Path) -> None:
    mixture = engine(write(tmp_path, specimen("mixtral")))
    assert "experts" in obstacle(mixture.loaded.model)
    assert mixture.why_eager == "no GPU" and "decodes" not in mixture.describe()


def test_sizes() -> None:
    assert sizes(1) == [1]
    assert sizes(3) == [1, 2, 3]
    assert sizes(30) == [1, 2, 4, 8, 16, 24, 30]
    assert sizes(64)[-3:] == [48, 56, 64]
    assert NOWHERE < 0  # what the kernels take for no slot


def test_a_recording_that_fails_is_said_and_decodes_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, params = write(tmp_path, specimen("llama3")), SamplingParams(max_tokens=9, logprobs=1)
    expected = alone(engine(folder), [5, 6, 7], params)
    one, tried = engine(folder), []

    def record(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        tried.append(run)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    one.runner.record_decodes(4, one.context, record)
    assert same(alone(one, [5, 6, 7], params), expected)
    assert (
        len(tried) == 1
        and "not permitted when stream is capturing); they run eagerly" in caplog.text
    )
