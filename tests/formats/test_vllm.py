"""A checkpoint of ours in vLLM's own hands, where one is installed: QUANTFLOW_VLLM_PYTHON names the
interpreter that imports it. Its build for CPUs does; the kernel that it has for those takes 4 bits,
and inputs and outputs that are multiples of 32. In float16, since with bfloat16 that kernel
quantises activations to 8 bits too."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from quantflow import LLM, SamplingParams
from tests.helpers.runs import invoke, make_bench

PYTHON = os.environ.get("QUANTFLOW_VLLM_PYTHON", "")
PROMPTS = [[0, *range(40, 72)], [0, *range(200, 216)]]
NEW = 8
NEAR = 0.04  # in log-probability: logits of 4 in bfloat16, the dtype here, are 0.016 apart
SCRIPT = """
import json, sys

def main():
    from vllm import LLM, SamplingParams
    folder, prompts, new, result = sys.argv[1:]
    prompts, new = json.loads(prompts), int(new)
    model = LLM(folder, dtype="float16", enforce_eager=True, max_model_len=128, seed=0)
    greedy = SamplingParams(temperature=0, max_tokens=new, logprobs=1, ignore_eos=True)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [answer.outputs[0] for answer in model.generate(requests, greedy)]
    answers = [
        [(token, each[token].logprob) for token, each in zip(out.token_ids, out.logprobs)]
        for out in outputs
    ]
    with open(result, "w") as file:
        json.dump(answers, file)

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(not PYTHON, reason="QUANTFLOW_VLLM_PYTHON names no interpreter with vLLM")
@pytest.mark.parametrize("symmetric", [True, False])
def test_vllm_goes_on_as_the_engine_here_does(symmetric: bool, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, hidden_size=256, intermediate_size=512)
    weights = {"bits": 4, "group_size": 128, "symmetric": symmetric}
    made = invoke(
        "run",
        bench.recipe(weights=weights, stages=["rtn", {"pack": {"format": "compressed-tensors"}}]),
    )
    assert made.exit_code == 0, made.output
    params = SamplingParams(temperature=0, max_tokens=NEW, logprobs=2, ignore_eos=True)
    ours = [
        output.completions[0]
        for output in LLM(bench.output, device="cpu").generate(PROMPTS, params)
    ]
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    own = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
    arguments = [
        tmp_path / "script.py",
        bench.output,
        json.dumps(PROMPTS),
        str(NEW),
        tmp_path / "theirs.json",
    ]
    done = subprocess.run(
        [PYTHON, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    alike = 0
    for answer, theirs in zip(
        ours, json.loads((tmp_path / "theirs.json").read_text()), strict=True
    ):
        for token, said, (other, logprob) in zip(
            answer.token_ids, answer.logprobs, theirs, strict=True
        ):
            (_, first), (_, second) = said.top
            if first - second < 2 * NEAR:
                break  # either may be chosen, and what follows is another text
            assert other == token and abs(logprob - said.logprob) < NEAR
            alike += 1
    assert alike >= NEW
