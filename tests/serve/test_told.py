"""What vLLM's clients may ask to be told beside the text: tokens, the prompt's log-probabilities;
and who goes first."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from quantflow import LLM, SamplingParams
from tests.helpers.serving import DEMO, Running, serving


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(DEMO, device="cpu", cache_bytes=2**26)


# --- tokens


def test_token_ids_of_both_apis(server: Running, llm: LLM) -> None:
    prompt = llm.encode(llm.get_prompt("What is a table?"), special=False)
    expected = list(llm.generate(prompt, SamplingParams(max_tokens=6))[0].completions[0].token_ids)
    chat = server.chat(max_tokens=6, return_token_ids=True).json
    assert (chat["prompt_token_ids"], chat["choices"][0]["token_ids"]) == (prompt, expected)
    prompts = ["The table", "An index is"]
    answer = server.complete(prompt=prompts, n=2, max_tokens=6, return_token_ids=True).json
    for choice in answer["choices"]:
        prompt = llm.encode(prompts[choice["index"] // 2])
        assert choice["prompt_token_ids"] == prompt
        assert choice["token_ids"] == list(
            llm.generate(prompt, SamplingParams(max_tokens=6))[0].completions[0].token_ids
        )
    assert (
        "token_ids" not in server.complete().body.decode()
        and "token_ids" not in server.chat().body.decode()
    )


def test_token_ids_of_streams(server: Running) -> None:
    body: Any = {
        "max_tokens": 9,
        "n": 2,
        "temperature": 1,
        "seed": 3,
        "return_token_ids": True,
        "stop": ["e"],
    }
    whole, events = server.chat(**body).json, server.chat(**body, stream=True).events
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"] and not any(
        "prompt_token_ids" in e for e in events[1:]
    )
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert [t for c in mine for t in c.get("token_ids", [])] == choice["token_ids"]
    whole, events = server.complete(**body).json, server.complete(**body, stream=True).events
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert [t for c in mine for t in c.get("token_ids", [])] == choice["token_ids"]
        assert [c["prompt_token_ids"] for c in mine if "prompt_token_ids" in c] == [
            choice["prompt_token_ids"]
        ]


# --- the prompt's log-probabilities


@pytest.mark.parametrize("count", [0, 3])
def test_prompt_logprobs(server: Running, llm: LLM, count: int) -> None:
    tokens = llm.encode("The table is")
    expected = llm.generate(tokens, SamplingParams(max_tokens=1, prompt_logprobs=count))[
        0
    ].prompt_logprobs
    found = server.complete(prompt="The table is", max_tokens=1, prompt_logprobs=count).json[
        "choices"
    ][0]["prompt_logprobs"]
    assert len(found) == len(tokens) and found[0] is None
    for token, told, score in zip(tokens[1:], found[1:], expected[1:], strict=True):
        assert score is not None and next(iter(told)) == str(token)
        assert (
            told[str(token)]["logprob"] == pytest.approx(score.logprob)
            and told[str(token)]["rank"] == score.rank
        )
        assert told[str(token)]["decoded_token"] == server.service.text.token_text(token)
        ranks = {entry["rank"]: int(id) for id, entry in told.items()}
        assert [ranks[rank] for rank in range(1, count + 1)] == [t for t, _ in score.top]
        assert len(told) == len({token, *(t for t, _ in score.top)})


def test_prompt_logprobs_of_a_dialogue(server: Running, llm: LLM) -> None:
    prompt = llm.encode(llm.get_prompt("What is a table?"), special=False)
    chat = server.chat(prompt_logprobs=1).json
    assert (
        chat["prompt_logprobs"]
        == server.complete(prompt=prompt, prompt_logprobs=1).json["choices"][0]["prompt_logprobs"]
    )
    assert "prompt_logprobs" not in server.chat().json


def test_prompt_logprobs_beside_an_echo(server: Running) -> None:
    """Each keeps its own number of alternatives."""
    answer = server.complete(prompt="The table is", echo=True, logprobs=1, prompt_logprobs=3).json[
        "choices"
    ][0]
    alone = server.complete(prompt="The table is", echo=True, logprobs=1).json["choices"][0]
    assert answer["logprobs"] == alone["logprobs"]
    assert (
        answer["prompt_logprobs"]
        == server.complete(prompt="The table is", prompt_logprobs=3).json["choices"][0][
            "prompt_logprobs"
        ]
    )
    scored = server.complete(prompt="The table is", echo=True, max_tokens=0, prompt_logprobs=3).json
    assert (
        scored["choices"][0]["prompt_logprobs"] == answer["prompt_logprobs"]
        and scored["usage"]["completion_tokens"] == 0
    )


# --- the rest


def test_do_sample(server: Running) -> None:
    assert (
        server.chat(temperature=1, do_sample=False).json["choices"]
        == server.chat(temperature=0).json["choices"]
    )
    assert server.chat(do_sample=True).json["choices"] == server.chat().json["choices"]


def test_add_special_tokens(server: Running, llm: LLM) -> None:
    for special in (True, False):
        answer = server.complete(
            prompt="The table", add_special_tokens=special, return_token_ids=True
        ).json
        assert answer["choices"][0]["prompt_token_ids"] == llm.encode("The table", special=special)
    assert llm.encode("The table", special=False) != llm.encode("The table")
    assert server.chat(add_special_tokens=False).status == 200
    assert server.chat(add_special_tokens=True).error["code"] == "unsupported_parameter"


def test_a_request_may_step_back() -> None:
    """One text at a time: of those that wait, the one that stepped back comes last, though it was
    there first."""
    with serving(max_batch_size=1) as running:
        order, threads, engine = list[str](), list[threading.Thread](), running.service.llm.engine

        def ask(name: str, **body: Any) -> None:
            assert running.complete(ignore_eos=True, **body).status == 200
            order.append(name)

        first: dict[str, Any] = {"max_tokens": 600}
        for count, (name, body) in enumerate(
            [
                ("first", first),
                ("last", {"priority": 5}),
                ("equal", {"priority": 0}),
                ("equal", {}),
            ],
            1,
        ):
            threads.append(threading.Thread(target=ask, args=(name,), kwargs=body))
            threads[-1].start()
            while len(list(engine.scheduler.sequences())) < count:
                time.sleep(0.001)
        for thread in threads:
            thread.join(60)
    assert order == ["first", "equal", "equal", "last"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"priority": -1}, "priority"),
        ({"priority": 2**31}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"return_token_ids": 1}, "return_token_ids"),
        ({"include_stop_str_in_output": "yes"}, "include_stop_str_in_output"),
        ({"do_sample": 0}, "do_sample"),
    ],
)
def test_what_is_refused(server: Running, body: Any, param: str) -> None:
    for answer in (server.chat(**body), server.complete(**body)):
        assert (answer.status, answer.error["param"]) == (400, param)
