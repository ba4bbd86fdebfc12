"""Dialogues that the server remembers."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from quantflow.serve import interactive
from quantflow.serve.config import ServerConfig
from tests.helpers.serving import Answer, Running, idle, request, serving, until

FIRST, SECOND = "key-of-a-user-0001", "key-of-a-user-0002"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(config=ServerConfig(port=0, keys=(FIRST, SECOND)), check=True) as found:
        yield found


def turn(running: Running, key: str = FIRST, **body: Any) -> Answer:
    given = {
        "prompt": "What is a table?",
        "session_id": 7,
        "interactive_mode": True,
        "temperature": 0,
        "request_output_len": 12,
    }
    return running.post("/v1/chat/interactive", {**given, **body}, authorization=f"Bearer {key}")


def sessions(running: Running) -> int:
    return running.service.llm.engine.occupancy().sessions


def settled(running: Running) -> int:
    """Sessions, once all that was asked has been left: an answer is whole a moment before."""
    assert until(lambda: running.service.inside == 0)
    running.service.llm.call(lambda engine: None).result(60)
    return sessions(running)


def test_a_turn_goes_on_from_the_last(running: Running) -> None:
    """The same dialogue in one request gets the same answer."""
    first = turn(running, session_id=1).json
    second = turn(running, session_id=1, prompt="And an index?").json
    assert second["history_tokens"] == first["input_tokens"] + first["tokens"]
    said = [("user", "What is a table?"), ("assistant", first["text"]), ("user", "And an index?")]
    messages = [{"role": role, "content": content} for role, content in said]
    body = {"messages": messages, "temperature": 0, "max_tokens": 12, "top_p": 0.95, "top_k": 40}
    whole = running.post("/v1/chat/completions", body, authorization=f"Bearer {FIRST}").json
    assert second["text"] == whole["choices"][0]["message"]["content"]
    assert second["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert second["history_tokens"] + second["input_tokens"] == whole["usage"]["prompt_tokens"]


def test_a_stream_of_a_turn(running: Running) -> None:
    whole = turn(running, session_id=2, interactive_mode=False).json
    events = turn(running, session_id=2, interactive_mode=False, stream=True).events
    assert "".join(e["text"] for e in events) == whole["text"]
    assert (
        events[-1] == {**whole, "text": events[-1]["text"]} and events[0]["finish_reason"] is None
    )


def test_a_session_that_is_not_kept_leaves_nothing(running: Running) -> None:
    before = settled(running)
    for id in (3, -1):
        assert turn(running, session_id=id, interactive_mode=False).json["history_tokens"] == 0
        assert turn(running, session_id=id, interactive_mode=False).json["history_tokens"] == 0
    assert until(lambda: sessions(running) <= before)


def test_a_number_under_another_key_is_another_session(running: Running) -> None:
    turn(running, session_id=4, prompt="My secret is swordfish.")
    assert turn(running, SECOND, session_id=4).json["history_tokens"] == 0
    turn(running, SECOND, session_id=4, cancel=True)
    assert turn(running, session_id=4).json["history_tokens"] > 0


def test_cancel_ends_the_session_and_its_turn(running: Running) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(turn, running, session_id=5, request_output_len=900, ignore_eos=True)
        assert until(lambda: running.service.llm.engine.occupancy().running == 1)
        busy = turn(running, session_id=5)
        assert (busy.status, busy.error["code"]) == (409, "session_busy")
        assert turn(running, session_id=5, cancel=True).json["text"] == ""
        answer = waiting.result()
        assert (
            answer.error["type"] != "server_error"
            and "the client ended session 5" in answer.error["message"]
        )
        assert (answer.status, answer.error["code"]) == (409, "cancelled")
    assert turn(running, session_id=5).json["history_tokens"] == 0


@pytest.mark.parametrize(("end", "code"), [("cancel", "cancelled"), ("clear", "aborted")])
def test_a_stream_says_who_ended_it(
    running: Running, monkeypatch: pytest.MonkeyPatch, end: str, code: str
) -> None:
    found: list[Any] = []
    made = interactive.Sessions.enter
    monkeypatch.setattr(
        interactive.Sessions, "enter", lambda self, *place: found.append(self) or made(self, *place)
    )
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            turn, running, session_id=21, request_output_len=900, ignore_eos=True, stream=True
        )
        assert until(lambda: running.service.llm.engine.occupancy().running == 1)
        if end == "cancel":
            turn(running, session_id=21, cancel=True)
        else:  # as /admin/sessions/end does
            found[0].clear()
        assert waiting.result().events[-1]["error"]["code"] == code


def test_cancel_while_a_turn_is_prepared(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    before, dialogue = settled(running), running.service.dialogue
    prepared = threading.Event()

    def slow(*arguments: Any, **more: Any) -> Any:
        prepared.wait(60)
        return dialogue(*arguments, **more)

    monkeypatch.setattr(running.service, "dialogue", slow)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(turn, running, session_id=11)
        assert until(lambda: running.service.inside == 1)
        assert turn(running, session_id=11, cancel=True).status == 200
        prepared.set()
        assert (waiting.result().status, waiting.result().error["code"]) == (409, "cancelled")
    assert until(lambda: sessions(running) == before)
    assert turn(running, session_id=11, interactive_mode=False).json["history_tokens"] == 0


def test_a_dialogue_that_outgrows_the_context_is_refused_and_kept(running: Running) -> None:
    turn(running, session_id=6)
    answer = turn(running, session_id=6, prompt="word " * 2000)
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert turn(running, session_id=6, prompt="And an index?").json["history_tokens"] > 0


def test_a_turn_that_came_to_nothing_is_no_part_of_the_dialogue(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = turn(running, session_id=12).json
    runner = running.service.llm.engine.runner
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", lambda step: (_ for _ in ()).throw(MemoryError()))
        assert turn(running, session_id=12, prompt="Lost.").status == 500
        assert turn(running, session_id=13, prompt="Lost.").status == 500
    second = turn(running, session_id=12, prompt="And an index?").json
    assert second["history_tokens"] == first["input_tokens"] + first["tokens"]
    assert turn(running, session_id=13).json["history_tokens"] == 0


def test_a_session_without_a_number_is_not_kept(running: Running) -> None:
    before = settled(running)
    assert turn(running, session_id=-1, interactive_mode=True).status == 200
    assert until(lambda: sessions(running) == before)


def test_who_goes_away_keeps_what_was_said(running: Running) -> None:
    first = turn(running, session_id=8).json
    body = {
        "prompt": "Go on.",
        "session_id": 8,
        "interactive_mode": True,
        "stream": True,
        "request_output_len": 800,
        "ignore_eos": True,
    }
    with running.socket() as connection:
        data = request(body, "/v1/chat/interactive").replace(
            b"host: localhost", b"host: x\r\nauthorization: Bearer " + FIRST.encode()
        )
        connection.sendall(data)
        said = b""
        while said.count(b"data: ") < 3:
            said += connection.recv(4096)
    assert until(lambda: running.service.inside == 0)
    last = turn(running, session_id=8, prompt="And?").json
    assert last["history_tokens"] > first["input_tokens"] + first["tokens"] + 3


def test_sessions_are_bounded_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interactive, "MOST_SESSIONS", 3)
    with serving(check=True) as running:
        for id in range(5):
            assert turn(running, session_id=id).status == 200
        assert until(lambda: sessions(running) == 3)
        assert (
            turn(running, session_id=4).json["history_tokens"] > 0
            and turn(running, session_id=0).json["history_tokens"] == 0
        )
        service = running.service
        service.config = dataclasses.replace(service.config, session_idle_s=0.0)
        turn(running, session_id=9, interactive_mode=False)
        assert until(lambda: sessions(running) == 0) and until(lambda: idle(running))


def test_ones_own_sessions_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interactive, "MOST_SESSIONS", 3)
    with serving(config=ServerConfig(port=0, keys=(FIRST, SECOND))) as running:
        turn(running, FIRST, session_id=0)
        for id in range(6):
            turn(running, SECOND, session_id=id)
        # nor does one that was refused take a place
        assert turn(running, SECOND, session_id=9, prompt="word " * 3000).status == 400
        assert turn(running, FIRST, session_id=0).json["history_tokens"] > 0
        assert turn(running, SECOND, session_id=0).json["history_tokens"] == 0


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[interactive.Conversation]:
    """The sessions that were left, in their order."""
    found, leave = list[interactive.Conversation](), interactive.Sessions.leave

    def noting(
        self: Any, owner: str, id: int, session: interactive.Conversation, *, keep: bool
    ) -> None:
        found.append(session)
        leave(self, owner, id, session, keep=keep)

    monkeypatch.setattr(interactive.Sessions, "leave", noting)
    return found


def test_a_session_keeps_what_a_template_gets_and_nothing_else(
    running: Running, left: list[interactive.Conversation]
) -> None:
    said = [{"role": "user", "content": [{"type": "text", "text": "What?"}], "refusal": None}]
    answer = turn(running, session_id=901, prompt=said)
    expected = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": answer.json["text"]},
    ]
    assert until(lambda: bool(left))  # an answer is whole before its session is left
    assert json.loads(left[-1].messages) == expected
    turn(running, session_id=901, cancel=True)


def test_a_session_is_bounded_whatever_a_template_leaves_out(
    running: Running, left: list[interactive.Conversation]
) -> None:
    """This one shows no calls and no thoughts: the context alone would bound nothing."""
    most = running.service.context * interactive.MOST_PER_TOKEN + interactive.MOST_BESIDE
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "f", "arguments": json.dumps({"x": ["y" * 500] * 40})},
    }
    said = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [call]},
        {"role": "user", "content": "c"},
    ]
    statuses = list[int]()
    for _ in range(most // 20_000 + 2):
        answer = turn(running, session_id=903, prompt=said, request_output_len=1)
        statuses.append(answer.status)
        if answer.status != 200:
            break
    assert statuses[:2] == [200, 200] and statuses[-1] == 400, answer.body
    assert (answer.error["param"], answer.error["code"]) == ("prompt", "session_too_long") and str(
        most
    ) in answer.error["message"]
    assert len(left[-1].messages) <= most
    # as it was
    assert turn(running, session_id=903, prompt="Go on.", request_output_len=1).status == 200
    turn(running, session_id=903, cancel=True)


@pytest.mark.parametrize("text", ["ä 🦊 \u2028", 'a"\\b', "x\ud800y"])
def test_messages_come_back_as_they_were(text: str) -> None:
    messages = [
        {"role": "user", "content": text},
        {"role": "assistant", "tool_calls": [{"arguments": {"x": [1.5, None, True, 10**40]}}]},
    ]
    once = interactive._more(b"", messages)
    assert (
        json.loads(once) == messages
        and json.loads(interactive._more(once, messages)) == messages * 2
    )
