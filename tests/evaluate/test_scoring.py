"""Log-probabilities of texts after texts, against transformers in float32, and what must hold
whatever runs beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantflow.checkpoints.tensor_file import TensorFile, save_tensors
from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.engine.llm import LLM
from quantflow.engine.request import SamplingParams
from quantflow.errors import DataError, ModelError
from quantflow.evaluate.scoring import Encoder, Pair, Prompt, Score, generate, loglikelihoods
from tests.helpers.tiny import SENTENCES

CASES = [
    ("The quick fox", " jumps over"),
    ("The quick fox ", "jumps over"),  # the space belongs to what follows
    ("", "The old whale"),
    ("", "<s>The old whale"),
    ("   ", "sleeps"),
    ("<s>The grey bird", " looks"),  # says its BOS itself
    ("The small cat", "s"),
    (" ".join(SENTENCES[:30]), " walks over the hill number 7."),  # longer than the context
    ("The old whale", " " + " ".join(SENTENCES[:4])),
]


def make(folder: Path, **options: Any) -> Engine:
    return Engine(
        folder, EngineConfig(**{"device": "cpu", "block_size": 16, "check": True, **options})
    )


@pytest.fixture(scope="module")
def by_transformers(tiny: Path) -> list[tuple[float, bool, int, int]]:
    """(log-probability, greedy, tokens, tokens cut) of CASES: text by text, by the steps that
    lm_eval's `hf` model takes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32),
        AutoTokenizer.from_pretrained(tiny),
    )
    context_length, found = model.config.max_position_embeddings, []
    for context, continuation in CASES:
        if context == "":
            before, after = (
                [tokenizer.bos_token_id],
                tokenizer.encode(continuation, add_special_tokens=False),
            )
            if after[0] == tokenizer.bos_token_id:
                before, after = after[:1], after[1:]
        else:
            spaces = len(context) - len(context.rstrip())
            kept, moved = context[: len(context) - spaces], context[len(context) - spaces :]
            special = not context.startswith("<s>")
            before = tokenizer.encode(kept, add_special_tokens=special)
            after = tokenizer.encode(kept + moved + continuation, add_special_tokens=special)[
                len(before) :
            ]
        whole = (before + after)[-(context_length + 1) :]
        with torch.no_grad():
            logprobs = model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
        rows = logprobs[-len(after) :]
        total = float(rows.gather(1, torch.tensor(after)[:, None]).sum())
        found.append(
            (
                total,
                rows.argmax(-1).tolist() == after,
                len(after),
                len(before) + len(after) - len(whole),
            )
        )
    return found


def test_scores_are_transformers(
    tiny: Path, by_transformers: list[tuple[float, bool, int, int]]
) -> None:
    engine = make(tiny, dtype="float32")
    encoder = Encoder(engine)
    found = list(loglikelihoods(engine, [encoder.pair(*case) for case in CASES], 4))
    for score, (logprob, greedy, tokens, cut) in zip(found, by_transformers, strict=True):
        assert score == Score(pytest.approx(logprob, abs=2e-4), greedy, tokens, cut)
    assert [bool(score.cut) for score in found] == [False] * 7 + [True, False]


def test_the_likeliest_text_is_greedy(tiny: Path) -> None:
    engine = make(tiny)
    context = engine.tokenizer.encode("The old cat")
    text = (
        next(
            generate(
                engine, [Prompt(tuple(context), SamplingParams(max_tokens=5, ignore_eos=True))], 1
            )
        )
        .completions[0]
        .token_ids
    )
    other = (*text[:4], (text[4] + 1) % 300)
    scores = list(
        loglikelihoods(engine, [Pair(tuple(context), c) for c in (text, other, text[:1])], 2)
    )
    assert [score.greedy for score in scores] == [True, False, True]
    assert scores[1].logprob < scores[0].logprob < scores[2].logprob


def pairs(encoder: Encoder, count: int = 40) -> list[Pair]:
    """Questions of four choices: with contexts of several blocks, of less than one, and longer than
    the model's."""
    found = []
    for i in range(count // 4):
        context = " ".join(SENTENCES[i : i + (1, 3, 5, 30)[i % 4]])
        found += [
            encoder.pair(context, f" {word}")
            for word in ("fox", "the whale sleeps", "no", "a bird over the house")
        ]
    return found


@pytest.mark.parametrize("which", ["tiny", "artifact"])
def test_scores_are_the_same_bit_for_bit_whatever_the_batch(
    which: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    results = []
    for batch, options in (
        (1, {"prefix_cache": False}),
        (3, {"step_tokens": 37}),
        (16, {}),
        (64, {"cache_bytes": 37_000}),
    ):
        engine = make(folder, max_batch_size=min(batch, 16), **options)
        results.append(list(loglikelihoods(engine, pairs(Encoder(engine)), batch)))
    assert len(results[0]) == 40 and all(result == results[0] for result in results[1:])


def test_choices_share_their_context(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that go through the model: a context of 6 blocks once, and what is left of each
    choice."""
    context = tuple(7 * i % 240 + 3 for i in range(100))
    questions = [
        Pair((*context[:99], own), (5, choice)) for own in (1, 2) for choice in (6, 7, 8, 9)
    ]

    def run(**options: Any) -> int:
        engine, seen = make(tiny, **options), [0]
        before = engine.runner.run

        def counted(step: Any) -> Any:
            seen[0] += sum(work.count for work in step.work)
            return before(step)

        monkeypatch.setattr(engine.runner, "run", counted)
        list(loglikelihoods(engine, questions, 8))
        return seen[0]

    assert run(prefix_cache=False) == 8 * 101
    # Whole blocks of a context are found again up to its last token, which has to go through the
    # model.
    assert run() == 2 * 101 + 6 * (101 - 96)


def test_pairs_are_taken_as_there_is_room(tiny: Path) -> None:
    engine, taken = make(tiny), [0]
    encoder = Encoder(engine)

    def endless() -> Iterator[Pair]:
        while True:
            taken[0] += 1
            yield encoder.pair(SENTENCES[taken[0] % 200], " yes")

    scores = loglikelihoods(engine, endless(), 4)
    for done in range(1, 30):
        next(scores)
        assert taken[0] <= done + 4 * 8
        assert len(list(engine.scheduler.sequences())) <= 4
    scores.close()
    assert not engine.has_work and engine.problems() == []  # what nobody waits for is gone


def test_generation_keeps_its_order(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", block_size=16)
    texts = [SENTENCES[i] for i in range(12)]
    wanted = [SamplingParams(max_tokens=1 + 5 * i % 17, ignore_eos=True) for i in range(12)]
    expected = [output.completions[0].token_ids for output in llm.generate(texts, wanted)]
    prompts = [
        Prompt(tuple(llm.encode(text)), params) for text, params in zip(texts, wanted, strict=True)
    ]
    for batch in (1, 5):
        assert [
            output.completions[0].token_ids for output in generate(llm.engine, prompts, batch)
        ] == expected


def test_what_cannot_be_scored_is_said(tiny: Path, tmp_path: Path) -> None:
    engine = make(tiny)
    with pytest.raises(DataError, match=r"q\.jsonl:3: '' makes no token of its own"):
        Encoder(engine).pair("The", "", "q.jsonl:3")
    with pytest.raises(
        DataError,
        match="here: a continuation of 129 tokens; expected at most the model's context, 128",
    ):
        list(loglikelihoods(engine, [Pair((3,), (4,)), Pair((3,), (5,) * 129, "here")], 4))
    assert not engine.has_work
    small = make(tiny, cache_bytes=20_000)  # 256 bytes a token
    assert (small.room, small.context) == (64, 128)
    with pytest.raises(DataError, match="expected at most what the KV cache holds, 64"):
        list(loglikelihoods(small, [Pair((3,), (5,) * 65, "here")], 4))
    [cut] = loglikelihoods(small, [Pair((3,) * 100, (5, 6))], 4)
    assert cut.cut == 102 - 65
    [longest] = loglikelihoods(engine, [Pair((3, 4), (5,) * 128)], 4)
    assert (longest.tokens, longest.cut) == (128, 1) and math.isfinite(longest.logprob)
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stored = TensorFile(tiny / "model.safetensors")
    tensors = {name: stored.read(name) for name in stored.tensors}
    tensors["model.layers.0.mlp.down_proj.weight"][:] = 3e38  # finite, but not what comes of it
    save_tensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        list(loglikelihoods(make(tmp_path), [Pair((3,), (4,), "here")], 1))
