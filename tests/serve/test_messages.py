"""/v1/messages: as plain HTTP, and as the anthropic client sees it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any, Literal

import pytest

from quantflow.serve.config import ServerConfig
from quantflow.serve.errors import Refused
from quantflow.serve.messages.dialogue import as_chat, messages, tool_input
from quantflow.serve.messages.protocol import CountRequest, MessagesRequest
from tests.helpers.serving import DEMO, NEUTRAL_IN_CHAT, Running, serving

KEY = "key-of-a-user-0001"
HI: list[Any] = [{"role": "user", "content": "What is a table?"}]
TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}Answer in"
    " <tool_call></tool_call>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if"
    " m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{%"
    " for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}{%"
    " if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false"
    " %}<think></think>{% endif %}{{ reasoning_effort }}{% endif %}"
)
WEATHER: Any = {
    "name": "weather",
    "description": "The weather somewhere",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model whose dialogues have a place for tools, behind a key, and with a queue that is soon
    full."""
    folder = tmp_path_factory.mktemp("messages") / "model"
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with serving(
        folder,
        ServerConfig(port=0, keys=(KEY,), names=("demo",), max_queue=0, max_body=200_000),
        check=True,
    ) as running:
        yield running


def post(running: Running, path: str = "/v1/messages", **body: Any) -> Any:
    found = running.post(
        path,
        {"messages": HI, **({} if "count" in path else {"max_tokens": 8}), **body},
        **{"x-api-key": KEY},
    )
    return found


# --- dialogues


def dialogue(*turns: Any, system: Any = None) -> list[Any]:
    body = MessagesRequest.model_validate(
        {"messages": list(turns), "max_tokens": 1, "system": system}
    )
    return messages(body.system, body.messages)


def user(*content: Any) -> Any:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(*content: Any) -> Any:
    return {**user(*content), "role": "assistant"}


def text(words: str) -> Any:
    return {"type": "text", "text": words, **CACHED}


USED: Any = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}}
RESULT: Any = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Rain"}
REDACTED: Any = {"type": "redacted_thinking", "data": "?"}
CALLED: Any = {
    "id": "toolu_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
}


def test_blocks_become_messages() -> None:
    assert dialogue(user("Hi"), system="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    assert (
        dialogue(user(text("a"), text("b")), system=[text("Be "), text("brief.")])[0]["content"]
        == "Be brief."
    )
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    said = assistant(thought, REDACTED, text("Let me see."), USED, {**USED, "id": "toolu_2"})
    answered = user(
        RESULT,
        {**RESULT, "tool_use_id": "toolu_2", "content": [text("no city")], "is_error": True},
        text("And now?"),
    )
    assert dialogue(user("Hi"), said, answered) == [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Hm.",
            "tool_calls": [CALLED, {**CALLED, "id": "toolu_2"}],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "Rain"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no city"},
        {"role": "user", "content": "And now?"},
    ]


def test_turns_of_one_speaker_are_one() -> None:
    assert dialogue(
        user("a"),
        user("b"),
        assistant("c"),
        assistant(USED),
        user({**RESULT, "content": None}),
        user("d"),
    ) == [
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "c", "tool_calls": [CALLED]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": ""},
        {"role": "user", "content": "d"},
    ]


def test_a_line_for_anthropics_books_is_no_part_of_the_prompt() -> None:
    billed = [
        text("x-anthropic-billing-header: cc_version=2.1; cch=a1b2c;"),
        text("You are an agent."),
    ]
    assert dialogue(user("Hi"), system=billed) == dialogue(user("Hi"), system="You are an agent.")


def test_arguments_are_an_object_whatever_the_model_wrote() -> None:
    assert tool_input('{"a": 1}') == {"a": 1}
    assert tool_input("[1]") == {"arguments": [1]}
    assert tool_input("no json") == {"arguments": "no json"}


# --- answers


def test_a_message_is_what_chat_completions_say(locked: Running) -> None:
    system = "Be brief."
    body: Any = {"max_tokens": 20, "temperature": 0, "system": system}
    found = post(locked, **body)
    messages = [{"role": "system", "content": system}, *HI]
    chat = locked.post(
        "/v1/chat/completions",
        {"messages": messages, "max_tokens": 20, "temperature": 0},
        authorization=f"Bearer {KEY}",
    ).json
    said = chat["choices"][0]["message"]["content"]
    assert found.status == 200 and found.headers["request-id"].startswith("req-")
    assert found.json["content"] == [{"type": "text", "text": said, "citations": None}]
    assert {name: found.json[name] for name in ("type", "role", "model", "stop_sequence")} == {
        "type": "message", "role": "assistant", "model": "demo", "stop_sequence": None
    }  # fmt: skip
    assert (
        found.json["stop_reason"]
        == {"length": "max_tokens", "stop": "end_turn"}[chat["choices"][0]["finish_reason"]]
    )
    usage = found.json["usage"]
    assert (
        usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    )
    assert usage["output_tokens"] == chat["usage"]["completion_tokens"]


def test_the_events_of_a_stream(locked: Running) -> None:
    body: Any = {
        "max_tokens": 12,
        "temperature": 0,
        "messages": [
            {"role": "user", "content": "Say something new of tables, and of what is in them. " * 9}
        ],
    }
    answer = post(locked, **body, stream=True)
    assert (
        answer.headers["content-type"].startswith("text/event-stream")
        and b"[DONE]" not in answer.body
    )
    lines = answer.body.decode().splitlines()
    assert [line[7:] for line in lines if line.startswith("event: ")] == [
        event["type"] for event in answer.events
    ]
    begin, ping, block, *deltas, stop, ended, last = answer.events
    assert (begin["type"], ping) == ("message_start", {"type": "ping"})
    assert begin["message"]["content"] == [] and begin["message"]["stop_reason"] is None
    assert block == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    assert {(d["type"], d["index"], d["delta"]["type"]) for d in deltas} == {
        ("content_block_delta", 0, "text_delta")
    }
    assert (stop, last) == ({"type": "content_block_stop", "index": 0}, {"type": "message_stop"})
    whole = post(locked, **body).json
    assert "".join(d["delta"]["text"] for d in deltas) == whole["content"][0]["text"]
    assert ended["delta"] == {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    assert begin["message"]["usage"]["input_tokens"] == ended["usage"]["input_tokens"] > 0
    assert sum(ended["usage"].values()) == sum(whole["usage"].values())
    assert (
        whole["usage"]["cache_read_input_tokens"]
        > 0
        == begin["message"]["usage"]["cache_read_input_tokens"]
    )


def test_the_stop_sequence_that_was_found_is_named(locked: Running) -> None:
    said = post(locked, max_tokens=20, temperature=0).json["content"][0]["text"]
    stop = said[5:8]
    for stream in (False, True):
        found = post(
            locked,
            max_tokens=20,
            temperature=0,
            stop_sequences=["never there", stop],
            stream=stream,
        )
        told = (
            found.events[-2]["delta"]
            if stream
            else {name: found.json[name] for name in ("stop_reason", "stop_sequence")}
        )
        assert told == {"stop_reason": "stop_sequence", "stop_sequence": stop}
    assert found.status == 200
    at_once = post(locked, max_tokens=20, temperature=0, stop_sequences=[said[:3]])
    assert at_once.json["content"] == [{"type": "text", "text": "", "citations": None}]
    silent = post(
        locked, max_tokens=20, temperature=0, stop_sequences=[said[:3]], stream=True
    ).events
    assert [e["type"] for e in silent[2:]] == [
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_more_tokens_than_the_context_has_room_for(locked: Running) -> None:
    """Anthropic's clients ask for 32,000 whatever the model: such an answer ends with the context,
    and says so."""
    context = locked.service.context

    def full(words: int) -> tuple[list[Any], int]:
        dialogue = [user("word " * words)]
        return (
            dialogue,
            context
            - post(locked, "/v1/messages/count_tokens", messages=dialogue).json["input_tokens"],
        )

    (_, first), (_, second) = full(10), full(20)
    # as many words as leave room for forty tokens
    long, room = full(10 + 10 * (first - 40) // (first - second))
    assert 0 < room < 80
    found = post(locked, max_tokens=10**6, temperature=0, messages=long).json
    assert (found["stop_reason"], found["usage"]["output_tokens"]) == (
        "model_context_window_exceeded",
        room,
    )
    exact = post(locked, max_tokens=room, temperature=0, messages=long).json
    assert (exact["stop_reason"], exact["content"]) == ("max_tokens", found["content"])
    longer = post(locked, messages=[user("word " * 3 * context)])
    assert longer.status == 400
    # by these words Claude Code knows that it must shorten it
    assert "prompt is too long" in longer.error["message"]


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "any", "disable_parallel_tool_use": True},
        {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
    ],
)
def test_a_tool_is_called(locked: Running, choice: Any) -> None:
    body: Any = {
        "tools": [WEATHER, {**WEATHER, "name": "climate"}],
        "tool_choice": choice,
        "max_tokens": 60,
        "temperature": 0,
    }
    whole = post(locked, **body).json
    used = [block for block in whole["content"] if block["type"] == "tool_use"]
    assert used == whole["content"] and whole["stop_reason"] == "tool_use"
    assert all(
        block["input"] in ({"city": "Oslo"}, {"city": "Rome"}) and block["id"].startswith("toolu_")
        for block in used
    )
    assert choice["type"] == "any" or [block["name"] for block in used] == ["weather"]
    events = post(locked, **body, stream=True).events
    blocks = [e["content_block"] for e in events if e["type"] == "content_block_start"]
    assert [{**b, "id": 0} for b in blocks] == [{**b, "id": 0, "input": {}} for b in used]
    parts = [e["delta"]["partial_json"] for e in events if e["type"] == "content_block_delta"]
    assert [json.loads(part) for part in parts] == [block["input"] for block in used]
    assert [e["index"] for e in events if e["type"] == "content_block_stop"] == list(
        range(len(used))
    )
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_strict_tools_where_the_model_may_choose(locked: Running) -> None:
    body: Any = {
        "tools": [{**WEATHER, "strict": True}],
        "tool_choice": {"type": "auto"},
        "temperature": 0,
    }
    found = post(locked, **body)
    assert found.status == 200 and found.json["stop_reason"] in (
        "max_tokens",
        "end_turn",
        "tool_use",
    )


def test_an_answer_of_a_schema(locked: Running) -> None:
    format = {"type": "json_schema", "schema": WEATHER["input_schema"]}
    found = post(locked, max_tokens=100, output_config={"format": format, "effort": "low"}).json
    assert json.loads(found["content"][0]["text"])["city"] in ("Oslo", "Rome")
    wrong = post(locked, output_config={"format": {**format, "schema": {"type": "wizard"}}})
    assert wrong.status == 400 and wrong.error["message"].startswith("output_config.format: ")


def test_an_answer_goes_on_from_the_assistants_last_words(locked: Running) -> None:
    dialogue = [*HI, assistant("A table is")]
    found = post(locked, temperature=0, messages=dialogue).json
    body = {"messages": dialogue, "max_tokens": 8, "temperature": 0, "continue_final_message": True}
    chat = locked.post("/v1/chat/completions", body, authorization=f"Bearer {KEY}").json
    assert found["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert (
        found["usage"]["input_tokens"] + found["usage"]["cache_read_input_tokens"]
        == chat["usage"]["prompt_tokens"]
    )


def test_a_template_that_knows_of_thinking_is_told(locked: Running) -> None:
    def count(**body: Any) -> Any:
        return post(locked, "/v1/messages/count_tokens", **body).json["input_tokens"]

    plain = count()
    assert count(thinking={"type": "adaptive", "display": "omitted"}) == plain
    assert count(thinking={"type": "disabled"}) > plain  # the template writes an empty thought
    assert count(output_config={"effort": "low"}) > plain


def test_what_claude_code_sends(locked: Running) -> None:
    found = post(
        locked,
        "/v1/messages?beta=true",
        model="demo",
        max_tokens=32000,
        temperature=1,
        stream=False,
        stop_sequences=["a", "e", " "],
        system=[
            text("x-anthropic-billing-header: cc_version=2.1"),
            text("You are an agent."),
            text("\nBe brief."),
        ],
        messages=[
            user(text("<system-reminder>today</system-reminder>"), text("What is a table?")),
            assistant(text("Let me see."), {**USED, **CACHED}),
            user({**RESULT, **CACHED}),
        ],
        tools=[
            {**WEATHER, **CACHED},
            {**WEATHER, "name": "mcp__city__" + "x" * 100, "eager_input_streaming": True},
        ],
        tool_choice={"type": "auto"},
        metadata={"user_id": '{"device": "x"}'},
        thinking={"type": "adaptive"},
        service_tier="auto",
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "high"},
    )
    assert found.status == 200, found.body


NEUTRAL: list[Any] = [
    {"metadata": {"user_id": "x"}},
    {"metadata": {"user_id": None}},
    {"service_tier": "standard_only"},
    {"thinking": {"type": "adaptive"}},
    CACHED,
    {"container": None, "mcp_servers": []},
    {"tools": [], "tool_choice": {"type": "none"}},
    {"stop_sequences": []},
    {
        "speed": "fast",
        "inference_geo": "eu",
        "user_profile_id": "x",
        "diagnostics": {"previous_message_id": None},
    },
    {"system": None, "top_p": None, "top_k": None, "stream": None, "output_config": {}},
    {"system": []},
    {"model": None},
    {"top_p": 1, "top_k": 0},
    NEUTRAL_IN_CHAT,
]


@pytest.mark.parametrize("neutral", NEUTRAL)
def test_what_changes_nothing_is_accepted(locked: Running, neutral: Any) -> None:
    assert (
        post(locked, temperature=0, **neutral).json["content"]
        == post(locked, temperature=0).json["content"]
    )


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            {"messages": [user(text("x"), IMAGE)]},
            "messages[0].content[1]: images are not supported",
        ),
        (
            {"messages": [user({**IMAGE, "type": "document"})]},
            "messages[0].content[0]: documents are not supported",
        ),
        (
            {"messages": [user("x"), assistant(USED), user({**RESULT, "content": [IMAGE]})]},
            "images are not supported",
        ),
        ({"messages": [user({"type": "search_result"})]}, "'search_result' are not supported"),
        ({"system": [IMAGE]}, "system[0]: images are not supported"),
        ({"messages": [user(USED)]}, "messages[0].content[0]: tool_use in a message of role user"),
        ({"messages": [user("x"), assistant(RESULT)]}, "messages[1].content[0]: tool_result"),
        ({"messages": []}, "messages: "),
        (
            {"messages": [user(text(""))]},
            "messages: nothing is said in them; expected a text, a call of a tool or its result",
        ),
        (
            {"messages": [user(text("")), assistant(REDACTED)], "system": "x"},
            "messages: nothing is said in them",
        ),
        (
            {"messages": [user("x"), assistant(*[USED] * 129)]},
            "messages: 129 calls in one turn; expected at most 128",
        ),
        (
            {"messages": [user("x"), *[assistant(*[USED] * 65)] * 2]},
            "messages: 130 calls in one turn; expected at most 128",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role: "),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools[0]: tools of type 'web_search_20250305'",
        ),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools[0].defer_loading: "),
        ({"tools": [{**WEATHER, "input_examples": [{}]}]}, "tools[0].input_examples: "),
        ({"tool_choice": {"type": "any"}}, "tool_choice: without tools"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "tool"}},
            "tool_choice: type tool without a name",
        ),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}},
            "tool_choice: 'other' is none of the tools",
        ),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2048}},
            "thinking: thoughts of type 'enabled' are not supported",
        ),
        ({"mcp_servers": [{}]}, "mcp_servers: "),
        ({"container": "x"}, "container: "),
        ({"temperature": 1.5}, "temperature: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": None}, "max_tokens: "),
        ({"stop_sequences": [""]}, "stop_sequences[0]: "),
        (
            {"frequency_penalty": 1},
            "frequency_penalty: this value is not supported here; expected 0",
        ),
        (
            {"stop": ["a"]},
            "stop: this value is not supported here; expected []. Use stop_sequences",
        ),
        (
            {"enable_thinking": False},
            "enable_thinking: this value is not supported here; expected none. Use thinking",
        ),
        (
            {"min_tokens": 4},
            "min_tokens: this value is not supported here; expected 0. /v1/chat/completions has it",
        ),
        ({"of_tomorrow": 1}, "of_tomorrow: unknown parameter"),
    ],
)
def test_what_is_refused_by_name(locked: Running, body: Any, said: str) -> None:
    answer = post(locked, **body)
    assert answer.status == 400, answer.body
    assert answer.json["type"] == "error" and answer.error["type"] == "invalid_request_error"
    assert (
        said in answer.error["message"]
        and answer.json["request_id"] == answer.headers["request-id"]
    )


def test_more_results_than_a_dialogue_has_messages() -> None:
    body = CountRequest.model_validate({"messages": [user("x"), *[user(*[RESULT] * 2048)] * 2]})
    with pytest.raises(Refused, match="messages: 4097 messages; expected at most 4096") as error:
        as_chat(body)
    assert (error.value.status, error.value.param) == (400, "messages")


def test_errors_of_every_kind_have_anthropics_shape(locked: Running) -> None:
    found = {
        "authentication_error": locked.post("/v1/messages", {}),
        "not_found_error": post(locked, model="claude"),
        "request_too_large": locked.post(
            "/v1/messages", {"x": "x" * 200_000}, **{"x-api-key": KEY}
        ),
        "invalid_request_error": locked.post("/v1/messages", b"{", **{"x-api-key": KEY}),
    }
    for kind, answer in found.items():
        assert answer.json["type"] == "error" and answer.error["type"] == kind
        assert (
            set(answer.error) == {"type", "message"}
            and answer.json["request_id"] == answer.headers["x-request-id"]
        )
    assert [answer.status for answer in found.values()] == [401, 404, 413, 400]
    unknown = locked.post("/v1/messages/batches", {}, **{"x-api-key": KEY})
    assert (unknown.status, unknown.error["type"]) == (404, "not_found_error")
    elsewhere = locked.get("/v1/nothing", **{"x-api-key": KEY, "anthropic-version": "2023-06-01"})
    assert (elsewhere.status, elsewhere.json["type"]) == (404, "error")
    assert "type" not in locked.get("/v1/nothing", **{"x-api-key": KEY}).json


def test_an_error_in_the_middle_is_an_event(locked: Running) -> None:
    llm = locked.service.llm
    connection = HTTPConnection("127.0.0.1", locked.port, timeout=60)
    body = json.dumps({"messages": HI, "max_tokens": 900, "stream": True, "temperature": 0})
    connection.request(
        "POST", "/v1/messages", body, {"content-type": "application/json", "x-api-key": KEY}
    )
    response = connection.getresponse()
    assert response.readline() == b"event: message_start\n"
    llm.call(lambda engine: [llm.abort(id) for id in list(engine._requests)])
    name, data = response.read().strip().splitlines()[-2:]
    connection.close()
    assert name == b"event: error" and json.loads(data[6:])["error"]["type"] == "overloaded_error"


def test_keys_of_both_kinds_open(locked: Running) -> None:
    assert locked.get("/v1/models", **{"x-api-key": KEY}).status == 200
    assert (
        locked.get("/v1/models", **{"x-api-key": "wrong", "authorization": f"Bearer {KEY}"}).status
        == 200
    )
    assert (
        locked.get("/v1/models", **{"x-api-key": KEY, "authorization": "Bearer wrong"}).status
        == 200
    )
    for header in ("", " ", "wrong", f"Bearer {KEY}", KEY[:-1]):
        assert locked.get("/v1/models", **{"x-api-key": header}).status == 401


# --- the client


@pytest.fixture(scope="module")
def client(locked: Running) -> Any:
    anthropic = pytest.importorskip("anthropic", reason="the anthropic client is not installed")
    return anthropic.Anthropic(
        base_url=locked.address, api_key=KEY, max_retries=0, _strict_response_validation=True
    )


def test_the_client_and_its_stream(client: Any) -> None:
    arguments: Any = {
        "model": "demo",
        "messages": HI,
        "max_tokens": 12,
        "extra_body": {"temperature": 0},
    }
    whole = client.messages.create(**arguments)
    assert whole._request_id and whole.content[0].type == "text"
    with client.messages.stream(**arguments) as stream:
        said = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert said == final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert final.usage.output_tokens == whole.usage.output_tokens
    events = list(client.messages.create(**arguments, stream=True))
    assert events[0].type == "message_start" and events[-1].type == "message_stop"


def test_tokens_are_counted_as_they_are_used(client: Any) -> None:
    for more in (
        {},
        {"system": "Be brief.", "tools": [WEATHER]},
        {"messages": [*HI, assistant("A set."), user("And an index?")]},
    ):
        given = {"model": "demo", "messages": HI, **more}
        count = client.messages.count_tokens(**given).input_tokens
        usage = client.messages.create(**given, max_tokens=1).usage
        assert count == usage.input_tokens + usage.cache_read_input_tokens


def test_a_round_of_tools(client: Any) -> None:
    given: Any = {"model": "demo", "tools": [WEATHER], "max_tokens": 100}
    choice = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    first = client.messages.create(**given, messages=HI, tool_choice=choice)
    assert first.stop_reason == "tool_use" and first.content[-1].input["city"] in ("Oslo", "Rome")
    result = {
        "type": "tool_result",
        "tool_use_id": first.content[-1].id,
        "content": [{"type": "text", "text": "Rain"}],
    }
    history = [*HI, first.to_param(), {"role": "user", "content": [result]}]
    second = client.messages.create(**given, messages=history, tool_choice={"type": "none"})
    assert second.stop_reason in ("end_turn", "max_tokens") and second.content[0].type == "text"
    with client.messages.stream(**given, messages=HI, tool_choice=choice) as stream:
        streamed = stream.get_final_message()
    assert streamed.stop_reason == "tool_use" and streamed.content[-1].input["city"] in (
        "Oslo",
        "Rome",
    )


def test_the_clients_own_loop_over_tools(client: Any) -> None:
    """It asks for a thread that the server keeps, and goes on without where there is none."""
    from anthropic import beta_tool

    asked: list[str] = []

    @beta_tool
    def weather(city: Literal["Oslo", "Rome"]) -> str:
        """The weather somewhere."""
        asked.append(city)
        return "Rain"

    choice = {"type": "any", "disable_parallel_tool_use": True}
    runner = client.beta.messages.tool_runner(
        model="demo",
        messages=HI,
        tools=[weather],
        max_tokens=60,
        tool_choice=choice,
        max_iterations=2,
    )
    found = list(runner)
    assert [message.stop_reason for message in found] == ["tool_use", "tool_use"]
    assert asked[0] == found[0].content[-1].input["city"]
    first, second = (
        message.usage.input_tokens + message.usage.cache_read_input_tokens for message in found
    )
    assert second > first  # the whole dialogue, with the result


def test_errors_are_the_clients_exceptions(client: Any, locked: Running) -> None:
    anthropic = pytest.importorskip("anthropic")
    with pytest.raises(anthropic.NotFoundError, match="claude"):
        client.messages.create(model="claude", messages=HI, max_tokens=1)
    with pytest.raises(anthropic.BadRequestError, match="top_k"):
        client.messages.create(model="demo", messages=HI, max_tokens=1, extra_body={"top_k": -1})
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(
            model="demo", messages=HI, max_tokens=1
        )
    with (
        pytest.raises(anthropic.RateLimitError),
        locked.service.entered(locked.service.most_sequences),
    ):
        client.messages.create(model="demo", messages=HI, max_tokens=1)


def test_models_by_the_client(client: Any) -> None:
    found = client.models.list()
    assert [m.id for m in found] == ["demo"]
    assert client.models.retrieve("demo").max_input_tokens == found.data[0].max_input_tokens > 0
    assert client.with_options(api_key=KEY).models.list().data[0].type == "model"
