"""The engine against transformers and against a float64 oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.engine.llm import LLM
from quantflow.engine.model_runner import States
from quantflow.engine.request import SamplingParams
from quantflow.engine.scheduler import Step
from quantflow.formats.reader import Weights
from tests.helpers.references import reference
from tests.helpers.runs import invoke, make_bench
from tests.helpers.zoo import TRAINED, ZOO, Specimen, decoder_logits, random_tokens, specimen, write

SHARED = Path(__file__).resolve().parents[3] / "shared"
# families whose rotary embedding stretches beyond TRAINED
STRETCHED = ("internlm", "internlm2", "internlm3", "qwen")


def config(**changes: Any) -> EngineConfig:
    return EngineConfig(
        **{"device": "cpu", "dtype": "float32", "block_size": 16, "check": True, **changes}
    )


@torch.inference_mode()
def prompt_logits(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """`[L, V]` over a prompt, in as many chunks as the engine takes."""
    request = engine.submit(tokens, SamplingParams(max_tokens=1, prompt_logprobs=0))
    rows: list[torch.Tensor] = []
    run = engine.runner.run

    def keep(step: Step) -> States:
        found = run(step)
        rows.extend(engine.runner.logits(found.of(i)) for i in range(len(step.work)))
        return found

    engine.runner.run = keep  # type: ignore[method-assign]
    list(engine.tokens())
    engine.runner.run = run  # type: ignore[method-assign]
    assert request.id not in engine._requests
    return torch.cat(rows)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("name", ZOO)
def test_logits_are_those_of_transformers(name: str, mode: str, tmp_path: Path) -> None:
    folder = write(tmp_path, specimen(name))
    session_len = 128 if name in STRETCHED else None
    engine = Engine(
        folder, config(mode=mode, session_len=session_len, step_tokens=19, max_batch_size=4)
    )
    for length in (16, 40):  # within and beyond TRAINED; one chunk and several
        assert 16 < TRAINED < 40
        tokens = random_tokens(1, length)
        with torch.inference_mode():
            expected = reference(name, folder, length)(tokens).logits[0]
        assert 5 < expected.abs().max() < 50
        torch.testing.assert_close(
            prompt_logits(engine, tokens[0].tolist()), expected, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("name", ZOO)
def test_sixty_four_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Each is the likeliest by a forward of transformers over all that came before it."""
    folder = write(tmp_path, specimen(name))
    llm = LLM(
        folder,
        device="cpu",
        dtype="float32",
        session_len=128 if name in STRETCHED else None,
        block_size=16,
        check=True,
    )
    prompt = random_tokens(1, 12)[0].tolist()
    found = (
        llm.generate(prompt, SamplingParams(max_tokens=64, ignore_eos=True))[0]
        .completions[0]
        .token_ids
    )
    assert len(found) == 64
    fed = [*prompt, *found[:-1]]
    with torch.inference_mode():
        logits = reference(name, folder, len(fed))(torch.tensor([fed])).logits[0, len(prompt) - 1 :]
    best = logits.max(-1).values
    chosen = logits.gather(1, torch.tensor(found)[:, None])[:, 0]
    # Random models have near ties: the choice must be the likeliest, or as likely within float32's
    # rounding.
    assert bool((best - chosen <= 2e-5).all())
    assert int((logits.argmax(-1) == torch.tensor(found)).sum()) >= 63


@pytest.mark.shared
@pytest.mark.parametrize(("name", "steps"), [("stories260k", 256), ("babyllama-1m", 256)])
def test_real_models_continue_as_in_transformers(name: str, steps: int) -> None:
    from transformers import AutoModelForCausalLM

    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip(f"the reference model {name} is not in {SHARED.name}/")
    llm = LLM(folder, device="cpu", dtype="float32")
    prompt = llm.engine.tokenizer.encode("Once upon a time, there was a")
    steps = min(steps, llm.engine.context - len(prompt))  # babyllama has 256 positions
    found = (
        llm.generate(prompt, SamplingParams(max_tokens=steps, ignore_eos=True))[0]
        .completions[0]
        .token_ids
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert list(found) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_rotary_embeddings(scaling: dict[str, Any], tmp_path: Path) -> None:
    found = specimen("llama_bias")
    folder = write(
        tmp_path,
        Specimen(
            found.config | {"rope_scaling": scaling, "max_position_embeddings": 48}, found.tensors
        ),
    )
    engine = Engine(
        folder,
        config(session_len=128 if scaling["rope_type"] == "dynamic" else None, max_batch_size=2),
    )
    tokens = random_tokens(1, 60 if scaling["rope_type"] == "dynamic" else 44)
    with torch.inference_mode():
        expected = reference("llama_bias", folder, tokens.shape[1])(tokens).logits[0]
    torch.testing.assert_close(
        prompt_logits(engine, tokens[0].tolist()), expected, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_quantised_weights_are_a_float64_oracles(bits: int, tmp_path: Path) -> None:
    """Of every format that holds them, and of mixed precision: float32 within its rounding,
    bfloat16 within its own."""
    bench = make_bench(tmp_path, dtype=torch.float32, intermediate_size=128)
    formats = ["compressed-tensors", "gptq_v2", "gptq"] + (["awq"] if bits == 4 else [])
    formats = formats[:1] if bits == 6 else formats  # which kernels compute as 8 bits
    weights = {
        "bits": bits,
        "group_size": 32,
        "overrides": [{"match": "*.down_proj", "bits": 8 if bits != 8 else 4}] if bits != 4 else [],
    }
    stages = [
        "calibrate",
        {"gptq": {"act_order": "dynamic"}} if bits == 3 else "gptq",
        *({"pack": {"format": f}} for f in formats),
    ]
    if bits == 3:  # an index of groups, which two formats hold
        stages = [*stages[:2], *({"pack": {"format": f}} for f in ("gptq_v2", "gptq"))]
    result = invoke(
        "run", bench.recipe(weights={k: v for k, v in weights.items() if v}, stages=stages)
    )
    assert result.exit_code == 0, result.output
    tokens = random_tokens(1, 30)
    for folder in sorted(p for p in bench.output.iterdir() if p.is_dir()) or [bench.output]:
        expected = decoder_logits(Weights(folder), tokens, torch.float64)[0]
        exactly = prompt_logits(Engine(folder, config(kv="full")), tokens[0].tolist())
        torch.testing.assert_close(exactly.double(), expected, rtol=0, atol=1e-4)
        roughly = prompt_logits(
            Engine(folder, config(kv="full", dtype="bfloat16")), tokens[0].tolist()
        )
        assert float((roughly.double() - expected).norm() / expected.norm()) < 0.03
