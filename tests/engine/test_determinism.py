"""Exact mode: the same tokens and log-probabilities, bit for bit, whatever the batch, arrival
order, chunking, prefix hits or preemption."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.engine.llm import Collector
from quantflow.engine.request import Output, SamplingParams
from tests.helpers.zoo import specimen, write

MIXES = 60  # of each model

WORDS = list(range(2, 250))
# many prompts begin alike: prefixes are found again
BEGINNING = [7 * i % 240 + 3 for i in range(45)]


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 70 tokens: greedy, drawn, penalised, in several texts, with
    log-probabilities."""
    picked, found = random.Random(3), []
    for i in range(14):
        own = [picked.choice(WORDS) for _ in range(picked.randrange(1, 26))]
        prompt = BEGINNING[: picked.choice([0, 16, 20, 45])] + own
        drawn: dict[str, Any] = {"temperature": 0.9, "seed": i, "top_p": 0.95} if i % 3 == 1 else {}
        if i % 5 == 4:
            drawn |= {"repetition_penalty": 1.2, "top_k": 20, "temperature": 1.0, "seed": i}
        n = 3 if i in (4, 10) else 1
        params = SamplingParams(
            max_tokens=picked.randrange(1, 20),
            n=n,
            logprobs=2,
            prompt_logprobs=1 if i == 6 else None,
            **drawn,
        )
        found.append((prompt, params))
    return found


def alone(engine: Engine, prompt: list[int], params: SamplingParams) -> Output:
    collector = Collector(engine.submit(prompt, params))
    for token in engine.tokens():
        collector.add(token)
    return collector.output()


def mixed(
    engine: Engine, wanted: list[tuple[list[int], SamplingParams]], picked: random.Random
) -> list[Output]:
    """All of them, each at a time of its own, with strangers among them that go away again."""
    collectors: dict[int, Collector] = {}
    left = list(range(len(wanted)))
    picked.shuffle(left)
    while left or engine.has_work:
        while left and picked.random() < 0.5:
            i = left.pop()
            collectors[i] = Collector(engine.submit(*wanted[i], priority=picked.randrange(2)))
        if picked.random() < 0.1:
            stranger = engine.submit(
                [picked.choice(WORDS) for _ in range(9)], SamplingParams(max_tokens=4)
            )
            if picked.random() < 0.5:
                engine.abort(stranger.id)
        for token in engine.step():
            for collector in collectors.values():
                if collector.request.id == token.request:
                    collector.add(token)
    return [collectors[i].output() for i in range(len(wanted))]


def same(a: Output, b: Output) -> bool:
    return (a.completions, a.prompt_logprobs) == (b.completions, b.prompt_logprobs)


def engines(folder: Path, **options: Any) -> Callable[[random.Random], Engine]:
    """An engine whose chunks, batches, blocks and cache are drawn; small caches preempt."""
    made: dict[tuple[int, ...], Engine] = {}

    def draw(picked: random.Random) -> Engine:
        batch = picked.choice([3, 5, 14])
        key = (batch, batch + picked.choice([2, 30]), picked.choice([7, 40]), picked.randrange(2))
        if key not in made:
            made[key] = Engine(
                folder,
                EngineConfig(
                    max_batch_size=batch,
                    step_tokens=key[1],
                    prefix_cache=bool(key[3]),
                    check=True,
                    block_size=16,
                    device="cpu",
                    **options,
                ),
            )
            engine = made[key]
            if engine.blocks.count > key[2]:  # fewer blocks than would fit
                engine.blocks.__init__(key[2], 16, prefix_cache=bool(key[3]))  # type: ignore[misc]
        return made[key]

    return draw


def check(folder: Path, **options: Any) -> int:
    """Runs the mixes; returns how often a sequence was preempted."""
    wanted = requests()
    engine = Engine(
        folder, EngineConfig(block_size=16, device="cpu", check=True, prefix_cache=False, **options)
    )
    expected = [alone(engine, *w) for w in wanted]
    assert len({c.token_ids for o in expected for c in o.completions}) > 14  # texts differ
    draw, used = engines(folder, **options), set()
    for mix in range(MIXES):
        picked = random.Random(mix)
        engine = draw(picked)
        chosen = picked.sample(range(len(wanted)), picked.randrange(2, len(wanted) + 1))
        fitting = [i for i in chosen if wanted[i][1].n <= engine.config.max_batch_size]
        found = mixed(engine, [wanted[i] for i in fitting], picked)
        different = [
            i for i, output in zip(fitting, found, strict=True) if not same(output, expected[i])
        ]
        assert not different, (mix, different)
        used.add(engine)
        assert engine.problems() == [] and engine.blocks.used_blocks == 0
    return sum(engine.scheduler.preemptions for engine in used)


def test_a_model_in_bfloat16(tiny: Path) -> None:
    assert check(tiny) > 10


def test_four_bits_and_a_calibrated_int8_cache(artifact: Path) -> None:
    assert check(artifact) > 10


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        # experts, a sliding window, a scale a token and head
        ("mixtral_fused", torch.float32, {"kv": "dynamic"}),
        ("qwen", torch.float32, {"session_len": 128}),  # a rotary embedding that stretches, logn
        ("qwen3", torch.bfloat16, {}),
    ],
)
def test_other_families(
    name: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    assert check(write(tmp_path, specimen(name, dtype)), **options) > 10
