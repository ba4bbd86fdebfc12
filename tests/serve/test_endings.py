"""Every way in which a request can end leaves nothing behind: no text that runs or waits, no block,
no place in the house, no task.

The application is driven without a network, so that a fault can be put at any one await of a
request's tasks.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Coroutine, Generator, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect

from quantflow.engine.async_llm import AsyncLLM
from quantflow.engine.engine import Engine
from quantflow.errors import Problem, RequestError
from quantflow.serve import answer
from quantflow.serve.app import create_app
from quantflow.serve.config import ServerConfig
from quantflow.serve.service import Service
from tests.helpers.serving import DEMO, Running

ADMIN = "key-of-an-admin-01"


@dataclass
class Fault:
    """Thrown in place of the `at`-th return to one of a request's tasks, of all of them together;
    0: never."""

    error: BaseException
    at: int = 0
    seen: int = 0

    @property
    def struck(self) -> bool:
        return 0 < self.at <= self.seen


FAULT: ContextVar[Fault | None] = ContextVar("fault", default=None)


class Faulty(Coroutine[Any, Any, Any]):
    def __init__(self, inner: Coroutine[Any, Any, Any], fault: Fault) -> None:
        self.inner, self.fault = inner, fault

    def send(self, value: Any) -> Any:
        self.fault.seen += 1
        if self.fault.seen == self.fault.at:
            return self.inner.throw(self.fault.error)
        return self.inner.send(value)

    def throw(self, *error: Any) -> Any:
        return self.inner.throw(*error)

    def close(self) -> None:
        self.inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield from self.inner.__await__())


def factory(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **options: Any
) -> asyncio.Task[Any]:
    fault = FAULT.get()
    return asyncio.Task(Faulty(work, fault) if fault else work, loop=loop, **options)


@dataclass
class Client:
    """Sends a body, and goes away once it has been told `patience` things; it stops reading an
    answer after `appetite` of them. An error is short: connections take it without being read."""

    body: bytes
    patience: int = 10**6
    appetite: int = 10**6
    told: list[Any] = field(default_factory=list)
    asked: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def receive(self) -> Any:
        if not self.asked:
            self.asked = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        fine = message.get("status", self.status) == 200
        if fine and len(self.told) >= self.appetite:
            await self.gone.wait()
        self.told.append(message)
        if len(self.told) >= self.patience:
            self.gone.set()

    @property
    def status(self) -> int:
        return self.told[0]["status"] if self.told else 0

    @property
    def text(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.told)


class House:
    """The application, in a loop of its own."""

    def __init__(self, **options: Any) -> None:
        self.runner = asyncio.Runner()
        self.runner.get_loop().set_task_factory(factory)
        self.llm = AsyncLLM(
            DEMO,
            device="cpu",
            **{"cache_bytes": 2**25, "max_batch_size": 4, "check": True, **options},
        )
        self.service = Service(
            self.llm, ServerConfig(port=0, max_queue=12, admin_keys=(ADMIN,)), "demo"
        )
        self.app = create_app(self.service)

    def close(self) -> None:
        self.llm.close()
        self.service.close()
        self.runner.close()

    async def ask(self, path: str, client: Client, fault: Fault | None = None) -> Client:
        """As uvicorn does it: in a task of its own, whose errors are logged."""
        headers = [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"authorization", f"Bearer {ADMIN}".encode()),
        ]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "",
            "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2), "state": {},
        }  # fmt: skip
        token = FAULT.set(fault)
        task = asyncio.ensure_future(self.app(scope, client.receive, client.send))
        FAULT.reset(token)
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        client.gone.set()
        return client

    async def post(self, path: str, body: Any) -> Client:
        return await self.ask(path, Client(json.dumps(body).encode()))

    async def check(self) -> None:
        """That nothing is left: calls of the engine's thread are done in their order, so that those
        that give back have been."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            _, late = await asyncio.wait(others, timeout=60)
            assert not late
        assert (await self.post("/admin/sessions/end", {})).status == 200
        found = await asyncio.wrap_future(self.llm.call(books))
        assert found == {
            "requests": 0,
            "running": 0,
            "waiting": 0,
            "blocks": 0,
            "sessions": 0,
            "problems": [],
        }
        assert self.service.inside == 0 and not self.llm._streams


def books(engine: Engine) -> dict[str, Any]:
    now = engine.occupancy()
    return {
        "requests": len(engine._requests),
        "running": now.running,
        "waiting": now.waiting,
        "blocks": now.used_blocks,
        "sessions": now.sessions,
        "problems": engine.problems(),
    }


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer, "LAST_WORDS_S", 0.2)
        found = House()
        yield found
        found.close()


CHAT = {
    "messages": [{"role": "user", "content": "What is a table?"}],
    "temperature": 0,
    "max_tokens": 3,
}
TURN = {
    "prompt": "What is a table?",
    "session_id": 7,
    "interactive_mode": True,
    "request_output_len": 3,
    "ignore_eos": True,
}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "several prompts": (
        "/v1/completions",
        {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 3, "ignore_eos": True, "stream": True},
    ),
    "the best of three": (
        "/v1/completions",
        {"prompt": ["a", "b"], "n": 1, "best_of": 3, "max_tokens": 3},
    ),
    "a chat": ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}),
    "a streamed chat": ("/v1/chat/completions", CHAT | {"stream": True, "n": 2}),
    "a turn": ("/v1/chat/interactive", TURN),
    "a streamed turn": ("/v1/chat/interactive", TURN | {"stream": True}),
    "one bad of several": ("/v1/completions", {"prompt": [[5], [6], [10**6]], "max_tokens": 3}),
}
ERRORS = {
    "cancelled": asyncio.CancelledError(), "a bug": RuntimeError("a bug"),
    "gone": ClientDisconnect(), "refused": RequestError(Problem("prompt", "bad")),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_fault_at_any_await(
    house: House, way: tuple[str, dict[str, Any]], error: BaseException
) -> None:
    path, body = way

    async def run() -> int:
        for at in itertools.count(1):
            fault = Fault(error, at)
            await house.ask(path, Client(json.dumps(body).encode()), fault)
            if path == "/v1/chat/interactive":  # the session is free again
                assert (await house.post(path, TURN)).status == 200
            await house.check()
            if not fault.struck:
                return at
        raise AssertionError

    assert house.runner.run(run()) > 5


@dataclass(frozen=True)
class Plan:
    """A request and how it ends. fault: which of ERRORS, and at which await."""

    way: str
    patience: int
    appetite: int
    fault: tuple[str, int]
    more: dict[str, Any]


plans = st.builds(
    Plan,
    st.sampled_from(sorted(WAYS)),
    st.sampled_from([10**6, 10**6, 1, 2, 3, 4]),
    st.sampled_from([10**6, 10**6, 10**6, 0, 1, 3]),
    st.tuples(st.sampled_from(sorted(ERRORS)), st.sampled_from([0, 0, *range(1, 30)])),
    st.sampled_from(
        [
            {},
            {"stream": True},
            {"n": 3, "best_of": 3},
            {"max_tokens": 40, "ignore_eos": True},
            {"max_tokens": 0},
        ]
    ),
)


# Endings are a matter of moments, which a shrunk example does not bring back.
@settings(
    max_examples=50,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(plans, min_size=1, max_size=6),
    st.sampled_from([None, None, "expires", "drains", "sessions end"]),
    st.sampled_from([0.0, 0.002, 0.02]),
    st.sampled_from([0.01, 0.1, 0.3]),
)
def test_many_that_end_as_they_may(
    house: House, several: list[Plan], event: str | None, after_s: float, limit_s: float
) -> None:
    service, config = house.service, house.service.config

    async def ask(plan: Plan) -> Client:
        path, body = WAYS[plan.way]
        # What a route does not know is refused, which is an ending too.
        client = Client(json.dumps(body | plan.more).encode(), plan.patience, plan.appetite)
        name, at = plan.fault
        return await house.ask(path, client, Fault(ERRORS[name], at) if at else None)

    async def happen() -> None:
        await asyncio.sleep(after_s)
        if event == "expires":
            service.expired.set()
        elif event == "drains":
            service.draining = True
        elif event == "sessions end":
            await house.post("/admin/sessions/end", {})

    async def run() -> None:
        service.config = replace(config, request_timeout_s=limit_s)
        asked = [asyncio.create_task(ask(plan)) for plan in several]
        async with asyncio.timeout(120):
            await asyncio.gather(happen(), *asked)
        service.config, service.draining = config, False
        service.expired.clear()
        await house.check()
        # and it serves on
        assert (await house.post("/v1/completions", {"prompt": "a", "max_tokens": 1})).status == 200

    try:
        house.runner.run(run())
    finally:
        service.config, service.draining = config, False


def test_a_submission_that_fails_half_way_takes_the_others_out(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, count = Engine._queue, itertools.count()

    def failing(engine: Engine, checked: Any) -> Any:
        if next(count) == 2:
            raise MemoryError
        return queue(engine, checked)

    monkeypatch.setattr(Engine, "_queue", failing)

    async def run() -> None:
        await house.post("/v1/completions", {"prompt": ["a", "b", "c", "d"], "max_tokens": 3})
        await house.check()

    house.runner.run(run())


def test_a_turn_cut_off_while_it_begins_does_not_hold_the_session_up(house: House) -> None:
    """Its end is in the engine's queue before the next turn is."""

    async def run() -> None:
        assert (await house.post("/v1/chat/interactive", TURN)).status == 200
        for wait_s in (0.0, 0.005, 0.01, 0.02, 0.03):
            busy = house.llm.call(lambda engine: asyncio.run(asyncio.sleep(0.05)))
            client = Client(json.dumps(TURN).encode())
            asked = asyncio.create_task(house.ask("/v1/chat/interactive", client))
            await asyncio.sleep(wait_s)
            client.gone.set()
            await asked
            assert (await house.post("/v1/chat/interactive", TURN)).status == 200
            await asyncio.wrap_future(busy)
        await house.check()

    house.runner.run(run())


@pytest.mark.parametrize(("when", "after"), [("submit_all", 1), ("step", 0), ("step", 2)])
def test_an_engine_that_dies_answers_everybody(when: str, after: int) -> None:
    """In a call it is the caller's error, in a step the engine's end."""
    house = House(check=False)
    work, count = getattr(house.llm.engine, when), itertools.count()

    def dying(*arguments: Any) -> Any:
        if next(count) >= after:
            raise RuntimeError("shapes do not match")
        return work(*arguments)

    setattr(house.llm.engine, when, dying)

    async def run() -> list[Client]:
        async with asyncio.timeout(120):
            found = await asyncio.gather(*(house.post(*way) for way in WAYS.values()))
        await asyncio.sleep(0)
        assert house.service.inside == 0
        assert not asyncio.all_tasks() - {asyncio.current_task()}
        return list(found)

    try:
        for client in house.runner.run(run()):
            assert client.told and client.status >= 200 and b"shapes" not in client.text
    finally:
        house.close()


def test_one_bad_prompt_of_many(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of its siblings runs, and all that is wrong with any is said."""
    engine, steps = server.service.llm.engine, list[int]()
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: [steps.append(1), step()][1])
    for stream in (False, True):
        prompts = [[5, 6]] * 125 + [[10**6]]
        refused = server.complete(prompt=prompts, max_tokens=20, stream=stream)
        assert (refused.status, refused.error["param"], refused.error["code"]) == (
            400,
            "prompt[125]",
            "invalid_value",
        )
        long = server.complete(
            prompt=[[5], [5] * 5000, [5], [6] * 6000], max_tokens=20, stream=stream
        )
        assert (long.status, long.error["param"], long.error["code"]) == (
            400,
            "prompt[1]",
            "context_length_exceeded",
        )
        assert "prompt[3]: 6000 tokens" in long.error["message"]
        found = server.service.llm.call(books).result(10)
        assert not steps and (
            found["requests"],
            found["waiting"],
            found["blocks"],
            server.service.inside,
        ) == (0, 0, 0, 0)
