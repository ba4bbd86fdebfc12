"""The web pages, in a browser and against a real server: what people see and do, and what a page must never do."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]

MODEL = Path(__file__).parents[2] / "calib_data" / "demo_model"
KEY = "a-key-that-no-storage-may-have"
ARGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run".split()
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}
QUESTION = "How do I create an index in SQLite?"  # greedily, the model goes on about it until its context is full
CHAT = "**/v1/chat/completions"


class Server:
    """`quantflow serve` as a process. It is not ready before `wait`."""

    def __init__(self, log: Path, *, port: int = 0, key: str = "") -> None:
        self._log = log
        command = f"serve {MODEL} --port {port} --max-batch-size 4 --cache-max-entry-count 0.02"
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "quantflow.cli.main", *command.split()],
                env={**os.environ, "QUANTFLOW_API_KEY": key}, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.address = ""

    def wait(self) -> Server:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            found = re.search(r"^ready: (http://127\.0\.0\.1:\d+) serves", self._log.read_text(), re.M)
            if found:
                self.address = found[1]
                return self
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"not ready: {self._log.read_text()}")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=10) as answer:
            (line,) = (line for line in answer.read().decode().splitlines() if line.startswith(f"{name} "))
        return float(line.split()[1])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """One that is open to all, one that wants a key. They start at the same time."""
    folder = tmp_path_factory.mktemp("servers")
    with Server(folder / "open.log") as first, Server(folder / "keyed.log", key=KEY) as second:
        yield first.wait(), second.wait()


@pytest.fixture(scope="module")
def server(servers: tuple[Server, Server]) -> Server:
    return servers[0]


@pytest.fixture(scope="module")
def keyed(servers: tuple[Server, Server]) -> Server:
    return servers[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@contextmanager
def visit(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """A page in a browser that has been nowhere yet. `page.faults` lists what went wrong in it, `page.places` where it went."""
    context = browser.new_context(**{"viewport": WIDE, **options})
    context.set_default_timeout(20_000)
    context.add_init_script("addEventListener('securitypolicyviolation', (e) => console.error(`policy: ${e.violatedDirective}`))")
    page = context.new_page()
    page.faults, page.places = [], []
    page.on("console", lambda message: message.type in ("error", "warning") and page.faults.append(message.text))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda request: page.places.append(request.url))
    try:
        page.goto(address)
        yield page
    finally:
        context.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The chat page of the open server. Whatever a test does with it, nothing may go wrong and nothing may leave the server."""
    with visit(browser, server.address) as page:
        yield page
        assert page.faults == []
        assert [place for place in page.places if not place.startswith((server.address, "data:"))] == []


Change = Callable[..., Any]


def settings(page: Any, **values: object) -> None:
    page.click("#settings-toggle")
    for name, value in values.items():
        page.fill(f"#{name}", str(value))
    page.click("#settings-close")


def ask(page: Any, text: str, *, wait: bool = True) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    if wait:
        done(page)


def done(page: Any) -> None:
    page.wait_for_selector("#send:visible")


def last(page: Any) -> str:
    return page.locator(".answer .body").last.inner_text()


def writing(page: Any, letters: int) -> None:
    """Waits until an answer is that long, and not complete."""
    page.wait_for_function("(n) => document.querySelector('.answer.running .body')?.textContent.length >= n", arg=letters)


def events(*texts: str, error: str | None = None) -> str:
    """A stream as a server sends it, comments and all."""
    chunks: list[object] = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    if error:
        chunks.append({"error": {"message": error, "type": "server_error", "param": None, "code": "failed"}})
    else:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        chunks.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(texts), "total_tokens": 7 + len(texts)}})
    data = ": keep-alive\r\n\r\n" + "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return data if error else data + "data: [DONE]\n\n"


def answers(page: Any, body: str, status: int = 200) -> list[Any]:
    """Lets every question be answered so. What was asked is in the list."""
    asked: list[Any] = []

    def fulfil(route: Any) -> None:
        asked.append(route.request.post_data_json)
        kind = "text/event-stream" if status == 200 else "application/json"
        route.fulfill(status=status, body=body, headers={"content-type": kind})

    page.unroute_all()
    page.route(CHAT, fulfil)
    return asked


def stored(page: Any) -> str:
    """All that the browser keeps of the page."""
    return page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")


# Questions and answers


def test__an_answer_is_shown_while_it_is_written(page: Any) -> None:
    settings(page, temperature=0, max_tokens=300)
    ask(page, QUESTION, wait=False)
    lengths = set()
    while not page.is_visible("#send"):
        lengths.add(len(last(page)) if page.locator(".answer").count() else 0)
    assert len(lengths) >= 5, "it arrived in one piece"
    assert page.locator(".question").inner_text().startswith(QUESTION)
    stats = page.inner_text(".stats")
    assert re.match(r"300 tokens · \d+\.\d tokens/s · first token after \d+(\.\d)? m?s · prompt of 21", stats), stats
    assert "ended at the token limit" in stats
    assert len(last(page)) == max(*lengths, len(last(page)))


@pytest.mark.parametrize("how", ["button", "Escape"])
def test__stop_keeps_what_is_there_and_frees_the_engine(page: Any, server: Server, how: str) -> None:
    before = server.metric("quantflow_generated_tokens_total")
    settings(page, temperature=0)
    ask(page, QUESTION, wait=False)
    writing(page, 200)
    assert server.metric("quantflow_sequences_running") == 1
    if how == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    done(page)
    text = last(page)
    until = time.monotonic() + 5
    while server.metric("quantflow_sequences_running") and time.monotonic() < until:
        time.sleep(0.02)
    assert server.metric("quantflow_sequences_running") == 0
    assert server.metric("quantflow_generated_tokens_total") - before < 900  # uncut: 1003
    assert len(text) >= 200 and last(page) == text
    assert "stopped" in page.inner_text(".stats")
    assert page.evaluate("document.activeElement.id") == "prompt"


def test__regenerate_replaces_the_last_answer(page: Any) -> None:
    settings(page, temperature=1, max_tokens=40)
    ask(page, "What is a cursor?")
    ask(page, "And a transaction?")
    first, second = page.locator(".answer .body").all_inner_texts()
    page.click("text=Regenerate")
    done(page)
    again = page.locator(".answer .body").all_inner_texts()
    assert again[0] == first and again[1] != second and len(again) == 2
    assert page.locator("text=Regenerate").locator("visible=true").count() == 1  # of the last one only


def test__an_answer_that_cannot_be_written_anew_stays(browser: Any, server: Server) -> None:
    with visit(browser, server.address) as page:
        answers(page, events("The first answer."))
        ask(page, "Hello")
        answers(page,, '{"error": {"message": "the queue is full", "code": "queue_full"}}', 429) if False else answers(
            page, '{"error": {"message": "the queue is full", "code": "queue_full"}}', 429
        )
        page.click("text=Regenerate")
        page.wait_for_selector("[role=alert] >> text=the queue is full")
        assert last(page) == "The first answer."


def test__edit_takes_the_last_question_back(page: Any) -> None:
    answers(page, events("An answer."))
    ask(page, "First")
    ask(page,, "Second") if False else ask(page, "Second")
    page.locator("text=Edit").locator("visible=true").click()
    assert page.input_value("#prompt") == "Second"
    assert page.locator(".question .body").all_inner_texts() == ["First"]
    assert page.locator(".answer").count() == 1
