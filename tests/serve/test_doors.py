"""Doors that other servers' clients knock on: vLLM's, SageMaker's, llama.cpp's small ones, and
LMDeploy's for tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantflow import LLM, SamplingParams, __version__
from quantflow.serve.config import ServerConfig
from tests.helpers.serving import DEMO, Running, serving

KEY = "key-of-a-user-0001"
BEARER = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(DEMO, device="cpu", cache_bytes=2**26)


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving(config=ServerConfig(port=0, keys=(KEY,))) as running:
        yield running


@pytest.mark.parametrize("path", ["/ping", "/v1/health"])
def test_health_by_its_other_names(locked: Running, path: str) -> None:
    for method in ("GET", "HEAD"):
        assert locked.send(method, path).status == 200  # without a key
    assert locked.get(path).json == locked.get("/health").json == {"status": "ok"}
    locked.service.draining = True
    try:
        assert (locked.get(path).status, locked.get(path).json) == (503, {"status": "draining"})
    finally:
        locked.service.draining = False


def test_version_and_load(locked: Running) -> None:
    assert locked.get("/version", **BEARER).json == {"version": __version__}
    assert locked.get("/load", **BEARER).json == {"server_load": 0}
    with locked.service.entered(3):
        assert locked.get("/load", **BEARER).json == {"server_load": 3}
    assert locked.get("/version").status == locked.get("/load").status == 401


def test_encode(server: Running, llm: LLM) -> None:
    def encode(**body: Any) -> Any:
        return server.post("/v1/encode", body).json

    texts = ["The table", "", "春天 🦊"]
    one = [llm.encode(text) for text in texts]
    assert encode(input=texts[0]) == {"input_ids": one[0], "length": len(one[0])}
    assert encode(input=texts) == {"input_ids": one, "length": [len(ids) for ids in one]}
    bare = llm.encode("The table", special=False)
    assert encode(input="The table", add_bos=False)["input_ids"] == bare
    dialogue = llm.encode(llm.get_prompt("The table"), special=False)
    assert encode(input="The table", do_preprocess=True, add_bos=None)["input_ids"] == dialogue
    assert encode(input=[]) == {"input_ids": [], "length": []}
    assert encode(input="x", do_preprocess=True, add_bos=False)["error"]["param"] == "add_bos"
    assert server.post("/v1/encode", {"input": [1, 2]}).status == 400


def generate(server: Running, **body: Any) -> Any:
    answer = server.post(
        "/generate", {"prompt": "The table", "max_tokens": 8, "temperature": 0, **body}
    )
    assert answer.status == 200, answer.body
    return answer.json if not body.get("stream") else answer.events


def test_generate_is_what_the_engine_makes_of_the_prompt(server: Running, llm: LLM) -> None:
    ids = llm.encode("The table")
    made = llm.generate([ids], SamplingParams(max_tokens=8, logprobs=2))[0].completions[0]
    for body in ({}, {"prompt": None, "input_ids": ids}):
        found = generate(server, **body)
        assert (found["text"], found["output_ids"]) == (made.text, list(made.token_ids))
        assert (
            found["meta_info"]["prompt_tokens"] == len(ids)
            and found["meta_info"]["completion_tokens"] == 8
        )
        assert (
            found["meta_info"]["finish_reason"] == {"type": "length"}
            and found["meta_info"]["output_token_logprobs"] is None
        )
    scored = generate(server, return_logprob=True, top_logprobs_num=2)["meta_info"]
    assert [token for _, token in scored["output_token_logprobs"]] == list(made.token_ids)
    assert [p for p, _ in scored["output_token_logprobs"]] == [s.logprob for s in made.logprobs]
    assert [[token for _, token in top] for top in scored["output_top_logprobs"]] == [
        [t for t, _ in s.top] for s in made.logprobs
    ]
    assert scored["input_token_logprobs"] is scored["input_top_logprobs"] is None


def test_a_stream_of_generate_adds_up(server: Running) -> None:
    body: Any = {"return_logprob": True, "max_tokens": 20, "stop": " is"}
    whole, events = generate(server, **body), generate(server, **body, stream=True)
    assert "".join(e["text"] for e in events) == whole["text"] and whole["meta_info"][
        "finish_reason"
    ] in ({"type": "stop"}, {"type": "length"})
    assert [t for e in events for t in e["output_ids"]] == whole["output_ids"]
    scored = [p for e in events for p in e["meta_info"]["output_token_logprobs"] or ()]
    assert scored == whole["meta_info"]["output_token_logprobs"]
    assert [e["meta_info"]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 1)
    last = events[-1]["meta_info"]
    assert {**last, "output_token_logprobs": 0} == {
        **whole["meta_info"],
        "output_token_logprobs": 0,
    }


def test_the_token_that_ends_a_text_is_none_of_it(server: Running, llm: LLM) -> None:
    ids = generate(server)["output_ids"]
    at = ids.index(ids[4])
    found = generate(server, stop_token_ids=[ids[4]], return_logprob=True)
    assert found["output_ids"] == ids[:at] and found["meta_info"]["completion_tokens"] == at
    assert len(found["meta_info"]["output_token_logprobs"] or ()) == at and found["meta_info"][
        "finish_reason"
    ] == {"type": "stop"}
    assert (
        "".join(e["text"] for e in generate(server, stop_token_ids=[ids[4]], stream=True))
        == found["text"]
    )


def test_what_ends_a_text_is_a_part_of_it_where_that_is_asked_for(server: Running) -> None:
    whole = generate(server, max_tokens=20)
    stop, token = whole["text"][3:6], whole["output_ids"][4]
    at = whole["output_ids"].index(token) + 1
    for stream in (False, True):
        for given, text, ids in (
            ({"stop": stop}, whole["text"][: whole["text"].index(stop) + 3], None),
            ({"stop_token_ids": [token]}, None, whole["output_ids"][:at]),
        ):
            found = generate(
                server, max_tokens=20, include_stop_str_in_output=True, stream=stream, **given
            )
            events = found if stream else [found]
            assert text is None or "".join(e["text"] for e in events) == text
            assert ids is None or [t for e in events for t in e["output_ids"]] == ids
            assert events[-1]["meta_info"]["finish_reason"] == {"type": "stop"}


def test_the_prompts_own_log_probabilities(server: Running, llm: LLM) -> None:
    ids = llm.encode("The table is here")
    expected = llm.generate([ids], SamplingParams(max_tokens=0, prompt_logprobs=1))[
        0
    ].prompt_logprobs
    for stream in (False, True):
        found = generate(
            server,
            prompt=None,
            input_ids=ids,
            max_tokens=0,
            return_logprob=True,
            top_logprobs_num=1,
            logprob_start_len=1,
            stream=stream,
        )
        found = found[-1] if stream else found
        assert (
            found["text"] == ""
            and found["output_ids"] == []
            and found["meta_info"]["output_token_logprobs"] is None
        )
        assert found["meta_info"]["input_token_logprobs"] == [
            [s.logprob, s.token] for s in expected[2:] if s
        ]
        assert found["meta_info"]["input_top_logprobs"] == [
            [[p, t] for t, p in s.top] for s in expected[2:] if s
        ]
        assert [t for _, t in found["meta_info"]["input_token_logprobs"]] == ids[2:]
        assert all(
            math.isfinite(p) and p <= 0 for p, _ in found["meta_info"]["input_token_logprobs"]
        )


@pytest.mark.parametrize(
    "neutral",
    [
        {"session_id": -1},
        {"session_id": 12},
        {"image_data": None, "media_io_kwargs": None, "mm_processor_kwargs": None},
        {"spaces_between_special_tokens": True},
        {"include_stop_str_in_output": False},
        {"return_routed_experts": False},
        {"repetition_ngram_size": 0, "repetition_ngram_threshold": 0},
        {"logprob_start_len": -1, "return_logprob": None},
        {
            "top_k": None,
            "top_p": None,
            "min_p": None,
            "repetition_penalty": None,
            "ignore_eos": None,
            "skip_special_tokens": None,
        },
        {"stop": [], "stop_token_ids": [], "top_logprobs_num": 0, "stream": None},
    ],
)
def test_what_lmdeploys_clients_send_and_changes_nothing(server: Running, neutral: Any) -> None:
    assert generate(server, **neutral) == generate(server)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input_ids": [3]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None, "input_ids": []}, "input_ids"),
        ({"prompt": None, "input_ids": [10**6]}, "input_ids"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"top_logprobs_num": 2}, "top_logprobs_num"),
        ({"logprob_start_len": 0, "return_logprob": True}, "logprob_start_len"),
        ({"logprob_start_len": 9**9, "return_logprob": True, "max_tokens": 0}, "logprob_start_len"),
        ({"image_data": "x"}, "image_data"),
        ({"return_routed_experts": True}, "return_routed_experts"),
        ({"repetition_ngram_size": 3}, "repetition_ngram_size"),
        ({"text": "x", "sampling_params": {}}, "text"),  # SGLang's shape
    ],
)
def test_what_generate_refuses_by_name(server: Running, body: Any, param: str) -> None:
    answer = server.post("/generate", {"prompt": "The table", "max_tokens": 8, **body})
    assert (answer.status, answer.error["param"]) == (400, param), answer.body


def test_the_handbook_names_every_door(server: Running) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    assert [
        path for path in server.get("/openapi.json").json["paths"] if f"`{path}`" not in text
    ] == []
