"""The Responses API: by the openai client, strict, by OpenAI's specification, and by what its
events have to say of each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel

from quantflow.engine.request import Completion, Finish, Output, Token
from quantflow.serve.answer import Usage
from quantflow.serve.config import ServerConfig
from quantflow.serve.responses.dialogue import as_chat
from quantflow.serve.responses.protocol import Response, ResponsesRequest
from quantflow.serve.responses.shape import ResponsesShape
from quantflow.serve.tools import FORMATS, Reading
from tests.helpers.openapi import check, properties, shared
from tests.helpers.serving import NEUTRAL_IN_CHAT, Running, serving, with_tools

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "The weather",
    "parameters": PARAMETERS,
    "strict": False,
}
QUESTION = "What is a table?"
THING = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["table", "index"]},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
AS_THING = {"format": {"type": "json_schema", "name": "thing", "schema": THING, "strict": True}}


class Thing(BaseModel):
    kind: Literal["table", "index"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With a template that knows tools."""
    folder = with_tools(tmp_path_factory.mktemp("responses") / "model")
    with serving(folder, ServerConfig(port=0, names=("demo",)), check=True) as found:
        yield found


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{running.address}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    ) as found:
        yield found


def ask(running: Running, **body: Any) -> Any:
    return running.post(
        "/v1/responses", {"input": QUESTION, "temperature": 0, "max_output_tokens": 8, **body}
    )


def well_told(events: list[Any]) -> Any:
    """Checks that a stream's events tell one story, and gives the response at its end."""
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1]["response"]
    for event in events[:2]:
        begun = {
            "status": "in_progress",
            "output": [],
            "completed_at": None,
            "incomplete_details": None,
            "usage": None,
        }
        assert event["response"] == {**final, **begun}
    items: list[Any] = []
    grows: Any = None  # the item between its first and its last event
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert grows is None and event["output_index"] == len(items)
            grows = event["item"]
            assert (
                grows["status"] == "in_progress"
                and not grows.get("content")
                and not grows.get("arguments")
            )
            continue
        assert grows is not None and event["output_index"] == len(items)
        if kind == "output_item.done":
            assert event["item"] == {**grows, "status": event["item"]["status"]} and event["item"][
                "status"
            ] in ("completed", "incomplete")
            items.append(event["item"])
            grows = None
            continue
        assert event["item_id"] == grows["id"] and event.get("content_index", 0) == 0
        if kind == "content_part.added":
            assert grows["type"] == "message" and not grows["content"]
            grows["content"].append(event["part"])
        elif kind == "output_text.delta":
            grows["content"][0]["text"] += event["delta"]
            grows["content"][0]["logprobs"] += event["logprobs"]
        elif kind == "output_text.done":
            assert {name: event[name] for name in ("text", "logprobs")} == {
                n: grows["content"][0][n] for n in ("text", "logprobs")
            }
        elif kind == "content_part.done":
            assert event["part"] == grows["content"][0]
        elif kind == "function_call_arguments.delta":
            grows["arguments"] += event["delta"]
        else:
            assert kind == "function_call_arguments.done"
            assert (event["arguments"], event["name"]) == (grows["arguments"], grows["name"])
    assert grows is None and items == final["output"] and items
    assert events[-1]["type"] == f"response.{final['status']}"
    return final


def without_ids(response: Any) -> Any:
    """What is another each time left out."""
    output = [
        {k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]
    ]
    return {
        k: v for k, v in response.items() if k not in ("id", "created_at", "completed_at", "usage")
    } | {"output": output}


# --- what is answered


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ({"input": QUESTION}, [("user", QUESTION)]),
        ({"instructions": "Be short."}, [("system", "Be short."), ("user", QUESTION)]),
        (
            {
                "input": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_text", "text": "What is "},
                            {"type": "input_text", "text": "it?"},
                        ],
                    }
                ]
            },
            [("user", "What is it?")],
        ),
        (
            {
                "instructions": "Be short.",
                "input": [
                    {"type": "message", "role": "developer", "content": "Be kind."},
                    {"role": "user", "content": "Hi", "status": "completed"},
                    {
                        "id": "msg_1",
                        "type": "message",
                        "role": "assistant",
                        "status": "completed",
                        "content": [
                            {
                                "type": "output_text",
                                "text": "Hello",
                                "annotations": [],
                                "logprobs": [],
                            }
                        ],
                    },
                    {
                        "type": "message",
                        "role": "user",
                        "content": [{"type": "input_text", "text": QUESTION}],
                    },
                ],
            },
            [
                ("system", "Be short.\n\nBe kind."),
                ("user", "Hi"),
                ("assistant", "Hello"),
                ("user", QUESTION),
            ],
        ),
    ],
)
def test_an_answer_is_that_of_chat_completions(running: Running, body: Any, messages: Any) -> None:
    chat = running.chat(
        messages=[{"role": role, "content": text} for role, text in messages], max_tokens=8
    ).json
    found = ask(running, **body).json
    (item,) = found["output"]
    assert item["content"] == [
        {
            "type": "output_text",
            "text": chat["choices"][0]["message"]["content"],
            "annotations": [],
            "logprobs": [],
        }
    ]
    assert (found["status"], found["incomplete_details"], item["status"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
        "incomplete",
    )
    assert found["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert (
        found["usage"]["output_tokens"] == 8
        and found["usage"]["total_tokens"] == chat["usage"]["total_tokens"]
    )
    counted = running.post("/v1/responses/input_tokens", {"input": QUESTION, **body}).json
    assert counted == {
        "object": "response.input_tokens",
        "input_tokens": chat["usage"]["prompt_tokens"],
    }


def test_a_dialogue_of_any_length_is_counted(running: Running) -> None:
    """So that a client learns by how much it is too long."""
    short, long = (
        running.post("/v1/responses/input_tokens", {"input": "word " * n, "tools": [WEATHER]}).json
        for n in (100, 3000)
    )
    assert long["input_tokens"] == short["input_tokens"] + 2900 > running.service.context
    asked = {"messages": [{"role": "user", "content": "word " * 3000}]}
    assert running.post("/v1/messages/count_tokens", asked).json["input_tokens"] > 3000


def test_the_response_tells_the_values_that_held(running: Running) -> None:
    asked = {
        "model": "demo", "instructions": "Be short.", "temperature": 0.5, "top_p": 0.9,
        "max_output_tokens": 9, "metadata": {"a": "b"}, "parallel_tool_calls": False,
        "tools": [WEATHER], "tool_choice": "none",
        "text": {"format": {"type": "text"}, "verbosity": "low"}, "reasoning": {"effort": "low"},
    }  # fmt: skip
    told = ask(running, **asked).json
    assert {name: told[name] for name in asked} == {
        **asked,
        "reasoning": {"effort": "low", "summary": None},
    }
    told = running.post(
        "/v1/responses", {"input": QUESTION, "store": True, "max_output_tokens": 1}
    ).json
    expected = {
        "temperature": 1.0,
        "top_p": 1.0,
        "store": False,
        "truncation": "disabled",
        "tool_choice": "auto",
        "tools": [],
        "metadata": {},
    }
    assert {name: told[name] for name in expected} == expected


def test_the_client_and_its_stream(client: OpenAI) -> None:
    asked: Any = {"model": "demo", "input": QUESTION, "temperature": 0, "text": AS_THING}
    whole = client.responses.create(**asked)
    assert whole.status == "completed" and whole.completed_at and whole._request_id
    assert set(json.loads(whole.output_text)) == {"name", "kind"}
    kinds = [event.type for event in client.responses.create(**asked, stream=True)]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    with client.responses.stream(**asked) as stream:
        said = "".join(
            event.delta for event in stream if event.type == "response.output_text.delta"
        )
        final = stream.get_final_response()
    assert said == final.output_text == whole.output_text
    assert final.usage and whole.usage and final.usage.output_tokens == whole.usage.output_tokens
    assert (
        client.responses.input_tokens.count(
            model="demo", input=QUESTION, text=asked["text"]
        ).input_tokens
        == whole.usage.input_tokens
    )


def test_answers_become_objects(client: OpenAI) -> None:
    parsed = client.responses.parse(
        model="demo", input=QUESTION, text_format=Thing, max_output_tokens=300, temperature=0.5
    )
    assert isinstance(parsed.output_parsed, Thing)
    with client.responses.stream(
        model="demo", input=QUESTION, text_format=Thing, max_output_tokens=300
    ) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Thing)


def test_tools_there_and_back(client: OpenAI, running: Running) -> None:
    """Items of the answer, as the client has them, go into the next request."""
    asked: Any = {
        "model": "demo",
        "tools": [WEATHER],
        "parallel_tool_calls": False,
        "temperature": 0,
    }
    items: list[Any] = [{"role": "user", "content": "What is the weather?"}]
    first = client.responses.create(
        **asked, input=items, tool_choice={"type": "function", "name": "weather"}
    )
    (call,) = first.output
    assert call.type == "function_call" and call.name == "weather" and first.status == "completed"
    assert set(json.loads(call.arguments)) == {"city", "unit"}
    for said in (call, call.model_dump(), call.to_dict()):
        output = {
            "type": "function_call_output",
            "call_id": call.call_id,
            "output": [{"type": "input_text", "text": "Sunny."}],
        }
        again = client.responses.create(
            **asked, input=[*items, said, output], max_output_tokens=5, tool_choice="none"
        )
        assert again.output_text
    function = {"name": "weather", "arguments": call.arguments}
    dialogue = [
        *items,
        {
            "role": "assistant",
            "tool_calls": [{"id": call.call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call.call_id, "content": "Sunny."},
    ]
    assert (
        again.usage
        and again.usage.input_tokens
        == running.chat(messages=dialogue).json["usage"]["prompt_tokens"]
    )


def test_a_stream_of_a_call(client: OpenAI, running: Running) -> None:
    asked: Any = {
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_output_tokens": 200,
    }
    final = well_told(ask(running, **asked, stream=True).events)
    assert without_ids(final) == without_ids(ask(running, **asked).json)
    (call,) = final["output"]
    assert call["type"] == "function_call" and json.loads(call["arguments"])["unit"] in ("C", "F")

    class weather(BaseModel):
        unit: Literal["C", "F"]

    tool: Any = pydantic_function_tool(weather)["function"]
    tool = {"type": "function", "name": "weather", "parameters": tool["parameters"], "strict": True}
    with client.responses.stream(
        model="demo", input="x", tools=[tool], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        done = [event for event in stream if event.type == "response.function_call_arguments.done"]
        assert len(done) == 1 and json.loads(done[0].arguments)["unit"] in ("C", "F")


@pytest.mark.parametrize(
    "body",
    [
        {"max_output_tokens": 30},
        {"max_output_tokens": 30, "top_logprobs": 2},
        {"text": AS_THING, "max_output_tokens": 100, "include": ["message.output_text.logprobs"]},
        {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 5},
        {"tools": [WEATHER], "max_output_tokens": 20},
        {"temperature": 1, "seed": 3, "top_k": 5, "max_output_tokens": 20},
    ],
)
def test_a_stream_says_what_one_answer_says(running: Running, body: Any) -> None:
    answer = ask(running, **body, stream=True)
    assert (
        answer.headers["content-type"].startswith("text/event-stream")
        and b"[DONE]" not in answer.body
    )
    final, whole = well_told(answer.events), ask(running, **body).json
    assert without_ids(final) == without_ids(whole)
    assert final["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_logprobs_are_those_of_chat_completions(running: Running) -> None:
    expected = running.chat(logprobs=True, top_logprobs=3).json["choices"][0]["logprobs"]["content"]
    for body in (
        {"top_logprobs": 3},
        {"top_logprobs": 3, "include": ["message.output_text.logprobs"]},
    ):
        assert ask(running, **body).json["output"][0]["content"][0]["logprobs"] == expected
    alone = ask(running, include=["message.output_text.logprobs"]).json["output"][0]["content"][0][
        "logprobs"
    ]
    assert alone == [{**token, "top_logprobs": []} for token in expected]


# --- from items to a dialogue

CALL = {
    "type": "function_call",
    "call_id": "c1",
    "name": "f",
    "arguments": "{}",
    "id": "fc_1",
    "status": "completed",
}
CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def said(text: str) -> dict[str, Any]:
    return {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": text}],
    }


def thought(text: str) -> dict[str, Any]:
    return {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
    }


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([CALL], [{"role": "assistant", "tool_calls": [CALLED]}]),
        (
            [said("Let me see."), CALL, CALL],
            [{"role": "assistant", "content": "Let me see.", "tool_calls": [CALLED, CALLED]}],
        ),
        (
            [said("a"), said("b")],
            [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
        ),
        (
            [
                said("a"),
                CALL,
                {"type": "function_call_output", "call_id": "c1", "output": "1"},
                said("b"),
            ],
            [
                {"role": "assistant", "content": "a", "tool_calls": [CALLED]},
                {"role": "tool", "tool_call_id": "c1", "content": "1"},
                {"role": "assistant", "content": "b"},
            ],
        ),
        (
            [CALL, said("b")],
            [{"role": "assistant", "tool_calls": [CALLED]}, {"role": "assistant", "content": "b"}],
        ),
        (
            [said("a"), {"role": "user", "content": "x"}, CALL],
            [
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [CALLED]},
            ],
        ),
        (
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
            [{"role": "assistant", "content": "No."}],
        ),
        (
            [
                {"role": "system", "content": "s"},
                {"role": "developer", "content": "d"},
                {"role": "user", "content": "u"},
            ],
            [{"role": "system", "content": "s\n\nd"}, {"role": "user", "content": "u"}],
        ),
        (
            [{"role": "user", "content": "u"}, {"role": "developer", "content": "d"}],
            [{"role": "user", "content": "u"}, {"role": "developer", "content": "d"}],
        ),
        ([{"role": "user", "content": []}], [{"role": "user", "content": ""}]),
        (
            [thought("Hm."), said("a"), CALL],
            [
                {
                    "role": "assistant",
                    "reasoning_content": "Hm.",
                    "content": "a",
                    "tool_calls": [CALLED],
                }
            ],
        ),
        (
            [said("a"), thought("Hm."), said("b")],
            [
                {"role": "assistant", "content": "a"},
                {"role": "assistant", "reasoning_content": "Hm.", "content": "b"},
            ],
        ),
    ],
)
def test_items_become_messages(items: Any, messages: Any) -> None:
    body = ResponsesRequest.model_validate({"input": items})
    found = [message.model_dump(exclude_unset=True) for message in as_chat(body).messages]
    assert found == messages


# --- events, whatever the text and however it comes

PIECES = [
    "The table", " ", "\n", "<tool_call>", "</tool_call>", "<tool",
    '{"name": "f", "arguments": {"x": 1}}', '{"name": "g"}', "é🙂",
]  # fmt: skip
HEAD = {"model": "m"}


@settings(deadline=None, max_examples=200)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=8),
    cuts=st.lists(st.integers(1, 7), max_size=30),
    finish=st.sampled_from([Finish.stop, Finish.length]),
    most=st.sampled_from([None, 1]),
    tools=st.booleans(),
)
def test_events_tell_what_the_whole_tells(
    pieces: list[str], cuts: list[int], finish: Finish, most: int | None, tools: bool
) -> None:
    text = "".join(pieces)

    def shape() -> ResponsesShape:
        return ResponsesShape(
            None, HEAD, Reading(FORMATS[0] if tools else None, most), logprobs=False
        )  # type: ignore[arg-type]

    streamed = shape()
    events = [json.loads(json.dumps(e)) for e in streamed.start()]
    rest = text
    tokens = []
    for cut in cuts:
        tokens.append(rest[:cut])
        rest = rest[cut:]
    tokens.append(rest)
    usage = Usage(1, len(tokens), 0)
    for number, token in enumerate(tokens):
        end = finish if number == len(tokens) - 1 else None
        events += [
            json.loads(json.dumps(e))
            for e in streamed.more(0, [Token("r", 0, 1, token, finish=end)])
        ]
    events += streamed.end(usage)
    final = well_told(json.loads(json.dumps(events)))
    output = Output("r", (1,), (Completion(0, (1,) * len(tokens), text, finish),))
    whole = shape().whole([output], usage)

    def parts(response: Any) -> list[Any]:
        """In their order; pieces of a text between two calls are one text."""
        return [
            i["content"][0]["text"] if i["type"] == "message" else (i["name"], i["arguments"])
            for i in response["output"]
        ]

    assert (
        parts(final) == parts(whole)
        and final["status"] == whole["status"]
        and final["usage"] == whole["usage"]
    )
    assert tools or parts(whole) == [text]


# --- what is refused, and what fails


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        (
            {"context_management": [{"type": "compaction"}]},
            "context_management",
            "unsupported_parameter",
        ),
        ({"enable_thinking": False}, "enable_thinking", "unsupported_parameter"),
        ({"logit_bias": {"1": 1}}, "logit_bias", "unsupported_parameter"),
        ({"frobnicate": 1}, "frobnicate", "unknown_parameter"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": 5}, "input", "invalid_value"),
        (
            {"input": [{"type": "item_reference", "id": "msg_1"}]},
            "input[0]",
            "unsupported_parameter",
        ),
        (
            {"input": [{"type": "web_search_call", "id": "x", "status": "completed"}]},
            "input[0]",
            "unsupported_parameter",
        ),
        (
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}
                ]
            },
            "input[0].content[0]",
            "unsupported_parameter",
        ),
        (
            {
                "input": [
                    {
                        "type": "function_call_output",
                        "call_id": "c",
                        "output": [{"type": "input_file", "file_id": "x"}],
                    }
                ]
            },
            "input[0].output[0]",
            "unsupported_parameter",
        ),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role", "invalid_value"),
        (
            {
                "input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]
                * 129
            },
            "input",
            "invalid_value",
        ),
        ({"input": [said("x")] * 4096, "instructions": "x"}, "input", "invalid_value"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]},
            "input",
            "invalid_value",
        ),
        (
            {
                "input": [
                    {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "abc"}
                ]
            },
            "input[0].encrypted_content",
            "unsupported_parameter",
        ),
        ({"input": "word " * 3000}, "input", "context_length_exceeded"),
        ({"input": "x" * 4_000_000}, "input", "context_length_exceeded"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "context_length_exceeded"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 1, "tools": [WEATHER]}, "top_logprobs", "unsupported_value"),
        ({"include": ["everything"]}, "include[0]", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "unsupported_parameter"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0]", "unsupported_parameter"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "invalid_value"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "time"}},
            "tool_choice",
            "invalid_value",
        ),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        (
            {"tool_choice": {"type": "mcp", "server_label": "x"}},
            "tool_choice",
            "unsupported_parameter",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "x"}}},
            "text.format",
            "invalid_value",
        ),
        (
            {"text": {"format": {"type": "json_object", "name": "x"}}},
            "text.format",
            "invalid_value",
        ),
        (
            {
                "text": {
                    "format": {"type": "json_schema", "name": "x", "schema": {"type": "wizard"}}
                }
            },
            "text.format",
            "invalid_value",
        ),
        (
            {"stream_options": {"include_obfuscation": True}, "stream": True},
            "stream_options.include_obfuscation",
            "invalid_value",
        ),
    ],
)
def test_what_is_refused_is_named(running: Running, body: Any, param: str, code: str) -> None:
    # counting asks for none of it
    generates = code == "context_length_exceeded" or param in ("top_logprobs", "text.format")
    for place in ("/v1/responses", "/v1/responses/input_tokens")[: 1 if generates else 2]:
        answer = running.post(place, {"input": QUESTION, **body})
        assert (answer.status, answer.error["param"], answer.error["code"]) == (400, param, code), (
            answer.error
        )
        assert answer.error["message"].startswith(param.split("[")[0])


@pytest.mark.parametrize(
    "body",
    [
        {
            "background": False,
            "store": True,
            "truncation": "disabled",
            "previous_response_id": None,
            "conversation": None,
            "prompt": None,
        },
        {
            "user": "u",
            "safety_identifier": "s",
            "prompt_cache_key": "k",
            "service_tier": "auto",
            "metadata": {"a": "b"},
            "max_tool_calls": 3,
        },
        {
            "include": ["reasoning.encrypted_content"],
            "reasoning": {"summary": "auto"},
            "text": {"verbosity": "high"},
        },
        NEUTRAL_IN_CHAT,
        {
            "stream_options": {"include_obfuscation": False},
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
        },
    ],
)
def test_what_changes_nothing_is_taken(running: Running, body: Any) -> None:
    assert (
        ask(running, **body).json["output"][0]["content"]
        == ask(running).json["output"][0]["content"]
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"input": "\\ud800"}',
        b'{"input": [' + b"{}," * 900_000 + b"{}]}",
    ],
)
def test_bodies_that_are_none(running: Running, body: bytes) -> None:
    answer = running.post("/v1/responses", body)
    assert (
        answer.status == 400
        and answer.error["type"] == "invalid_request_error"
        and len(answer.body) < 2000
    )


def test_nothing_is_stored(client: OpenAI) -> None:
    kept = client.responses.create(model="demo", input=QUESTION, max_output_tokens=1, store=True)
    for call in (
        client.responses.retrieve,
        client.responses.delete,
        client.responses.cancel,
        client.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError, match="no response is stored here") as error:
            call(kept.id)
        assert error.value.code == "response_not_found"


def test_a_stream_that_fails_ends_with_its_error() -> None:
    with (
        serving() as running,
        OpenAI(
            base_url=f"{running.address}/v1", api_key="x", _strict_response_validation=True
        ) as client,
    ):
        engine = running.service.llm.engine
        step, steps = engine.step, list[int]()

        def few() -> Any:
            steps.append(1)
            return step() if len(steps) < 9 else None

        engine.step = few  # type: ignore[method-assign]
        stream = client.responses.create(
            model="x", input=QUESTION, extra_body={"ignore_eos": True}, stream=True
        )
        events = [json.loads(event.to_json()) for event in stream]
    assert [e["type"] for e in events[-2:]] == ["error", "response.failed"] and any(
        "delta" in e["type"] for e in events
    )
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert events[-2]["code"] == "engine_stopped" and events[-1]["response"]["status"] == "failed"
    # as the document at /openapi.json has it
    assert Response.model_validate(events[-1]["response"]).usage is None
    assert events[-1]["response"]["error"] == {
        "code": "server_error",
        "message": events[-2]["message"],
    }


# --- OpenAI's specification


@shared
@pytest.mark.shared
def test_every_parameter_of_the_specification_is_known() -> None:
    wanted = properties("CreateResponse")
    assert len(wanted) > 20 and wanted <= set(ResponsesRequest.model_fields)


@shared
@pytest.mark.shared
@pytest.mark.parametrize(
    "body",
    [
        {"top_logprobs": 2},
        {"text": AS_THING, "max_output_tokens": 100},
        {"tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 200},
        {
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "name": "weather"},
            "instructions": "x",
            "metadata": {"a": "b"},
        },
    ],
)
def test_answers_are_those_of_the_specification(running: Running, body: Any) -> None:
    check(ask(running, **body).json, "Response")
    for event in ask(running, **body, stream=True).events:
        assert "response" not in event or Response.model_validate(event["response"])
        name = event["type"].removeprefix("response.")
        # null in all of the specification's examples, an object in its schemas
        if name in ("created", "in_progress"):
            assert event["response"].pop("usage") is None
        check(event, EVENTS[name])
    check(running.post("/v1/responses/input_tokens", {"input": "x"}).json, "TokenCountsResource")
    check(running.get("/v1/responses/resp_1").json, "ErrorResponse")


EVENTS = {
    "created": "ResponseCreatedEvent",
    "in_progress": "ResponseInProgressEvent",
    "completed": "ResponseCompletedEvent",
    "incomplete": "ResponseIncompleteEvent",
    "output_item.added": "ResponseOutputItemAddedEvent",
    "output_item.done": "ResponseOutputItemDoneEvent",
    "content_part.added": "ResponseContentPartAddedEvent",
    "content_part.done": "ResponseContentPartDoneEvent",
    "output_text.delta": "ResponseTextDeltaEvent",
    "output_text.done": "ResponseTextDoneEvent",
    "function_call_arguments.delta": "ResponseFunctionCallArgumentsDeltaEvent",
    "function_call_arguments.done": "ResponseFunctionCallArgumentsDoneEvent",
}
