"""Requests while they run: who waits, who leaves, who is too slow, and that nothing is left
behind."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from quantflow.engine.model import Model
from quantflow.serve.chat import ChatShape
from quantflow.serve.config import ServerConfig
from quantflow.serve.connection import Connection
from quantflow.serve.errors import Refused
from tests.helpers.serving import Running, idle, request, serving, until

LONG: dict[str, Any] = {
    "prompt": "The table",
    "max_tokens": 900,
    "ignore_eos": True,
    "temperature": 0,
}


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_leaves_nothing_behind(server: Running, stream: bool) -> None:
    engine = server.service.llm.engine
    steps: list[int] = []
    with server.socket() as connection:
        connection.sendall(request({**LONG, "stream": stream, "n": 3}))
        assert until(lambda: engine.occupancy().running == 3)
        step = engine.step
        engine.step = lambda: [steps.append(len(engine.scheduler.running)), step()][1]  # type: ignore[method-assign, func-returns-value]
    try:
        assert until(lambda: idle(server))
    finally:
        engine.step = step  # type: ignore[method-assign]
    # of the 900 that it would have taken; it takes a moment until the connection is seen to have
    # ended
    assert len(steps) < 300


def test_who_goes_away_while_waiting_leaves_the_queue() -> None:
    with serving(max_batch_size=1) as running, running.socket() as first:
        first.sendall(request({**LONG, "stream": True}))
        assert until(lambda: running.service.llm.engine.occupancy().running == 1)
        with running.socket() as second:
            second.sendall(request(LONG))
            assert until(lambda: running.service.llm.engine.occupancy().waiting == 1)
        assert until(lambda: running.service.llm.engine.occupancy().waiting == 0)
        assert running.metric("quantflow_generated_tokens_total") < 900  # the first's go on
        assert running.service.llm.engine.occupancy().running == 1


def test_a_full_queue_says_when_to_come_again() -> None:
    with serving(config=ServerConfig(port=0, max_queue=2), max_batch_size=2) as running:
        with running.socket() as connection:
            connection.sendall(request({**LONG, "n": 2, "stream": True}))
            assert until(lambda: running.service.inside == 2)
            with ThreadPoolExecutor(3) as pool:
                waiting = [pool.submit(running.complete, max_tokens=2) for _ in range(2)]
                assert until(lambda: running.service.inside == 4)
                answer = running.complete()
                assert (answer.status, answer.headers["retry-after"], answer.error["code"]) == (
                    429,
                    "1",
                    "queue_full",
                )
                assert answer.error["type"] == "rate_limit_error"
                assert running.get("/health").status == 200
                connection.close()
                assert [w.result().status for w in waiting] == [200, 200]
        # more than there can ever be room for
        assert running.complete(prompt=["x"] * 5).error["code"] == "invalid_value"


def test_an_answer_that_takes_too_long() -> None:
    with serving(config=ServerConfig(port=0, request_timeout_s=1.5)) as running:
        engine = running.service.llm.engine
        step = engine.step
        engine.step = lambda: [time.sleep(0.05), step()][1]  # type: ignore[method-assign, func-returns-value]
        answer = running.complete(**LONG)
        assert (answer.status, answer.error["code"]) == (504, "timeout")
        events = running.complete(**LONG, stream=True).events
        assert len(events) > 1 and events[-1]["error"]["code"] == "timeout"
        assert until(lambda: idle(running))


def test_a_silent_stream_is_kept_alive() -> None:
    """A waiting request has nothing to say: proxies would close its connection."""
    with (
        serving(config=ServerConfig(port=0, keep_alive_s=0.05), max_batch_size=1) as running,
        running.socket() as first,
    ):
        first.sendall(request({**LONG, "max_tokens": 400, "stream": True}))
        assert until(lambda: running.service.inside == 1)
        began = time.monotonic()
        answer = running.complete(stream=True)
        assert answer.body.startswith(b": keep-alive\n\n") and answer.events
        assert answer.body.count(b": keep-alive") <= (time.monotonic() - began) / 0.05 + 1


def test_a_slow_reader_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Connection.connection_made

    def narrow(protocol: Any, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        made(protocol, transport)

    monkeypatch.setattr(Connection, "connection_made", narrow)
    with serving() as running:
        engine = running.service.llm.engine
        with running.socket() as slow:
            slow.sendall(request({**LONG, "stream": True, "logprobs": 5, "n": 2}))
            assert until(lambda: engine.occupancy().running == 2)
            assert running.complete(max_tokens=100, ignore_eos=True).status == 200
            # its texts are made whether it reads or not
            assert until(lambda: engine.occupancy().running == 0, 120)
            assert running.service.inside == 2  # they wait for it, and nobody else does
        assert until(lambda: idle(running))


def test_many_clients_get_what_each_would_get_alone(server: Running) -> None:
    bodies: list[Any] = [
        {
            "prompt": f"Chapter {i}",
            "max_tokens": 5 + i,
            "temperature": 1,
            "seed": i,
            "n": 1 + i % 2,
            "stream": i % 3 == 0,
        }
        for i in range(24)
    ]

    def text(body: Any) -> dict[int, str]:
        answer = server.post("/v1/completions", body)
        found: dict[int, str] = {}
        for event in answer.events if body["stream"] else [answer.json]:
            for choice in event["choices"]:
                found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
        return found

    alone = [text(body) for body in bodies]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(text, bodies)) == alone
    assert until(lambda: idle(server))


def test_metrics_count(server: Running) -> None:
    before = {
        name: server.metric(f"quantflow_{name}")
        for name in ("generated_tokens_total", "prompt_tokens_total", "inter_token_seconds_count")
    }
    firsts = server.metric("quantflow_time_to_first_token_seconds_count")
    usage = server.complete(n=2, max_tokens=6, ignore_eos=True).json["usage"]
    after = {name: server.metric(f"quantflow_{name}") for name in before}
    assert (
        after["generated_tokens_total"] - before["generated_tokens_total"]
        == usage["completion_tokens"]
        == 12
    )
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == usage["prompt_tokens"]
    assert after["inter_token_seconds_count"] - before["inter_token_seconds_count"] == 10
    assert server.metric("quantflow_time_to_first_token_seconds_count") == firsts + 1
    assert (
        server.metric("quantflow_sequences_running") == 0
        and server.metric("quantflow_kv_blocks") > 0
    )
    assert server.metric("process_resident_memory_bytes") > 2**20
    server.get("/some/thing/else")
    assert b'path="other",status="404"' in server.get("/metrics").body


def test_the_prefix_cache_is_counted(server: Running) -> None:
    prompt = "The index of a table is a structure that " * 30
    before = server.metric("quantflow_prefix_cache_hit_tokens_total")
    server.complete(prompt=prompt)
    usage = server.complete(prompt=prompt).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 128
    assert server.metric("quantflow_prefix_cache_hit_tokens_total") - before >= 128


def test_a_stream_that_has_nothing_to_show_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens come, but all their text is held back, as a tool call's is."""
    monkeypatch.setattr(ChatShape, "more", lambda self, text, tokens: [])
    with serving(config=ServerConfig(port=0, keep_alive_s=0.05)) as running:
        body = running.chat(stream=True, max_tokens=300, ignore_eos=True).body
        assert body.count(b": keep-alive\n\n") >= 3


@pytest.mark.parametrize("fails", [False, True])
def test_an_api_whose_events_have_types(
    monkeypatch: pytest.MonkeyPatch, server: Running, fails: bool
) -> None:
    """Each type stands in a line of its own, nothing follows the last event, and an error in the
    middle is an event of that API."""
    told = list[str]()

    def more(self: ChatShape, text: int, tokens: Any) -> Any:
        if fails and told:
            raise Refused(504, "too slow", code="timeout")
        told.append("more")
        return [{"type": "more"}]

    monkeypatch.setattr(ChatShape, "typed", True)
    monkeypatch.setattr(ChatShape, "start", lambda self: [{"type": "begun"}])
    monkeypatch.setattr(ChatShape, "more", more)
    monkeypatch.setattr(
        ChatShape, "end", lambda self, usage: [{"type": "ended", "tokens": usage.completion}]
    )
    monkeypatch.setattr(
        ChatShape, "failed", lambda self, error: [{"type": "failed", "code": error.code}]
    )
    answer = server.chat(stream=True, max_tokens=300 if fails else 3, ignore_eos=True)
    events = [line.splitlines() for line in answer.body.decode().split("\n\n") if line]
    assert all(
        json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")
        for name, data in events
    )
    assert answer.events[0] == {"type": "begun"} and {"type": "more"} in answer.events
    assert answer.events[-1] == (
        {"type": "failed", "code": "timeout"} if fails else {"type": "ended", "tokens": 3}
    )


def test_prompts_of_one_request_begin_together(server: Running) -> None:
    engine, seen = server.service.llm.engine, list[int]()
    schedule = engine.scheduler.schedule
    engine.scheduler.schedule = lambda: [
        seen.append(len(list(engine.scheduler.sequences()))),
        schedule(),
    ][1]  # type: ignore
    try:
        server.complete(prompt=["a", "b", "c", "d"], max_tokens=3, ignore_eos=True)
    finally:
        engine.scheduler.schedule = schedule  # type: ignore[method-assign]
    assert seen[:2] in ([4, 4], [1, 4], [2, 4], [3, 4])


def test_a_draining_server_takes_nothing_new() -> None:
    admin = "key-of-an-admin-01"
    with (
        serving(config=ServerConfig(port=0, admin_keys=(admin,))) as running,
        running.socket() as connection,
    ):
        connection.sendall(request({**LONG, "stream": True}))
        assert until(lambda: running.service.inside == 1)
        assert running.post("/admin/drain", {}, authorization=f"Bearer {admin}").json == {
            "done": "draining: 1 texts are left"
        }
        answer = running.complete()
        assert (answer.status, answer.error["code"], answer.headers["connection"]) == (
            503,
            "shutting_down",
            "close",
        )
        assert running.post("/tokenize", {"prompt": "x"}).status == 503
        assert (running.get("/health").status, running.get("/health").json) == (
            503,
            {"status": "draining"},
        )
        assert running.service.llm.engine.occupancy().running == 1  # what runs is finished


def test_a_dead_engine_is_told_to_everybody() -> None:
    with serving() as running:
        engine = running.service.llm.engine
        answers: list[Any] = []

        def ask(stream: bool) -> None:
            answers.append(running.complete(**LONG, stream=stream))

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        assert until(lambda: engine.occupancy().running == 2)
        engine.step = None  # type: ignore[method-assign, assignment]
        for thread in threads:
            thread.join(60)
        whole, stream = sorted(answers, key=lambda a: a.status, reverse=True)
        assert (whole.status, whole.error["code"]) == (503, "engine_stopped")
        assert stream.status == 200 and stream.events[-1]["error"]["code"] == "engine_stopped"
        assert "NoneType" not in str(whole.body + stream.body)
        health = running.get("/health")
        assert (health.status, health.json) == (503, {"status": "stopped"})
        assert running.complete().status == 503 and running.get("/metrics").status == 200


def test_a_stalled_engine_is_unhealthy_within_five_seconds() -> None:
    with serving() as running:
        assert running.get("/health").json == {"status": "ok"}
        release = threading.Event()
        running.service.llm.call(lambda engine: release.wait(60))
        assert ServerConfig.stall_s < 5 and until(lambda: running.get("/health").status == 503, 30)
        assert running.get("/health").json == {"status": "stalled"}
        release.set()
        assert until(lambda: running.get("/health").status == 200)


def test_a_long_step_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is counted in layers, of which there are eight: a prompt of many seconds is none."""
    slow_mlp = Model._mlp

    def slow(*arguments: Any) -> Any:
        time.sleep(0.25)
        return slow_mlp(*arguments)

    with serving(config=ServerConfig(port=0, stall_s=1.5)) as running:
        monkeypatch.setattr(Model, "_mlp", slow)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(running.complete, max_tokens=1)
            while not answer.done():
                assert running.get("/health").status == 200
                time.sleep(0.05)
            assert answer.result().status == 200


def test_why_a_text_could_not_be_finished_is_in_the_log_alone(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner = server.service.llm.engine.runner
    run, failed = runner.run, list[int]()

    def once(step: Any) -> Any:
        if not failed:
            failed.append(1)
            raise MemoryError
        return run(step)

    monkeypatch.setattr(runner, "run", once)
    answer = server.complete()
    assert (answer.status, answer.error["code"]) == (
        500,
        "failed",
    ) and "memory" not in answer.error["message"]
    assert [
        r.levelname
        for r in caplog.records
        if "out of memory" in r.getMessage() and r.name.endswith("answer")
    ] == ["ERROR"]
    assert server.complete().status == 200 and until(lambda: idle(server))
