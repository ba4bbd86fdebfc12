"""Two ranks on a CPU: the tokens of one, and an end in seconds when a rank dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from quantflow.engine.grammar import Grammar, GrammarKind
from quantflow.engine.llm import LLM
from quantflow.engine.load import open_weights
from quantflow.engine.request import SamplingParams
from quantflow.errors import ModelError, ResourceError
from tests.helpers.runs import invoke, make_bench
from tests.helpers.zoo import specimen, write

PROMPTS = [[5, 9, 13, 17, 21], [3, 4] * 20, [7]]
PARAMS = [
    SamplingParams(max_tokens=20, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=0.9, seed=2, n=2),
    SamplingParams(max_tokens=9),
]


@contextmanager
def llm(folder: Path, tp: int, **options: Any) -> Iterator[LLM]:
    found = LLM(folder, device="cpu", dtype="float32", block_size=16, check=True, tp=tp, **options)
    try:
        yield found
    finally:
        found.engine.close()


def texts(folder: Path, tp: int, **options: Any) -> list[tuple[int, ...]]:
    with llm(folder, tp, **options) as model:
        return [
            c.token_ids for output in model.generate(PROMPTS, PARAMS) for c in output.completions
        ]


@pytest.mark.parametrize("name", ["llama_bias", "mixtral", "opt"])
def test_two_ranks_give_the_tokens_of_one(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, specimen(name, torch.float32))
    assert texts(folder, 2) == texts(folder, 1)


def test_the_ranks_of_a_sharded_artifact(tmp_path: Path) -> None:
    """With one calibrated KV scale a head, so that it does not matter who holds the head."""
    bench = make_bench(tmp_path, intermediate_size=128)
    stages = [
        "calibrate",
        "gptq",
        {"kv_qparams": {"granularity": "head"}},
        {"pack": {"format": "awq"}},
        {"shard": {"tp": 2}},
    ]
    assert (
        invoke("run", bench.recipe(weights={"bits": 4, "group_size": 32}, stages=stages)).exit_code
        == 0
    )
    expected = texts(bench.output, 1)
    with llm(bench.output, 2) as model:
        own = open_weights(model.engine.path, rank=0, tp=2)
        assert own.checkpoint.path == bench.output / "tp2" / "rank-0"
        assert "int8, calibrated" in model.engine.describe()["KV cache"]
    assert texts(bench.output, 2) == expected
    for rank in (0, 1):
        (bench.output / "tp2" / f"rank-{rank}").rename(tmp_path / f"away-{rank}")
    assert texts(bench.output, 2) == expected  # cut out of the whole


def test_grammars_and_all_parameters_reach_every_rank(tiny: Path) -> None:
    grammar = Grammar(GrammarKind.regex, "[a-z ]{3,9}")
    params = [
        SamplingParams(max_tokens=12, temperature=1, seed=3, n=2, grammar=grammar),
        SamplingParams(
            max_tokens=12,
            temperature=1,
            seed=3,
            logit_bias={5: 3.0},
            stop=("e",),
            skip_special_tokens=False,
            min_p=0.01,
        ),
        SamplingParams(
            max_tokens=12,
            temperature=1,
            seed=4,
            grammar=Grammar(GrammarKind.regex, "[a-z]{2}", 'start: "<" @inner ">"'),
        ),
    ]
    expected = [o.completions for o in LLM(tiny, device="cpu").generate(PROMPTS, params)]
    with llm(tiny, 2) as model:
        assert [o.completions for o in model.generate(PROMPTS, params)] == expected
        assert all(re.fullmatch("[a-z ]{3,9}", c.text) for c in expected[0])
        assert re.fullmatch("<[a-z]{2}>", expected[2][0].text)


def test_a_rank_that_dies_is_said_within_seconds(tiny: Path) -> None:
    with llm(tiny, 2) as model:
        stream = model.stream(PROMPTS[0], SamplingParams(ignore_eos=True))
        next(stream)
        model.engine.ranks.followers[0].kill()  # type: ignore[union-attr]
        began = time.monotonic()
        with pytest.raises(ResourceError, match="rank 1 killed by SIGKILL"):
            for _ in stream:
                pass
        assert time.monotonic() - began < 60


def test_followers_end_when_the_leader_is_killed(tiny: Path) -> None:
    code = (
        "import sys, time\nfrom quantflow.engine.llm import LLM\n"
        f"model = LLM({str(tiny)!r}, device='cpu', tp=2)\n"
        "print(model.engine.ranks.followers[0].pid, flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as leader:
        assert leader.stdout is not None
        follower = int(leader.stdout.readline())
        leader.send_signal(signal.SIGKILL)
    end = time.monotonic() + 50
    while (
        time.monotonic() < end
        and Path(f"/proc/{follower}/cmdline").exists()
        and Path(f"/proc/{follower}/cmdline").read_bytes()
    ):
        time.sleep(0.1)
    assert time.monotonic() < end


def test_what_does_not_divide_is_refused(tiny: Path) -> None:
    with pytest.raises(ModelError, match="multiples of 3"):
        LLM(tiny, device="cpu", tp=3)


def test_torchrun(tiny: Path) -> None:
    arguments = [
        "generate", str(tiny), "--prompt", "The small cat", "--max-tokens", "8", "--device", "cpu",
        "--json",
    ]  # fmt: skip
    expected = json.loads(invoke(*arguments).stdout)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m",
        "quantflow.cli.main", *arguments, "--tp", "2",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["token_ids"] == expected[0]["token_ids"]


def test_four_ranks_are_exact_too(tmp_path: Path) -> None:
    """A sum of four numbers has several orders: it must not depend on where in the batch a row
    stands."""
    folder = write(tmp_path, specimen("internlm", torch.float32))
    params = [SamplingParams(max_tokens=10, logprobs=3, ignore_eos=True)] * 3
    with llm(folder, 4, session_len=128) as model:
        alone = [model.generate(prompt, params[0])[0].completions for prompt in PROMPTS]
        together = [output.completions for output in model.generate(PROMPTS, params)]
    assert together == alone
