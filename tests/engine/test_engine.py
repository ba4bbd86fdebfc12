"""What the engine does with requests: texts that end, sessions, siblings, limits, faults."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.engine.llm import LLM, Collector
from quantflow.engine.request import Completion, Finish, Output, SamplingParams
from quantflow.engine.sampler import draw
from quantflow.errors import RequestError, ResourceError, UserError
from tests.helpers.zoo import specimen, write

PROMPT = [5, 9, 13, 17, 21]


def make(folder: Path, **options: Any) -> Engine:
    return Engine(
        folder, EngineConfig(**{"device": "cpu", "block_size": 16, "check": True, **options})
    )


def run(
    engine: Engine, prompt: list[int] | str = PROMPT, session: int | None = None, **params: Any
) -> Completion:
    collector = Collector(engine.submit(prompt, SamplingParams(**params), session=session))
    for token in engine.tokens():
        collector.add(token)
    assert collector.done
    return collector.output().completions[0]


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return make(tiny)


# --- where a text ends


def test_max_tokens_and_the_context_end_a_text(engine: Engine) -> None:
    assert len(run(engine, max_tokens=7, ignore_eos=True).token_ids) == 7
    whole = run(engine, ignore_eos=True)
    assert whole.finish == Finish.length and len(whole.token_ids) == engine.context - len(PROMPT)


def test_an_end_token_ends_a_text_unless_it_is_ignored_or_too_early(engine: Engine) -> None:
    forced = {"logit_bias": {1: 100.0}}  # </s>
    found = run(engine, max_tokens=5, **forced)
    assert (found.finish, found.token_ids, found.text, found.stop) == (Finish.stop, (1,), "", None)
    # it ends every text
    assert run(engine, max_tokens=5, stop_token_ids=(1,), **forced).stop is None
    assert run(engine, max_tokens=5, stop_token_ids=(1,), ignore_eos=True, **forced).stop == 1
    assert run(engine, max_tokens=5, ignore_eos=True, **forced).token_ids == (1,) * 5
    late = run(engine, max_tokens=5, min_tokens=3, **forced)
    assert late.finish == Finish.stop and late.token_ids.index(1) == 3


def test_stop_tokens(engine: Engine) -> None:
    whole = run(engine, max_tokens=12, ignore_eos=True).token_ids
    found = run(engine, max_tokens=12, ignore_eos=True, stop_token_ids=(whole[5],))
    assert (found.finish, found.stop) == (Finish.stop, whole[5]) and found.token_ids == whole[
        : whole.index(whole[5]) + 1
    ]


def test_what_ends_a_text_is_shown_where_that_is_asked_for(engine: Engine) -> None:
    whole = run(engine, max_tokens=30, ignore_eos=True)
    for start in range(2, len(whole.text) - 6, 5):
        stop = whole.text[start : start + 6]
        found = run(engine, max_tokens=30, ignore_eos=True, stop=(stop,), include_stop=True)
        assert (found.stop, found.text) == (stop, whole.text[: whole.text.index(stop) + 6])
    count = whole.token_ids.index(whole.token_ids[5]) + 1
    found = run(
        engine,
        max_tokens=30,
        ignore_eos=True,
        stop_token_ids=(whole.token_ids[5],),
        include_stop=True,
    )
    assert found.text == run(engine, max_tokens=count, ignore_eos=True).text
    end: dict[str, Any] = {"logit_bias": {1: 100.0}, "max_tokens": 5, "include_stop": True}  # </s>
    assert [run(engine, **end, skip_special_tokens=skip).text for skip in (True, False)] == [
        "",
        "</s>",
    ]


def test_stop_strings_may_span_tokens_and_are_not_shown(engine: Engine) -> None:
    whole = run(engine, max_tokens=30, ignore_eos=True)
    text = whole.text
    for start in range(2, len(text) - 6, 3):
        stop = text[start : start + 6]
        found = run(engine, max_tokens=30, ignore_eos=True, stop=(stop, "never there"))
        assert (found.finish, found.stop) == (Finish.stop, stop) and found.text == text[
            : text.index(stop)
        ]
    half = text[-3:] + "§"  # its beginning is held back, and shown in the end
    assert run(engine, max_tokens=30, ignore_eos=True, stop=(half,)).text == text
    assert whole.stop is None


def test_what_is_streamed_adds_up_to_the_text(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu")
    for stop in ((), ("zz", "the")):
        params = SamplingParams(max_tokens=40, temperature=1.5, seed=4, stop=stop)
        parts = [token.text for token in llm.stream("The small cat", params)]
        assert (
            "".join(parts) == llm.generate("The small cat", params)[0].text
            and len([p for p in parts if p]) > 3
        )


# --- several texts, log-probabilities


def test_siblings_are_the_texts_of_their_own_random_numbers(engine: Engine) -> None:
    params = SamplingParams(max_tokens=9, temperature=1.5, seed=11, n=4)
    collector = Collector(engine.submit(list(range(3, 40)), params))
    for token in engine.tokens():
        collector.add(token)
    texts = [c.token_ids for c in collector.output().completions]
    assert len(set(texts)) == 4 and [len(t) for t in texts] == [9] * 4
    assert (
        texts[0]
        == run(engine, list(range(3, 40)), max_tokens=9, temperature=1.5, seed=11).token_ids
    )


def test_seeds(engine: Engine) -> None:
    def text(**params: Any) -> tuple[int, ...]:
        return run(engine, max_tokens=12, temperature=2.0, **params).token_ids

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text() != text()
    assert text(seed=-1) == text(seed=2**64 - 1)


def test_log_probabilities_are_the_models_own(engine: Engine) -> None:
    params = SamplingParams(
        max_tokens=4, temperature=3.0, seed=5, logprobs=3, prompt_logprobs=2, logit_bias={7: 3.0}
    )
    collector = Collector(engine.submit(PROMPT, params))
    for token in engine.tokens():
        collector.add(token)
    output = collector.output()
    tokens = [*PROMPT, *output.completions[0].token_ids]
    # The same by scoring the whole text as a prompt.
    scored = Collector(engine.submit(tokens, SamplingParams(max_tokens=1, prompt_logprobs=3)))
    for token in engine.tokens():
        scored.add(token)
    expected = scored.output().prompt_logprobs
    assert output.prompt_logprobs[0] is None and expected[0] is None
    assert [p.logprob for p in output.prompt_logprobs[1:] if p] == [
        p.logprob for p in expected[1 : len(PROMPT)] if p
    ]
    assert output.completions[0].logprobs == tuple(expected[len(PROMPT) :])
    for found in output.completions[0].logprobs:
        assert len(found.top) == 3 and found.top[0][1] >= found.top[1][1] >= found.top[2][1]
        assert found.rank > 3 or found.top[found.rank - 1] == (found.token, found.logprob)


def scored(engine: Engine, tokens: list[int], **params: Any) -> Output:
    collector = Collector(engine.submit(tokens, SamplingParams(prompt_logprobs=0, **params)))
    for token in engine.tokens():
        collector.add(token)
    return collector.output()


def test_a_prompt_is_scored_without_a_text(engine: Engine) -> None:
    expected = scored(engine, PROMPT, max_tokens=1).prompt_logprobs
    found = scored(engine, PROMPT, max_tokens=0)
    assert found.prompt_logprobs == expected and len(expected) == len(PROMPT)
    assert found.completions[0].token_ids == () and found.completions[0].finish == Finish.length
    # From some token on: the same numbers, whether the tokens before come from the prefix cache or
    # not.
    first = scored(engine, PROMPT, max_tokens=0, prompt_logprobs_from=len(PROMPT) - 2)
    assert first.prompt_logprobs == (*[None] * (len(PROMPT) - 2), *expected[-2:])
    assert not engine.has_work and engine.problems() == []


def test_what_is_not_scored_comes_from_the_prefix_cache(tiny: Path) -> None:
    engine = Engine(tiny, EngineConfig(device="cpu", block_size=16, check=True))
    tokens = [7 * i % 240 + 3 for i in range(70)]
    whole = scored(engine, tokens, max_tokens=0)
    for start, cached in ((0, 0), (16, 0), (17, 16), (48, 32), (69, 64)):
        found = scored(engine, tokens, max_tokens=0, prompt_logprobs_from=start)
        assert found.cached_tokens == cached
        assert found.prompt_logprobs[max(1, start) :] == whole.prompt_logprobs[max(1, start) :]
        assert not any(found.prompt_logprobs[: max(1, start)])


def test_the_last_token_of_a_scored_prompt_needs_no_room(tiny: Path) -> None:
    engine = Engine(tiny, EngineConfig(device="cpu", session_len=20, check=True))
    tokens = list(range(3, 24))  # one more than the context
    found = scored(engine, tokens, max_tokens=0)
    assert found.prompt_logprobs[:19] == scored(engine, tokens[:19], max_tokens=1).prompt_logprobs
    assert found.prompt_logprobs[20] is not None and found.prompt_logprobs[20].token == tokens[20]
    for wrong, said in (
        ([*tokens, 3], "2 to 21: the model's context is 20"),
        ([3], "1 tokens to score"),
    ):
        with pytest.raises(RequestError, match=said):
            scored(engine, wrong, max_tokens=0)
    with pytest.raises(RequestError, match="less than the prompt's 3 tokens"):
        scored(engine, [3, 4, 5], max_tokens=0, prompt_logprobs_from=3)
    with pytest.raises(RequestError, match="in a session"):
        engine.submit([3, 4, 5], SamplingParams(max_tokens=0, prompt_logprobs=0), session=1)


# --- sessions


def test_a_session_goes_on_where_its_last_turn_ended(engine: Engine) -> None:
    first = run(engine, PROMPT * 8, session=1, max_tokens=20, ignore_eos=True).token_ids
    second = run(engine, [3, 4], session=1, max_tokens=9, ignore_eos=True).token_ids
    whole = [*PROMPT * 8, *first, 3, 4]
    assert second == run(engine, whole, max_tokens=9, ignore_eos=True).token_ids
    assert engine.blocks.used_blocks == len(engine.sessions[1].blocks) > 0
    engine.rewind(1, 45)
    third = run(engine, [3, 4], session=1, max_tokens=9, ignore_eos=True).token_ids
    assert third == run(engine, [*whole[:45], 3, 4], max_tokens=9, ignore_eos=True).token_ids
    engine.end(1)
    assert engine.blocks.used_blocks == 0 and engine.problems() == []


def test_a_sessions_history_is_not_computed_again(engine: Engine) -> None:
    run(engine, PROMPT * 10, session=2, max_tokens=2, ignore_eos=True)
    request = engine.submit([3], SamplingParams(max_tokens=1), session=2)
    (sequence,) = engine._requests[request.id]
    list(engine.tokens())
    assert sequence.cached == 48  # three blocks of 16 out of 52 tokens
    engine.end(2)


def test_sessions_that_are_idle_give_their_blocks_up(tiny: Path) -> None:
    engine = make(tiny, max_batch_size=1)
    assert engine.blocks.count == 8
    run(engine, PROMPT * 8, session=1, max_tokens=20, ignore_eos=True)
    run(engine, PROMPT * 20, max_tokens=20, ignore_eos=True)
    assert engine.sessions[1].blocks == []
    tokens = list(engine.sessions[1].tokens)
    again = run(engine, [3], session=1, max_tokens=5, ignore_eos=True).token_ids
    assert again == run(engine, [*tokens, 3], max_tokens=5, ignore_eos=True).token_ids


def test_what_sessions_refuse(engine: Engine) -> None:
    engine.submit(PROMPT, SamplingParams(max_tokens=3), session=5, id="busy")
    for action in (
        lambda: engine.submit(PROMPT, session=5),
        lambda: engine.end(5),
        lambda: engine.rewind(5, 0),
    ):
        with pytest.raises(RequestError, match="running"):
            action()
    with pytest.raises(RequestError, match="not known"):
        engine.end(6)
    with pytest.raises(RequestError, match="1 in a session"):
        engine.submit(PROMPT, SamplingParams(n=2), session=6)
    engine.abort("busy")
    with pytest.raises(RequestError, match="at most its"):
        engine.rewind(5, 999)
    engine.end(5)


# --- what is refused


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ([], {}, "no tokens"),
        ([999], {}, "token 999"),
        ([-1], {}, "token -1"),
        ([3] * 128, {}, "fewer than 128"),
        ([3] * 100, {"max_tokens": 29}, "at most 28"),
        ([3], {"logit_bias": {320: 1.0}}, "logit_bias"),
        ([3], {"stop_token_ids": (400,)}, "stop_token_ids"),
        ([3], {"n": 64}, "at most 4"),
        ([3], {"max_tokens": 10**400}, "at most 127"),
        ([3], {"logit_bias": {10**400: 1.0}}, "logit_bias"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_at_once(
    tiny: Path, prompt: list[int], params: dict[str, Any], said: str
) -> None:
    engine = make(tiny, max_batch_size=4)
    with pytest.raises(RequestError, match=said):
        engine.submit(prompt, SamplingParams(**params))
    assert not engine.has_work and engine.problems() == []


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"presence_penalty": 3},
        {"frequency_penalty": float("nan")},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {"1": 1.0}},
        {"logit_bias": {i: 0.0 for i in range(2000)}},
        {"n": 0},
        {"n": 10**9},
        {"stop": ("",)},
        {"stop": ("x",) * 100},
        {"stop": ("x" * 10**6,)},
        {"logprobs": 10**6},
        {"min_tokens": 5, "max_tokens": 4},
        {"seed": 2**70},
        {"max_tokens": 0, "prompt_logprobs": 0, "n": 2},
        {"prompt_logprobs_from": 3},
        {"prompt_logprobs_from": -1, "prompt_logprobs": 0},
    ],
)
def test_parameters_out_of_bounds_are_refused_by_name(params: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**params)
    assert {p.where for p in caught.value.problems} <= set(params)


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(n=0, top_p=7, temperature=-1)
    assert [p.where for p in caught.value.problems] == ["temperature", "top_p", "n"]
    with pytest.raises(UserError) as wrong:
        EngineConfig(mode="quick", block_size=24, cache_max_entry_count=2.0)  # type: ignore[arg-type]
    assert [p.where for p in wrong.value.problems] == [
        "mode",
        "block_size",
        "cache_max_entry_count",
    ]


# --- faults


def test_a_model_that_gives_nan_fails_that_request_alone(tiny: Path) -> None:
    engine = make(tiny)
    expected = run(engine, max_tokens=6, ignore_eos=True).token_ids
    logits = engine.runner.logits

    def broken(h: torch.Tensor) -> torch.Tensor:
        found = logits(h).clone()
        if len(found) > 1:
            found[1] = torch.nan
        return found

    engine.runner.logits = broken  # type: ignore[method-assign]
    collectors = [
        Collector(engine.submit(PROMPT, SamplingParams(max_tokens=6, ignore_eos=True)))
        for _ in range(2)
    ]
    for token in engine.tokens():
        next(c for c in collectors if c.request.id == token.request).add(token)
    first, second = (c.output().completions[0] for c in collectors)
    assert first.token_ids == expected
    assert (
        second.finish == Finish.error and "not finite" in second.reason and second.token_ids == ()
    )
    assert engine.problems() == [] and engine.blocks.used_blocks == 0


def test_out_of_memory_fails_one_request_and_the_engine_goes_on(tiny: Path) -> None:
    engine = make(tiny)
    expected = run(engine, max_tokens=6, ignore_eos=True).token_ids
    forward, failures = engine.runner.run, []

    def short(step: Any) -> Any:
        if any(work.count > 30 for work in step.work):
            failures.append(len(step.work))
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."
            )
        return forward(step)

    engine.runner.run = short  # type: ignore[method-assign]
    small = Collector(engine.submit(PROMPT, SamplingParams(max_tokens=6, ignore_eos=True)))
    large = Collector(engine.submit(PROMPT * 9, SamplingParams(max_tokens=6)))
    for token in engine.tokens():
        (small if token.request == small.request.id else large).add(token)
    assert failures == [2]
    assert small.output().completions[0].token_ids == expected
    assert (
        large.output().completions[0].finish == Finish.error
        and "out of memory" in large.output().completions[0].reason
    )
    assert engine.problems() == [] and engine.blocks.used_blocks == 0


def test_another_error_in_a_step_is_not_hidden(tiny: Path) -> None:
    engine = make(tiny)

    def broken(step: Any) -> Any:
        raise RuntimeError("shapes do not match")

    engine.runner.run = broken  # type: ignore[method-assign]
    engine.submit(PROMPT)
    with pytest.raises(RuntimeError, match="shapes"):
        engine.step()


def test_generate_raises_what_went_wrong_and_leaves_nothing(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu")
    llm.engine.runner.logits = lambda h: torch.full((len(h), 320), torch.nan)  # type: ignore[method-assign]
    with pytest.raises(ResourceError, match="not finite"):
        llm.generate([PROMPT, PROMPT])
    with pytest.raises(RequestError):
        llm.generate([PROMPT, [999]])
    assert not llm.engine.has_work and llm.engine.blocks.used_blocks == 0


def test_leaving_a_stream_gives_its_blocks_back(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu")
    stream = llm.stream(PROMPT, SamplingParams(ignore_eos=True))
    next(stream)
    assert llm.engine.blocks.used_blocks == 1
    stream.close()
    assert llm.engine.blocks.used_blocks == 0 and not llm.engine.has_work


def test_two_thousand_requests_leave_no_block_behind(tiny: Path) -> None:
    """With aborts, priorities, sessions, siblings and preemptions; the books are checked after
    every step."""
    engine = make(tiny, max_batch_size=6, step_tokens=40)
    engine.blocks.__init__(12, 16)  # type: ignore[misc]
    picked, live, finished = random.Random(0), [], 0  # type: ignore[var-annotated]
    sent = 0
    while sent < 2000 or engine.has_work:
        while sent < 2000 and len(engine._requests) < 10:
            prompt = [picked.randrange(2, 40) for _ in range(picked.choice([1, 3, 20, 60]))]
            params = SamplingParams(
                max_tokens=picked.choice([1, 2, 9, 25]),
                n=picked.choice([1, 1, 1, 3]),
                temperature=1.0,
                seed=sent,
            )
            session = picked.randrange(5) if params.n == 1 and picked.random() < 0.3 else None
            try:
                live.append(
                    engine.submit(prompt, params, priority=picked.randrange(3), session=session).id
                )
            except RequestError as error:
                assert session is not None and ("running" in str(error) or "context" in str(error))
                if "context" in str(error):
                    engine.end(session)
            sent += 1
        if picked.random() < 0.2 and live:
            finished += len(engine.abort(live.pop(picked.randrange(len(live)))))
        finished += sum(token.finish is not None for token in engine.step())
    assert finished >= 2000 - 400 and engine.scheduler.preemptions > 20
    for session in list(engine.sessions):
        engine.end(session)
    assert engine.blocks.used_blocks == 0 and engine.problems() == []
    assert not engine._requests


def test_a_low_priority_waits_but_every_request_ends(tiny: Path) -> None:
    engine = make(tiny, max_batch_size=1)
    first = engine.submit(PROMPT, SamplingParams(max_tokens=3), priority=5)
    second = engine.submit(PROMPT, SamplingParams(max_tokens=3), priority=0)
    ends = [t.request for t in engine.tokens() if t.finish]
    assert ends == [second.id, first.id]


# --- found by reviewers


def test_as_many_tokens_as_fit_beside_others_on_a_stretched_model(tmp_path: Path) -> None:
    """A text that may run to the end of a stretched context is stretched for that, and leaves its
    neighbours alone."""
    engine = make(write(tmp_path, specimen("qwen")), dtype="float32", session_len=128)
    alone = run(engine, [3] * 20, max_tokens=40, ignore_eos=True).token_ids
    told = run(engine, [7, 8], max_tokens=126, ignore_eos=True).token_ids
    collectors = [
        Collector(engine.submit(prompt, SamplingParams(max_tokens=most, ignore_eos=True)))
        for prompt, most in (([7, 8], None), ([3] * 20, 40), ([7, 8], None))
    ]
    for token in engine.tokens():
        next(c for c in collectors if c.request.id == token.request).add(token)
    assert [c.output().completions[0].token_ids for c in collectors] == [told, alone, told]
    assert len(told) == 126


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("more", [1, 60, 107])
@pytest.mark.parametrize("scored", [None, 0])
def test_a_sessions_own_blocks_never_keep_its_next_turn_out(
    tiny: Path, prefix_cache: bool, more: int, scored: int | None
) -> None:
    engine = make(tiny, max_batch_size=1, prefix_cache=prefix_cache)
    assert engine.blocks.count == 8
    first = run(engine, [4] * 10, session=1, max_tokens=10, ignore_eos=True).token_ids
    stranger = engine.submit([9] * 100, SamplingParams(max_tokens=20, ignore_eos=True))
    turn = engine.submit(
        [3] * more, SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=scored), session=1
    )
    finished = []
    for _ in range(1000):
        finished += [token.request for token in engine.step() if token.finish]
        if not engine.has_work:
            break
    assert finished == [stranger.id, turn.id]
    assert engine.sessions[1].tokens[:-1] == [4] * 10 + list(first) + [3] * more
    engine.end(1)
    assert engine.blocks.used_blocks == 0


def test_out_of_memory_while_sampling_fails_one_request(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(tiny)
    expected = run(engine, max_tokens=6, ignore_eos=True).token_ids
    calls = []

    def short(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return draw(*arguments)

    monkeypatch.setattr("quantflow.engine.engine.draw", short)
    collectors = [
        Collector(engine.submit(PROMPT, SamplingParams(max_tokens=6, ignore_eos=True)))
        for _ in range(2)
    ]
    for token in engine.tokens():
        next(c for c in collectors if c.request.id == token.request).add(token)
    ends = sorted(
        (c.output().completions[0].finish, c.output().completions[0].token_ids == expected)
        for c in collectors
    )
    assert ends == [(Finish.error, False), (Finish.length, True)]
    assert engine.problems() == [] and engine.blocks.used_blocks == 0


def test_end_tokens_that_the_model_cannot_make_are_left_out(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 999, -1, true]}')
    engine = make(folder)
    assert engine.end_tokens == {1}
    assert len(run(engine, max_tokens=6, min_tokens=4).token_ids) >= 4


def test_streams_and_generate_share_an_engine(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu")
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = llm.generate([PROMPT, [3]], params)
    first, second = llm.stream(PROMPT, params), llm.stream([3], params)
    found = [[next(first)], [next(second), next(second)]]
    assert [o.completions for o in llm.generate([PROMPT, [3]], params)] == [
        o.completions for o in expected
    ]
    for tokens, stream in zip(found, (first, second), strict=True):
        tokens += stream
    assert [tuple(t.token for t in tokens) for tokens in found] == [
        o.completions[0].token_ids for o in expected
    ]
    assert not llm._inboxes


def test_measuring_takes_blocks_from_idle_sessions_and_gives_all_back(tiny: Path) -> None:
    engine = make(tiny, max_batch_size=1)
    run(engine, [4] * 90, session=1, max_tokens=2)
    states = engine.hidden_states([5] * 100)
    assert states.shape == (100, 64) and engine.blocks.used_blocks == 0 and engine.problems() == []
    engine.submit([4] * 100, SamplingParams(max_tokens=20))
    engine.step()
    with pytest.raises(ResourceError, match="free blocks"):
        engine.hidden_states([5] * 100)
    assert engine.problems() == []


def test_min_tokens_holds_stop_strings_off_too(engine: Engine) -> None:
    whole = run(engine, max_tokens=30, ignore_eos=True)
    early = whole.text[2:5]
    assert whole.text.index(early) == 2
    found = run(engine, max_tokens=30, min_tokens=30, ignore_eos=True, stop=(early,))
    assert found.text == whole.text and len(found.token_ids) == 30


def test_aborting_before_siblings_begin_ends_them_all(engine: Engine) -> None:
    request = engine.submit(PROMPT, SamplingParams(n=3))
    assert sorted((t.index, t.finish) for t in engine.abort(request.id)) == [
        (i, Finish.abort) for i in range(3)
    ]
    assert engine.abort(request.id) == [] and not engine.has_work


@pytest.mark.parametrize(
    "arguments",
    [
        {"priority": "high"},
        {"priority": None},
        {"session": "a"},
        {"id": 7},
        {"prompt": [3.9]},
        {"prompt": [True]},
        {"prompt": None},
        {"prompt": [[3]]},
    ],
)
def test_arguments_of_another_kind_are_refused_and_leave_nothing(
    engine: Engine, arguments: dict[str, Any]
) -> None:
    with pytest.raises(RequestError):
        engine.submit(**{"prompt": PROMPT, **arguments})
    assert not engine.has_work


def test_given_ids_and_made_ones_do_not_meet(engine: Engine) -> None:
    ids = [engine.submit(PROMPT, id=f"request-{next(engine._arrivals) + 2}").id]
    ids += [engine.submit(PROMPT).id for _ in range(3)]
    with pytest.raises(RequestError, match="no running request"):
        engine.submit(PROMPT, id=ids[0])
    assert len(set(ids)) == 4
    for id in ids:
        engine.abort(id)


def test_what_the_prefix_cache_held_is_said(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", block_size=16)
    first, second = (llm.generate([3] * 40, SamplingParams(max_tokens=2))[0] for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 32)


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cuda:7"},
        {"prefix_cache": "no"},
        {"max_batch_size": 2.5},
        {"session_len": 64.5},
        {"tp": 0},
    ],
)
def test_options_of_another_kind_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        EngineConfig(**options)
    assert {p.where for p in caught.value.problems} == set(options)


@pytest.mark.parametrize(
    "params",
    [
        {"seed": 10**400},
        {"stop": None},
        {"stop": 5},
        {"stop_token_ids": None},
        {"temperature": 1e-39},
        {"repetition_penalty": 1e-40},
    ],
)
def test_absurd_parameters_are_refused_too(params: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**params)
    assert {p.where for p in caught.value.problems} == set(params)


def test_a_stop_string_that_is_never_shown_is_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match="stop_token_ids"):
        engine.submit(PROMPT, SamplingParams(stop=("</s>",)))


def test_a_long_prompt_does_not_hold_up_texts_that_are_being_written(tiny: Path) -> None:
    """Its chunks share the steps with their decodes, even where it comes first in order."""
    engine = make(tiny, max_batch_size=2, step_tokens=20)
    writing = engine.submit(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True), priority=1)
    engine.step()
    engine.submit([9] * 100, SamplingParams(max_tokens=1), priority=0)
    for _ in range(6):  # 100 tokens, 19 a step
        assert writing.id in [token.request for token in engine.step()]
    assert not [id for id in engine._requests if id != writing.id]
    engine.abort(writing.id)
