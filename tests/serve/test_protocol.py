"""What clients may say, and what they are told: OpenAI's parameters and LMDeploy's, honoured or
refused by name."""

from __future__ import annotations

import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from quantflow import LLM, SamplingParams
from quantflow.engine import grammar
from tests.helpers.serving import DEMO, LMDEPLOY_BODY, Running

# some libraries raise the recursion limit, but not so far
DEEP = {"name": "f", "arguments": "[" * 20_000 + "]" * 20_000}
CALLED = {"role": "assistant", "tool_calls": [{"id": "1", "function": DEEP}]}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(DEMO, device="cpu", cache_bytes=2**26)


def test_lmdeploys_request_works_as_it_stands(server: Running) -> None:
    answer = server.post("/v1/chat/completions", LMDEPLOY_BODY)
    assert answer.status == 200
    assert (
        answer.json["object"] == "chat.completion"
        and answer.json["choices"][0]["message"]["role"] == "assistant"
    )


def test_chat_is_what_the_engine_makes_of_the_dialogue(server: Running, llm: LLM) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is an index?"},
    ]
    expected = llm.chat(messages, SamplingParams(max_tokens=20))
    parts = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "What is an index?"}]},
    ]
    for given in (messages, parts):
        found = server.chat(messages=given, max_tokens=20).json
        assert found["choices"][0]["message"]["content"] == expected.text
        assert found["usage"]["prompt_tokens"] == len(expected.prompt)
        assert found["usage"]["completion_tokens"] == len(expected.completions[0].token_ids)


@pytest.mark.parametrize(
    ("body", "params"),
    [
        ({"max_tokens": 12}, {}),
        ({"max_completion_tokens": 12, "max_tokens": None}, {}),
        (
            {"temperature": 0.9, "seed": 5, "top_p": 0.8},
            {"temperature": 0.9, "seed": 5, "top_p": 0.8},
        ),
        (
            {"temperature": 1, "seed": 5, "top_k": 3, "min_p": 0.1},
            {"temperature": 1.0, "seed": 5, "top_k": 3, "min_p": 0.1},
        ),
        ({"temperature": None, "seed": 3}, {"temperature": 1.0, "seed": 3}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        (
            {"presence_penalty": 1.5, "frequency_penalty": 0.5},
            {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        ),
        ({"logit_bias": {"300": 100}}, {"logit_bias": {300: 100.0}}),
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"stop": ["zzz", "e"]}, {"stop": ("zzz", "e")}),
        ({"ignore_eos": True, "min_tokens": 12}, {"ignore_eos": True, "min_tokens": 12}),
        ({"stop_token_ids": [300]}, {"stop_token_ids": (300,)}),
        ({"stop": "e", "include_stop_str_in_output": True}, {"stop": ("e",), "include_stop": True}),
        ({"top_k": -1}, {}),
        ({"temperature": 1e-9}, {}),
        ({"temperature": 1, "top_p": 0, "seed": 1}, {"temperature": 1.0, "top_p": 1e-9, "seed": 1}),
    ],
)
def test_a_parameter_does_what_it_does_in_the_engine(
    server: Running, llm: LLM, body: Any, params: Any
) -> None:
    prompt = llm.get_prompt("What is a table?")
    expected = llm.generate(
        llm.encode(prompt, special=False), SamplingParams(**{"max_tokens": 12, **params})
    )[0].completions[0]
    found = server.chat(**{"max_tokens": 12, **body}).json["choices"][0]
    assert (found["message"]["content"], found["finish_reason"]) == (
        expected.text,
        str(expected.finish),
    )


def test_what_ended_a_text_is_named(server: Running) -> None:
    body: Any = {"max_tokens": 20, "ignore_eos": True}
    made = server.post("/generate", {"prompt": "The table", "temperature": 0, **body}).json
    stop, token = made["text"][3:6], made["output_ids"][4]
    for given, reason in (
        ({}, None),
        ({"stop": ["never there", stop]}, stop),
        ({"stop_token_ids": [token]}, token),
    ):
        assert server.complete(**body, **given).json["choices"][0]["stop_reason"] == reason
        assert (
            server.complete(**body, **given, stream=True).events[-1]["choices"][0]["stop_reason"]
            == reason
        )
    stop = server.chat(**body).json["choices"][0]["message"]["content"][3:6]
    assert server.chat(**body, stop=[stop]).json["choices"][0]["stop_reason"] == stop
    ends = [
        e["choices"][0].get("stop_reason")
        for e in server.chat(**body, stop=[stop], stream=True).events
    ]
    assert ends[-1] == stop and not any(ends[:-1])


def test_a_stream_says_what_one_answer_says(server: Running) -> None:
    body: Any = {
        "max_tokens": 30,
        "n": 3,
        "temperature": 1,
        "seed": 11,
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["the", "is a"],
    }
    whole = server.chat(**body).json
    answer = server.chat(**body, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body.endswith(b"data: [DONE]\n\n")
    events = answer.events
    assert events[-1]["choices"] == [] and events[-1]["usage"] == {
        **whole["usage"],
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert all(e["usage"] is None and len(e["choices"]) == 1 for e in events[:-1])
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert [p for c in mine if c["logprobs"] for p in c["logprobs"]["content"]] == choice[
            "logprobs"
        ]["content"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]


def test_logprobs_are_the_engines(server: Running, llm: LLM) -> None:
    prompt = llm.encode(llm.get_prompt("What is a table?"), special=False)
    expected = llm.generate(prompt, SamplingParams(max_tokens=4, logprobs=3))[0].completions[0]
    found = server.chat(max_tokens=4, logprobs=True, top_logprobs=3).json["choices"][0]["logprobs"][
        "content"
    ]
    for token, score in zip(found, expected.logprobs, strict=True):
        assert token["logprob"] == pytest.approx(score.logprob)
        assert bytes(token["bytes"]).decode() == token["token"] == llm.decode([score.token])
        assert [t["logprob"] for t in token["top_logprobs"]] == pytest.approx(
            [p for _, p in score.top]
        )


def test_letters_of_several_tokens_are_told_as_bytes(server: Running) -> None:
    """The demo model's vocabulary has no token for 诗: its three bytes come in parts."""
    tokens = server.post("/tokenize", {"prompt": "诗", "add_special_tokens": False}).json["tokens"]
    assert len(tokens) > 1
    answer = server.complete(prompt="诗", echo=True, max_tokens=0, logprobs=0).json["choices"][0]
    names = answer["logprobs"]["tokens"][-len(tokens) :]
    told = "".join(name.removeprefix("bytes:") for name in names)
    assert bytes.fromhex(told.replace("\\x", "")).decode() == "诗"


def test_offsets_are_those_of_the_text(server: Running) -> None:
    """Where letters take several tokens, the text has fewer letters than the tokens' names."""
    answer = server.complete(prompt="诗 table 🙂 x", echo=True, max_tokens=3, logprobs=0).json[
        "choices"
    ][0]
    scores = answer["logprobs"]
    assert scores["text_offset"] == sorted(scores["text_offset"]) and scores["text_offset"][
        -1
    ] <= len(answer["text"])
    whole = [
        (t, o)
        for t, o in zip(scores["tokens"], scores["text_offset"], strict=True)
        if not t.startswith(("bytes:", "<"))
    ]
    assert len(whole) >= 3
    for token, offset in whole:
        assert answer["text"][offset : offset + len(token)] == token


def test_completions_echo_score_and_number_their_texts(server: Running, llm: LLM) -> None:
    prompts = ["The table", "An index is"]
    answer = server.complete(
        prompt=prompts, n=2, max_tokens=5, echo=True, logprobs=1, temperature=1, seed=4
    ).json
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    for choice in answer["choices"]:
        prompt = prompts[choice["index"] // 2]
        tokens = llm.encode(prompt)
        output = llm.generate(
            tokens,
            SamplingParams(max_tokens=5, n=2, temperature=1, seed=4, prompt_logprobs=1, logprobs=1),
        )[0]
        completion = output.completions[choice["index"] % 2]
        assert choice["text"] == prompt + completion.text
        scores = choice["logprobs"]
        expected = [
            0.0,
            *(p.logprob for p in output.prompt_logprobs[1:] if p),
            *(p.logprob for p in completion.logprobs),
        ]
        assert scores["token_logprobs"] == pytest.approx(expected)
        assert {len(scores[key]) for key in scores} == {len(expected)}
        for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
            assert token in ("<s>", "</s>") or choice["text"][offset : offset + len(token)] == token


def test_a_stream_of_several_prompts(server: Running) -> None:
    body: Any = {
        "prompt": ["The table", "An index is"],
        "n": 2,
        "max_tokens": 6,
        "temperature": 1,
        "seed": 4,
        "echo": True,
    }
    whole = server.complete(**body).json
    events = server.complete(**body, stream=True).events
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_best_of_shows_the_likeliest(server: Running) -> None:
    many = server.complete(
        n=6, best_of=6, temperature=1.5, seed=2, logprobs=0, max_tokens=20, stop=["x"]
    ).json["choices"]
    lengths = {len(c["logprobs"]["token_logprobs"]) for c in many}
    assert len(lengths) > 1  # the mean and the sum differ
    means = {c["text"]: statistics.mean(c["logprobs"]["token_logprobs"]) for c in many}
    best = server.complete(n=2, best_of=6, temperature=1.5, seed=2, max_tokens=20, stop=["x"]).json[
        "choices"
    ]
    assert [c["text"] for c in best] == sorted(means, key=lambda text: -means[text])[:2]
    assert [c["index"] for c in best] == [0, 1] and best[0]["logprobs"] is None


def test_scoring_alone_generates_nothing(server: Running) -> None:
    answer = server.complete(prompt="The table is", echo=True, max_tokens=0, logprobs=0).json
    assert (
        answer["choices"][0]["text"] == "The table is" and answer["usage"]["completion_tokens"] == 0
    )
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    plain = server.complete(prompt="The table is", echo=True, max_tokens=1, logprobs=0).json[
        "choices"
    ][0]["logprobs"]
    count = answer["usage"]["prompt_tokens"]
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == plain["token_logprobs"][:count]
    assert answer["choices"][0]["finish_reason"] == "length"
    streamed = server.complete(
        prompt="The table is", echo=True, max_tokens=0, logprobs=0, stream=True
    ).events
    scored, ended = [event["choices"][0] for event in streamed]
    assert scored["logprobs"]["token_logprobs"] == plain["token_logprobs"][:count]
    assert ended == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    for body in (
        {"prompt": [5]},
        {"prompt": "The table is", "n": 2},
        {"prompt": "The table is", "logprobs": None},
    ):
        answer = server.complete(**{"echo": True, "max_tokens": 0, "logprobs": 0, **body}).json
        assert answer["usage"]["completion_tokens"] == 0 and len(answer["choices"]) == body.get(
            "n", 1
        )


def test_token_ids_are_prompts_too(server: Running) -> None:
    tokens = server.post("/tokenize", {"prompt": "The table"}).json["tokens"]
    assert server.complete(prompt=tokens).json["choices"] == server.complete().json["choices"]
    assert len(server.complete(prompt=[tokens, tokens]).json["choices"]) == 2


def test_tokenize_and_back(server: Running, llm: LLM) -> None:
    text = "Ein schöner Tisch 诗 🙂"
    found = server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json
    assert found["tokens"] == llm.encode(text, special=False) and found["count"] == len(
        found["tokens"]
    )
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json == {"prompt": text}
    messages = [{"role": "user", "content": "Hi"}]
    assert server.post("/tokenize", {"messages": messages}).json["tokens"] == llm.encode(
        llm.get_prompt("Hi"), special=False
    )
    assert (
        server.post("/tokenize", {"messages": messages, "prompt": "x"}).error["param"] == "prompt"
    )
    assert server.post("/detokenize", {"tokens": [10**6]}).error["param"] == "tokens"


def test_answers_follow_a_schema(server: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"enum": [1, 2, 3]}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }
    form = {
        "type": "json_schema",
        "json_schema": {"name": "thing", "schema": schema, "strict": True},
    }
    answer = server.chat(response_format=form, max_tokens=100, temperature=1, n=4, seed=3).json
    for choice in answer["choices"]:
        found = json.loads(choice["message"]["content"])
        assert (
            set(found) == {"name", "size"}
            and len(found["name"]) <= 12
            and found["size"] in (1, 2, 3)
        )
        assert choice["finish_reason"] == "stop"
    anything = server.chat(
        response_format={"type": "json_object"}, max_tokens=10, logit_bias={}
    ).json["choices"][0]["message"]["content"]
    assert anything.startswith("{")


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"frobnicate": 1}, "frobnicate", "unknown_parameter"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio", "unsupported_parameter"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "invalid_value"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}],
                    }
                ]
            },
            "messages",
            "invalid_value",
        ),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**30}, "max_tokens", "context_length_exceeded"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({"messages": "word " * 3000}, "messages", "context_length_exceeded"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 9}, "n", "invalid_value"),
        ({"n": 10**9}, "n", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "x"}}},
            "response_format",
            "invalid_value",
        ),
        ({"messages": [CALLED]}, "messages", "json_too_deep"),
        ({"top_p": 1.1}, "top_p", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"stop": ["x" * 513]}, "stop[0]", "invalid_value"),
        ({"stop": ""}, "stop[0]", "invalid_value"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"4096": 1}}, "logit_bias", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 1}, "top_logprobs", "invalid_value"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "tools",
            "unsupported_value",
        ),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "wizard"}},
                }
            },
            "response_format",
            "invalid_value",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"$ref": "http://example.com/s"}},
                }
            },
            "response_format",
            "invalid_value",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"description": "y" * 70000}},
                }
            },
            "response_format",
            "invalid_value",
        ),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "unsupported_parameter"),
    ],
)
def test_what_is_refused_is_named(server: Running, body: Any, param: str, code: str) -> None:
    answer = server.chat(**body)
    assert answer.status == 400
    assert (
        set(answer.error) == {"message", "type", "param", "code"}
        and answer.error["type"] == "invalid_request_error"
    )
    assert (answer.error["param"], answer.error["code"]) == (param, code)
    assert answer.error["message"].startswith(param.split("[")[0])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "n": 1, "stream": True}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"logprobs": 6}, "logprobs"),
    ],
)
def test_what_completions_refuse(server: Running, body: Any, param: str) -> None:
    answer = server.complete(**body)
    assert answer.status == 400 and answer.error["param"] == param, answer.error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"prompt": "\\ud800"}',
    ],
)
def test_bodies_that_are_none(server: Running, body: bytes) -> None:
    for path in (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/interactive",
        "/tokenize",
        "/detokenize",
    ):
        answer = server.post(path, body)
        assert answer.status == 400 and answer.error["type"] == "invalid_request_error", (
            path,
            answer,
        )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/detokenize", {"tokens": [-1] * 1_000_000}),
        ("/v1/completions", {"prompt": [-1] * 1_000_000}),
        ("/v1/completions", {"prompt": [{}] * 900_000}),
        ("/v1/completions", {"prompt": ["x"] * 800_000}),
        ("/v1/chat/completions", {"messages": [{}] * 900_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 900_000}]}),
    ],
)
def test_a_million_mistakes_are_one(server: Running, path: str, body: Any) -> None:
    began = time.process_time()
    answer = server.post(path, body)
    assert answer.status == 400 and len(answer.body) < 2000
    assert time.process_time() - began < 15


def test_a_prompt_that_is_far_too_long_is_not_even_tokenised(server: Running) -> None:
    for answer in (server.complete(prompt="x" * 4_000_000), server.chat(messages="x" * 4_000_000)):
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        assert "characters" in answer.error["message"]


def test_a_prompt_that_is_too_long_is_known_by_its_words(server: Running) -> None:
    """LiteLLM and LangChain look for these in the message, and tell their callers to shorten the
    dialogue."""
    for answer in (
        server.chat(messages="word " * 1020),
        server.chat(messages="word " * 3000),
        server.chat(messages="x" * 4_000_000),
    ):
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        assert "prompt is too long" in answer.error["message"]
    assert "prompt is too long" not in server.chat(max_tokens=10**6).error["message"]


PATTERNS = [f"(a|b)*a(a|b){{{i}}}" for i in range(5, 35)]


@pytest.mark.parametrize(
    "schema",
    [
        # its automaton has 2^34 states
        {"type": "string", "allOf": [{"pattern": pattern} for pattern in PATTERNS]},
        {"type": "integer", "multipleOf": 9999991},
    ],
)
def test_schemas_that_would_take_the_machine_are_refused(
    server: Running, schema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "MOST_SECONDS", 2.0)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert server.chat().status == 200  # what renders templates has been started
    before, began = server.metric("process_resident_memory_bytes"), time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(server.chat, response_format=form) for _ in range(3)]
        # others do not wait for them
        assert server.chat().status == server.post("/tokenize", {"prompt": "x"}).status == 200
        assert not all(w.done() for w in waiting)
        for answer in (w.result() for w in waiting):
            assert (answer.status, answer.error["param"]) == (400, "response_format")
            assert "to compile" in answer.error["message"]
    # two seconds each, beside whatever else runs; for ever without a limit
    assert time.monotonic() - began < 60
    assert server.metric("process_resident_memory_bytes") - before < 2**29


def test_half_a_surrogate_pair_is_refused(server: Running) -> None:
    for body in (
        {"messages": "\ud800"},
        {"messages": "x", "stop": "\ud800"},
        {"messages": "x", "user": "\ud800"},
        {"messages": "x", "\ud800": 1},
    ):
        answer = server.chat(**body)
        assert (answer.status, answer.error["code"]) == (400, "invalid_utf8"), answer


def test_models(server: Running) -> None:
    card = server.get("/v1/models").json["data"][0]
    assert card["id"] == "demo_model" and card["max_model_len"] == 1024
    assert server.get("/v1/models/demo_model").json == card
    assert server.get("/v1/models/gpt-5").status == 404


def test_unknown_paths_and_methods(server: Running) -> None:
    missing, wrong = server.get("/v1/engines"), server.get("/v1/completions")
    assert (missing.status, missing.error["type"]) == (404, "not_found_error")
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    "name",
    ["maxTokens", "MAX", "top-p", "x2", "a b", "类", "text", "allowed", "$schema", "[key]", "0"],
)
def test_an_unknown_parameter_is_named_whatever_it_is_called(server: Running, name: str) -> None:
    message = {"role": "user", "content": "Hi"}
    for answer, where in (
        (server.chat(**{name: 1}), name),
        (server.chat(messages=[{**message, name: 1}]), f"messages[0].{name}"),
        (
            server.chat(
                messages=[{**message, "content": [{"type": "text", "text": "Hi", name: 1}]}]
            ),
            f"messages[0].content[0].{name}",
        ),
        (
            server.chat(tool_choice={"type": "function", "function": {"name": "f", name: 1}}),
            f"tool_choice.function.{name}",
        ),
    ):
        found = (answer.status, answer.error["param"], answer.error["code"])
        if name == "text" and where == f"messages[0].content[0].{name}":
            continue  # which is none of the unknown
        assert found == (400, where, "unknown_parameter")
        assert answer.error["message"] == f"{where}: unknown parameter; expected one of the API's"


def test_a_name_of_a_million_letters_is_shortened(server: Running) -> None:
    answer = server.chat(**{"x" * 1_000_000: 1})
    assert answer.status == 400 and len(answer.body) < 1000


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/chat/interactive",
        "/generate",
        "/tokenize",
        "/v1/encode",
    ],
)
def test_null_is_as_if_it_were_not_there(server: Running, path: str) -> None:
    """By every name that a request may have, and as the document says."""
    document = server.get("/openapi.json").json
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    given: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": "Hi", "max_tokens": 1},
        "/generate": {"prompt": "x", "max_tokens": 1},
        "/v1/chat/interactive": {"prompt": "Hi", "request_output_len": 1},
        "/v1/encode": {"input": "x"},
    }
    body = given.get(
        path, {"prompt": "x", "max_tokens": 1} if path == "/v1/completions" else {"prompt": "x"}
    )
    optional = [
        name
        for name in schema["properties"]
        if name not in schema.get("required", ()) and name not in body
    ]
    answer = server.post(path, {**body, **dict.fromkeys(optional), "no such thing": None})
    assert answer.status == 200, answer.body
    for name in optional:
        kinds = schema["properties"][name].get("anyOf", [schema["properties"][name]])
        assert any(
            kind.get("type") == "null" or not {"type", "$ref", "enum", "const"} & kind.keys()
            for kind in kinds
        ), name


def test_a_default_holds_where_a_limit_is_null(server: Running) -> None:
    body = {"prompt": "x", "temperature": 0, "ignore_eos": True}
    assert (
        server.post("/generate", {**body, "max_tokens": None}).json["meta_info"][
            "completion_tokens"
        ]
        == 128
    )


def test_which_of_several_prompts_is_too_long(server: Running) -> None:
    for long in ("word " * 3000, "x" * 4_000_000):
        answer = server.complete(prompt=["a", "b", "c", long])
        assert (answer.status, answer.error["param"], answer.error["code"]) == (
            400,
            "prompt[3]",
            "context_length_exceeded",
        )
        assert (
            server.complete(prompt=[long]).error["param"]
            == server.complete(prompt=long).error["param"]
            == "prompt"
        )


def test_what_a_prompt_is_too_long_for(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the engine says it: the model's context, or a smaller cache."""
    assert "the model's context" in server.chat(messages="word " * 3000).error["message"]
    monkeypatch.setattr(type(server.service.llm.engine), "room_is", "what the KV cache holds")
    for answer in (server.chat(messages="word " * 3000), server.complete(prompt="x" * 4_000_000)):
        assert "tokens, what the KV cache holds" in answer.error["message"]
