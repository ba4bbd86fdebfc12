"""The doors that generate nothing: who goes away, or waits too long, leaves nothing behind there
either."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from quantflow.engine.long_text import UNWANTED
from quantflow.serve.config import ServerConfig
from quantflow.serve.service import Service, _done
from tests.helpers.serving import Running, request, serving, until

SAID = [{"role": "user", "content": "What is a table?"}]
DOORS: dict[str, Any] = {
    "/tokenize": {"prompt": "The table"},
    "/detokenize": {"tokens": [5, 6]},
    "/v1/encode": {"input": "The table"},
    "/v1/messages/count_tokens": {"model": "demo_model", "messages": SAID},
    "/v1/responses/input_tokens": {"model": "demo_model", "input": "The table"},
}


class Slow:
    """In place of what tokenises: as a process that answers late, and is ended once nobody waits
    for it."""

    def __init__(self) -> None:
        self.begun, self.given_up = 0, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.begun += 1
        unwanted = UNWANTED.get()
        assert unwanted is not None
        self.given_up += unwanted.wait(60)
        raise AssertionError("nobody reads this")


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving() as found:
        found.service.text.warm()
        yield found


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    found = Slow()
    for name in ("_encoded", "decode"):
        monkeypatch.setattr(Service, name, lambda self, *a, **k: found(*a, **k))
    return found


@pytest.mark.parametrize("path", DOORS)
def test_who_goes_away_leaves_nothing_behind(running: Running, slow: Slow, path: str) -> None:
    with running.socket() as first:
        first.sendall(request(DOORS[path], path))
        assert until(lambda: slow.begun == 1)
        with running.socket() as second:  # it waits in line for the one thread that there is
            second.sendall(request(DOORS[path], path))
            assert until(lambda: running.service.inside == 2)
        assert until(lambda: running.service.inside == 1)
    assert until(lambda: running.service.inside == 0 and slow.given_up == 1)
    # the second never began
    assert running.service._asides.submit(lambda: slow.begun).result(60) == 1


@pytest.mark.parametrize("path", DOORS)
def test_what_takes_too_long_is_said(slow: Slow, path: str) -> None:
    with serving(config=ServerConfig(port=0, request_timeout_s=0.2)) as running:
        running.service.text.warm()
        answer = running.post(path, DOORS[path])
        assert answer.status == 504 and "more than 0.2 s" in answer.error["message"]
        assert until(lambda: running.service.inside == 0 and slow.given_up == slow.begun)


def test_what_waits_in_line_is_not_kept_for_who_has_gone() -> None:
    """A line may be long, and what waits in it large."""

    class Large:
        def __call__(self) -> None:
            raise AssertionError("nobody waits for it")

    async def leave(pool: ThreadPoolExecutor) -> weakref.ref[Large]:
        work = Large()
        waiting, seen = asyncio.ensure_future(_done(pool, work)), weakref.ref(work)
        del work
        await asyncio.sleep(0)
        assert seen() is not None
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return seen

    free = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(free.wait, 60)
        try:
            seen = asyncio.run(leave(pool))
            gc.collect()
            assert seen() is None and not free.is_set()
        finally:
            free.set()
