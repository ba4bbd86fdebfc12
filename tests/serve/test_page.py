"""The web pages, in a browser and against real servers: what people see and do, and what a page
must never do."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]

ROOT = Path(__file__).parents[2]
KEY = "a-key-that-no-storage-may-have"
ARGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    " --disable-sync --no-first-run".split()
)
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}
# greedily, the model writes about it until its context of 1024 is full
QUESTION = "How do I create an index in SQLite?"
CHAT = "**/v1/chat/completions"


class Server:
    """`quantflow serve` as a process, which is ready after `wait`."""

    def __init__(self, log: Path, *, port: int = 0, key: str = "") -> None:
        self._log, self.address = log, ""
        options = f"--port {port} --max-batch-size 4 --cache-max-entry-count 0.02"
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "quantflow.cli.main",
                    "serve",
                    "calib_data/demo_model",
                    *options.split(),
                ],
                cwd=ROOT,
                stdout=out,
                stderr=out,
                env={
                    **os.environ,
                    "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
                    "QUANTFLOW_API_KEY": key,
                },
            )

    def wait(self) -> Server:
        until = time.monotonic() + 120
        while time.monotonic() < until and self._process.poll() is None:
            found = re.search(
                r"^ready: (http://127\.0\.0\.1:\d+) serves", self._log.read_text(), re.M
            )
            if found:
                self.address = found[1]
                return self
            time.sleep(0.05)
        raise AssertionError(self._log.read_text())

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=60) as answer:
            (line,) = (
                line for line in answer.read().decode().splitlines() if line.startswith(f"{name} ")
            )
        return float(line.split()[1])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """One that is open to all, and one that wants a key. They start at the same time."""
    folder = tmp_path_factory.mktemp("servers")
    with Server(folder / "open.log") as first, Server(folder / "keyed.log", key=KEY) as second:
        yield first.wait(), second.wait()


@pytest.fixture(scope="module")
def open_server(servers: tuple[Server, Server]) -> Server:
    return servers[0]


@pytest.fixture(scope="module")
def keyed_server(servers: tuple[Server, Server]) -> Server:
    return servers[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@contextmanager
def visit(browser: Any, address: str, before: str = "", **options: Any) -> Iterator[Any]:
    """A page, in a browser that has been nowhere yet. before: a script that runs first.
    `page.faults`: what went wrong in it; `page.places`: where its requests went."""
    context = browser.new_context(**{"viewport": WIDE, **options})
    context.set_default_timeout(60_000)
    context.add_init_script(
        "addEventListener('securitypolicyviolation', (e) => console.error(`policy:"
        " ${e.violatedDirective}`));" + before
    )
    page = context.new_page()
    page.faults, page.places = [], []
    page.on(
        "console",
        lambda message: message.type in ("error", "warning") and page.faults.append(message.text),
    )
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda request: page.places.append(request.url))
    try:
        page.goto(address)
        yield page
    finally:
        context.close()


@pytest.fixture
def page(browser: Any, open_server: Server) -> Iterator[Any]:
    """The chat page. Whatever a test does with it, nothing may go wrong in it, and no request may
    leave the server it came from."""
    with visit(browser, open_server.address) as page:
        yield page
        assert page.faults == []
        assert {
            place for place in page.places if not place.startswith(f"{open_server.address}/")
        } == set()


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
    """Waits until an answer is that long, and goes on."""
    page.wait_for_function(
        "(n) => document.querySelector('.answer.running .body')?.textContent.length >= n",
        arg=letters,
    )


def press(page: Any, text: str) -> None:
    """A button of which there may be hidden ones."""
    page.locator("button:visible", has_text=text).first.click()


def alert(page: Any, text: str) -> None:
    page.wait_for_selector(f"[role=alert] >> text={text}")


def tool(page: Any, name: str, title: str) -> None:
    """A button beside a session, where the mouse brings it up."""
    page.hover(f"#sessions .title >> text={title}")
    page.click(f"[aria-label='{name} “{title}”']")


def stored(page: Any) -> str:
    """All that the browser keeps of the page."""
    return page.evaluate(
        "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
    )


def stream(*texts: str, error: str | None = None) -> str:
    """An answer as a server sends it, comments and all. error: of which it dies after its texts."""
    chunks: list[object] = [
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
        for text in texts
    ]
    if error:
        chunks.append(
            {"error": {"message": error, "type": "server_error", "param": None, "code": "failed"}}
        )
    else:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        chunks.append(
            {
                "choices": [],
                "usage": {
                    "prompt_tokens": 7,
                    "completion_tokens": len(texts),
                    "total_tokens": 7 + len(texts),
                },
            }
        )
    body = ": keep-alive\n\n" + "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return body if error else body + "data: [DONE]\n\n"


def refusal(message: str, code: str, param: str | None = None) -> str:
    return json.dumps(
        {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": param,
                "code": code,
            }
        }
    )


def answer_with(page: Any, body: str, status: int = 200) -> list[Any]:
    """Answers all questions so, in the server's place. What was asked is in the list."""
    asked: list[Any] = []

    def fulfil(route: Any) -> None:
        asked.append(route.request.post_data_json)
        kind = "text/event-stream" if status == 200 else "application/json"
        route.fulfill(status=status, body=body, headers={"content-type": kind})

    page.unroute_all()
    page.route(CHAT, fulfil)
    return asked


# Questions and answers


def test_an_answer_is_shown_while_it_is_written(page: Any) -> None:
    settings(page, temperature=0, max_tokens=300)
    ask(page, QUESTION, wait=False)
    lengths = set()
    while not page.is_visible("#send"):
        lengths.add(
            page.evaluate("document.querySelector('.answer .body')?.textContent.length ?? 0")
        )
    assert len(lengths) >= 5, "it came in one piece"
    assert len(last(page)) >= max(lengths) > 500
    assert page.inner_text(".question .body") == QUESTION
    stats = page.inner_text(".stats")
    assert re.match(
        r"300 tokens · \d+\.\d tokens/s · first token after [\d.]+ m?s · prompt of 21", stats
    ), stats
    assert stats.endswith("31% of the context · ended at the token limit")


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_keeps_what_is_there_and_frees_the_engine(
    page: Any, open_server: Server, how: str
) -> None:
    before = open_server.metric("quantflow_generated_tokens_total")
    settings(page, temperature=0)
    ask(page, QUESTION, wait=False)
    writing(page, 200)
    assert open_server.metric("quantflow_sequences_running") == 1
    if how == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    done(page)
    text = last(page)
    end = time.monotonic() + 60
    while open_server.metric("quantflow_sequences_running") and time.monotonic() < end:
        time.sleep(0.02)
    assert open_server.metric("quantflow_sequences_running") == 0
    assert open_server.metric("quantflow_generated_tokens_total") - before < 900, (
        "the whole answer is 1003"
    )
    assert len(text) >= 200 and last(page) == text
    assert page.inner_text(".stats").endswith("stopped")
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_regenerate_replaces_the_last_answer(page: Any) -> None:
    settings(page, temperature=1, max_tokens=40)
    ask(page, "What is a cursor?")
    ask(page, "And a transaction?")
    first, second = page.locator(".answer .body").all_inner_texts()
    press(page, "Regenerate")
    done(page)
    assert page.locator(".answer").count() == 2
    assert page.locator(".answer .body").first.inner_text() == first
    assert last(page) != second
    assert page.locator("button:visible", has_text="Regenerate").count() == 1, (
        "of the last answer only"
    )


def test_an_answer_stays_where_there_is_no_new_one(browser: Any, open_server: Server) -> None:
    with visit(browser, open_server.address) as page:
        answer_with(page, stream("The first answer."))
        ask(page, "Hello")
        answer_with(page, refusal("the queue is full", "queue_full"), 429)
        press(page, "Regenerate")
        alert(page, "the queue is full")
        assert last(page) == "The first answer."


def test_edit_takes_the_last_question_back(page: Any) -> None:
    answer_with(page, stream("An answer."))
    ask(page, "First")
    ask(page, "Second")
    press(page, "Edit")
    assert page.input_value("#prompt") == "Second"
    assert page.locator(".question .body").all_inner_texts() == ["First"]
    assert page.locator(".answer").count() == 1


def test_what_is_set_is_sent(page: Any) -> None:
    asked = answer_with(page, stream("Yes."))
    settings(
        page,
        system="Be short.",
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        max_tokens=9,
        repetition_penalty=1.1,
        seed=-3,
    )
    ask(page, "First")
    ask(page, "Second")
    assert asked[1] == {
        "model": "demo_model",
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "max_tokens": 9,
        "repetition_penalty": 1.1,
        "seed": -3,
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "First"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Second"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    page.click("#settings-toggle")
    page.click("#reset")
    page.fill("#temperature", "2.5")
    ask(page, "Third", wait=False)
    page.wait_for_selector("#temperature:focus:invalid")
    assert len(asked) == 2 and page.input_value("#prompt") == "Third"
    page.fill("#temperature", "")
    ask(page, "Third")
    assert set(asked[2]) == {"model", "messages", "stream", "stream_options"}


def test_an_answer_goes_on_beside_another_session(page: Any) -> None:
    settings(page, temperature=0, max_tokens=250)
    ask(page, QUESTION, wait=False)
    writing(page, 20)
    page.click("#new")
    page.wait_for_selector("#send:visible")
    ask(page, "What is a cursor?", wait=False)
    page.wait_for_selector("#stop:visible")
    page.click(f"#sessions .title >> text={QUESTION}")
    done(page)
    assert page.inner_text(".question .body") == QUESTION and page.inner_text(".stats").startswith(
        "250 tokens"
    )
    page.click("#sessions .title >> text=What is a cursor?")
    done(page)
    assert page.inner_text(".stats").startswith("250 tokens")


# What models write


def test_html_in_an_answer_is_text(page: Any) -> None:
    bad = "<img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script>"
    answer_with(
        page,
        stream(
            f"{bad} `{bad}` **{bad}** {bad}", f"\n\n```{bad}\n{bad}\n```\n[x](javascript:hacked=1)"
        ),
    )
    ask(page, bad)
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 1, "the page's own"
    assert page.locator("#log script, #log a, #sessions script").count() == 0
    assert page.inner_text(".question .body") == bad and bad[:20] in page.inner_text("#title")
    assert last(page).count("<script>") == 5  # a fence's first word is all of its language
    assert (
        page.locator(".answer strong").inner_text()
        == page.locator(".answer pre").inner_text()
        == bad
    )


def test_code_and_paragraphs_are_told_apart(page: Any) -> None:
    text = (
        "Use `x`.\nA line.\n\n```python\nif x:\n\n    y\n```\n\nf(**a, **b) is **so** 2 **"
        " 3\n\n~~~\nopen"
    )
    answer_with(page, stream(*text))  # letter by letter
    ask(page, "Hello")
    assert page.locator(".answer p").all_text_contents()[:2] == [
        "Use x.\nA line.",
        "f(**a, **b) is so 2 ** 3",
    ]
    assert page.locator(".answer pre").all_text_contents() == ["if x:\n\n    y", "open"]
    assert page.locator(".answer p code").all_text_contents() == ["x"]
    assert page.locator(".answer strong").all_text_contents() == ["so"]
    assert page.locator(".answer figcaption span").first.inner_text() == "python"


def test_copy_gives_what_the_model_wrote(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text = "**Bold**\n\n```\ncode\n```"
    answer_with(page, stream(text))
    ask(page, "Hello")
    page.locator(".answer .foot").get_by_text("Copy").click()
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == text
    page.click("text=Copy code")
    page.wait_for_function("async () => (await navigator.clipboard.readText()) === 'code'")


def test_events_may_arrive_in_any_pieces(page: Any) -> None:
    text = (
        ': hello\n\ndata: {"a": "é☃😀"}\n\ndata:b\r\ndata: c\r\n\r\nid: 3\nretry: 5\n\n\ndata:'
        " [DONE]\n\ndata: unfinished"
    )
    found = page.evaluate(
        """async ([text, size]) => {
            const { events } = await import('/api.js');
            const bytes = new TextEncoder().encode(text);
            const body = new ReadableStream({
                start(controller) {
                    for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
                    controller.close();
                },
            });
            const found = [];
            for await (const data of events(body)) found.push(data);
            return found;
        }""",
        [text, 1],
    )
    assert found == ['{"a": "é☃😀"}', "b\nc", "[DONE]"]


# Sessions


def test_sessions_survive_a_reload(page: Any) -> None:
    answer_with(page, stream("An answer."))
    for question in ("One", "Two", "Three"):
        ask(page, question)
        page.click("#new")
    tool(page, "Rename", "Two")
    page.keyboard.type("Second")
    page.keyboard.press("Enter")
    assert page.locator("#sessions input").count() == 0
    assert page.evaluate("document.activeElement.ariaLabel") == "Rename “Second”"
    tool(page, "Rename", "One")
    page.keyboard.type("Nothing of this")
    page.keyboard.press("Escape")
    tool(page, "Delete", "Three")
    page.click("dialog >> text=Cancel")
    assert page.locator("#sessions li").count() == 3
    tool(page, "Delete", "Three")
    page.click("dialog >> button[type=submit]")
    page.click("#sessions .title >> text=Second")
    page.fill("#prompt", "A draft")
    page.reload()
    assert page.locator("#sessions .title").all_inner_texts() == ["Second", "One"]
    assert (
        page.inner_text("#title") == "Second"
        and page.inner_text(".question .body") == "Two"
        and last(page) == "An answer."
    )
    assert page.input_value("#prompt") == "A draft"


def test_another_tab_sees_the_sessions(page: Any) -> None:
    answer_with(page, stream("An answer."))
    other = page.context.new_page()
    other.goto(page.url)
    ask(page, "From the first tab")
    other.wait_for_selector("#sessions .title >> text=From the first tab")
    assert other.locator(".question").count() == 0, "a tab shows its own session"


def test_a_storage_that_is_corrupt_is_survived(browser: Any, open_server: Server) -> None:
    entries = {
        "a": "{",
        "b": "null",
        "c": '{"id": "c", "title": "C", "messages": [{"role": "user"}]}',
        "d": "[]",
    }
    said = [
        {"role": "assistant", "content": "Well", "stats": {"rate": "x"}},
        {"role": "user", "content": "Hello"},
    ]
    odd = {
        "id": "e",
        "title": "Odd",
        "updated": "x",
        "messages": said,
        "settings": {"system": 5, "temperature": "hot"},
    }
    fill = f"const found = {json.dumps({**entries, 'e': json.dumps(odd)})};"
    fill += (
        "for (const [id, text] of Object.entries(found))"
        " localStorage.setItem(`quantflow.session.${id}`, text);"
    )
    with visit(
        browser, open_server.address, fill + "localStorage.setItem('quantflow.theme', '{')"
    ) as page:
        assert page.locator("#sessions .title").all_inner_texts() == ["Odd"]
        page.click("#sessions .title")
        answer_with(page, stream("An answer."))
        press(page, "Retry")  # what was asked has no answer yet
        done(page)
        assert last(page) == "An answer." and page.faults == []


@pytest.mark.parametrize(
    "broken",
    [
        (
            "Storage.prototype.setItem = () => { throw new DOMException('full',"
            " 'QuotaExceededError') };"
        ),
        (
            "for (const name of ['localStorage', 'sessionStorage'])  Object.defineProperty(window,"
            " name, { get() { throw new DOMException('denied', 'SecurityError') } });"
        ),
    ],
    ids=["full", "denied"],
)
def test_a_storage_that_takes_nothing_is_survived(
    browser: Any, open_server: Server, broken: str
) -> None:
    with visit(browser, open_server.address, broken) as page:
        answer_with(page, stream("An answer."))
        ask(page, "Hello")
        alert(page, "storage is full, or denied")
        assert last(page) == "An answer." and page.locator(
            "#sessions .title"
        ).all_inner_texts() == ["Hello"]
        press(page, "Dismiss")
        page.click("#theme")
        assert page.inner_text("#notice") == "" and page.faults == []


# The server


def test_the_key_is_asked_for_and_stored_nowhere(browser: Any, keyed_server: Server) -> None:
    with visit(browser, keyed_server.address) as page:
        page.fill("dialog #key", "not-the-key-of-this-server")
        page.press("dialog #key", "Enter")
        page.wait_for_selector("dialog >> text=not one of this server")
        page.fill("dialog #key", KEY)
        page.press("dialog #key", "Enter")
        page.wait_for_selector(".welcome >> text=demo_model")
        page.wait_for_function(
            "() => document.getElementById('memory').textContent.endsWith('MiB')"
        )
        settings(page, max_tokens=5)
        ask(page, "Hello")
        assert (
            page.inner_text(".stats").startswith("5 tokens") and page.locator("dialog").count() == 0
        )
        assert KEY not in stored(page) and "Hello" in stored(page)
        assert KEY not in page.content() and not any(KEY in place for place in page.places)
        page.reload()
        page.wait_for_selector("dialog #key")
        page.keyboard.press("Escape")
        alert(page, "have a key")
        press(page, "Enter a key")
        page.wait_for_selector("dialog #key")


def test_a_server_that_dies_is_told_of_and_found_again(browser: Any, tmp_path: Path) -> None:
    with Server(tmp_path / "first.log") as server, visit(browser, server.wait().address) as page:
        page.wait_for_selector(".welcome >> text=demo_model")
        settings(page, temperature=0)
        ask(page, QUESTION, wait=False)
        writing(page, 50)
        server.kill()
        alert(page, "cannot be reached")
        assert len(last(page)) >= 50 and page.inner_text(".stats").endswith("cut off")
        ask(page, "Are you there?")
        assert page.locator(".question .body").last.inner_text() == "Are you there?"
        page.fill("#prompt", "A draft")
        with Server(tmp_path / "second.log", port=server.port) as second:
            second.wait()
            page.wait_for_selector("#notice >> text=cannot be reached", state="detached")
            settings(page, max_tokens=5)
            press(page, "Retry")
            page.wait_for_selector(".stats >> text=5 tokens")
        assert page.input_value("#prompt") == "A draft"
        assert page.locator(".question .body").all_inner_texts() == [QUESTION, "Are you there?"]


def test_a_server_that_is_not_well_is_told_of(browser: Any, open_server: Server) -> None:
    words = {"stopped": "engine has stopped", "stalled": "no progress", "draining": "shutting down"}
    with visit(browser, open_server.address) as page:
        health = {"status": ""}
        page.route("**/health", lambda route: route.fulfill(status=503, json=health))
        for health["status"], text in words.items():
            page.reload()
            alert(page, text)
        page.unroute_all()
        press(page, "Retry")
        page.wait_for_function("() => document.getElementById('notice').textContent === ''")


def test_an_error_in_the_middle_keeps_what_was_written(page: Any) -> None:
    answer_with(page, stream("Half an", " ans", error="the text could not be finished"))
    ask(page, "Hello")
    alert(page, "the text could not be finished")
    assert last(page) == "Half an ans" and page.inner_text(".stats").endswith("cut off")
    answer_with(page, stream("Whole."))
    press(page, "Retry")
    page.wait_for_selector(".answer >> text=Whole.")
    assert page.inner_text("#notice") == ""


def test_a_conversation_that_is_too_long_is_refused_clearly(
    browser: Any, open_server: Server
) -> None:
    with visit(browser, open_server.address) as page:
        page.wait_for_selector(".welcome >> text=1024")
        ask(page, "word " * 3000)
        alert(page, "does not fit into the model’s context of 1024 tokens")
        press(page, "Edit message")
        assert (
            page.input_value("#prompt") == ("word " * 3000).rstrip()
            and page.locator(".question").count() == 0
        )
        settings(page, max_tokens=5000)
        ask(page, "Hello")
        alert(page, "expected at most")
        press(page, "Settings")
        page.fill("#max_tokens", "5")
        press(page, "Retry")
        page.wait_for_selector(".stats >> text=5 tokens")
        assert page.inner_text("#notice") == ""


def test_gauges_show_what_the_engine_holds(page: Any, open_server: Server) -> None:
    settings(page, temperature=0)
    page.wait_for_selector("#kv-text >> text=/^0 of \\d+ tokens$/")
    ask(page, QUESTION, wait=False)
    page.wait_for_function("() => document.getElementById('kv-meter').value > 0")
    assert page.inner_text("#sequences") == "1 running, 0 waiting"
    assert re.fullmatch(r"\d+ MiB|\d+\.\d GiB", page.inner_text("#memory"))
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.getElementById('kv-meter').value === 0")


# Hands, eyes and ears


def test_keys(page: Any) -> None:
    asked = answer_with(page, stream("Yes."))
    page.press("#prompt", "Enter")
    page.fill("#prompt", "にほ")
    page.evaluate("""() => {
            const key = (more) => new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true, ...more });
            document.getElementById("prompt").dispatchEvent(key({ isComposing: true }));
            document.getElementById("prompt").dispatchEvent(key({ keyCode: 229 }));
        }""")
    page.press("#prompt", "Shift+Enter")
    page.type("#prompt", "two")
    page.wait_for_timeout(100)
    assert asked == [] and page.input_value("#prompt") == "にほ\ntwo"
    page.press("#prompt", "Enter")
    done(page)
    assert asked[0]["messages"] == [{"role": "user", "content": "にほ\ntwo"}]
    page.reload()
    page.locator(".skip").focus()
    assert page.evaluate("document.activeElement.textContent") == "Skip to the message field"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "prompt"
    seen = []
    for _ in range(6):
        page.keyboard.press("Shift+Tab")
        seen.append(
            page.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
    assert seen == ["Regenerate", "Copy", "Edit", "log", "settings-toggle", "theme"]


def test_everything_that_can_be_used_has_a_name_and_a_visible_focus(page: Any) -> None:
    answer_with(page, stream("```\ncode\n```"))
    ask(page, "Hello")
    page.click("#settings-toggle")
    snapshot = page.locator("body").aria_snapshot()
    assert not re.search(
        r"- (button|link|textbox|spinbutton|combobox|meter)(:|$| \[)", snapshot, re.M
    ), snapshot
    for _ in range(30):
        page.keyboard.press("Tab")
        shown = page.evaluate("""() => {
                const style = getComputedStyle(document.activeElement.id === "prompt"
                    ? document.getElementById("composer") : document.activeElement);
                return document.activeElement === document.body || style.outlineStyle !== "none" || style.boxShadow !== "none";
            }""")
        assert shown, page.evaluate("document.activeElement.outerHTML")


def test_a_screen_reader_hears_an_answer_once(page: Any) -> None:
    page.evaluate("""() => {
            window.heard = [];
            for (const node of document.querySelectorAll("[aria-live]:not([aria-live=off]), [role=alert], [role=status]"))
                new MutationObserver(() => window.heard.push(node.textContent)).observe(node, { childList: true, subtree: true });
        }""")
    settings(page, temperature=0, max_tokens=100)
    ask(page, QUESTION)
    first, second = page.evaluate("window.heard")
    assert first == "Answering." and second.startswith("Answer: The index access method")
    assert page.get_attribute("#log", "aria-live") == "off"


def test_who_scrolls_up_stays_there(page: Any) -> None:
    page.set_viewport_size({"width": 700, "height": 420})
    settings(page, temperature=0)
    ask(page, QUESTION, wait=False)
    page.wait_for_function("() => document.getElementById('log').scrollTop > 300")
    page.hover("#log")
    page.mouse.wheel(0, -200)
    page.wait_for_selector("#jump:visible")
    top = page.evaluate("document.getElementById('log').scrollTop")
    height = page.evaluate("document.getElementById('log').scrollHeight")
    page.wait_for_function(
        "(height) => document.getElementById('log').scrollHeight > height + 50", arg=height
    )
    assert page.evaluate("document.getElementById('log').scrollTop") == top
    page.click("#jump")
    page.wait_for_selector("#jump", state="hidden")
    page.keyboard.press("Escape")
    done(page)
    assert (
        page.evaluate(
            "(({ scrollTop, clientHeight, scrollHeight }) => scrollHeight - scrollTop -"
            " clientHeight)(log)"
        )
        < 5
    )


# What sticks out of the window, but for what is there to be scrolled or for screen readers alone.
OVERFLOW = """() => [...document.querySelectorAll("body *")].filter((node) => {
    const box = node.getBoundingClientRect();
    return box.width > 1 && (box.right > innerWidth + 0.5 || box.left < -0.5) && !node.closest("pre, .scroll, .skip");
}).map((node) => node.outerHTML.slice(0, 100))"""


def test_a_phone_shows_all_of_it(browser: Any, open_server: Server) -> None:
    with visit(
        browser, open_server.address, viewport=PHONE, has_touch=True, is_mobile=True
    ) as page:
        answer_with(page, stream("x" * 300, "\n\n```\n" + "y" * 300 + "\n```\n"))
        ask(page, "z" * 300)
        page.click("#menu")
        assert page.evaluate("document.activeElement.id") == "new" and page.evaluate(OVERFLOW) == []
        assert page.locator("#main").evaluate("node => node.inert")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "menu" and not page.is_visible(
            "#sidebar"
        )
        page.click("#menu")
        page.click("#new")
        assert not page.is_visible("#sidebar") and page.locator(".welcome").count() == 1
        page.click("#menu")
        page.click("#sessions .title")
        answer_with(page, refusal("no " * 100, "queue_full"), 429)
        press(page, "Regenerate")
        alert(page, "no no no")
        assert (
            page.evaluate(OVERFLOW) == []
            and page.evaluate("document.documentElement.scrollWidth") == 360
        )
        page.click("#settings-toggle")
        assert page.evaluate(OVERFLOW) == []
        page.goto(f"{open_server.address}/docs")
        page.wait_for_selector(".operation")
        assert (
            page.evaluate(OVERFLOW) == []
            and page.evaluate("document.documentElement.scrollWidth") == 360
        )


# What is cut (but for names, which end in three points), and buttons whose words are broken into
# lines.
CUT = """() => [...document.querySelectorAll("button, a, kbd, h1, h2, summary, label, .brand")].filter((node) => {
    if (!node.checkVisibility() || node.clientWidth < 2 || getComputedStyle(node).textOverflow === "ellipsis") return false;
    const words = document.createRange();
    words.selectNodeContents(node);
    const boxes = [...words.getClientRects()].filter((box) => box.width > 1);
    const broken = Math.max(...boxes.map((box) => box.top)) >= Math.min(...boxes.map((box) => box.bottom));
    return node.scrollWidth > node.clientWidth + 1 || (node.matches("button:not(:has(svg))") && broken);
}).map((node) => node.outerHTML.slice(0, 100))"""


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_no_width_cuts_anything(browser: Any, open_server: Server, locale: str) -> None:
    with visit(
        browser, open_server.address, locale=locale, viewport={"width": 500, "height": 740}
    ) as page:
        answer_with(page, stream("x " * 100, "\n\n```\n" + "y" * 300 + "\n```\n"))
        ask(page, QUESTION)
        assert page.evaluate("document.activeElement.id") == "prompt", (
            "there is no keyboard on the screen to cover anything"
        )
        answer_with(page, refusal("no " * 100, "queue_full"), 429)
        ask(page, QUESTION)
        page.wait_for_selector("#notice button")

        def check(*opened: str) -> None:
            for width in (320, 360, 500, 640, 768, 1101):
                page.set_viewport_size({"width": width, "height": 740})
                assert page.evaluate("document.documentElement.scrollWidth") == width
                assert page.evaluate(OVERFLOW) == page.evaluate(CUT) == [], (width, opened)

        check()
        page.click("#settings-toggle")
        check("settings")
        page.goto(f"{open_server.address}/docs")
        page.wait_for_selector(".operation")
        page.evaluate("for (const node of document.querySelectorAll('details')) node.open = true")
        check("docs")


def background(page: Any) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


# The least contrast of any text with what is behind it.
CONTRAST = """() => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => {
        const [r, g, b] = numbers(colour).map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (node) => {
        for (; node; node = node.parentElement) {
            const found = getComputedStyle(node).backgroundColor;
            if ((numbers(found)[3] ?? 1) === 1) return found;
        }
        return "rgb(255, 255, 255)";
    };
    const found = [];
    for (const node of document.querySelectorAll("body *")) {
        if (!node.checkVisibility() || node.closest(":disabled, svg, option")) continue;
        if (![...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())) continue;
        const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a);
        found.push([(a + 0.05) / (b + 0.05), node.outerHTML.slice(0, 80)]);
    }
    return found.sort((a, b) => a[0] - b[0]);
}"""


def test_both_themes_can_be_read_and_follow_the_system(browser: Any, open_server: Server) -> None:
    with visit(browser, open_server.address, color_scheme="light") as page:
        answer_with(page, stream("Some `code` and\n\n```\nmore\n```"))
        settings(page, system="Something")
        ask(page, "Hello")
        answer_with(page, refusal("no", "queue_full"), 429)
        ask(page, "Hello")
        alert(page, "no")
        page.click("#settings-toggle")
        light = background(page)
        assert len(page.evaluate(CONTRAST)) > 30 and page.evaluate(CONTRAST)[0][0] >= 4.5, (
            page.evaluate(CONTRAST)[:3]
        )
        page.emulate_media(color_scheme="dark")
        dark = background(page)
        assert light == "rgb(255, 255, 255)" and dark != light
        assert page.evaluate(CONTRAST)[0][0] >= 4.5, page.evaluate(CONTRAST)[:3]
        page.emulate_media(color_scheme="light")
        page.click("#theme")
        page.reload()
        assert background(page) == dark and page.get_attribute("#theme", "aria-pressed") == "true"
        page.emulate_media(color_scheme="dark")
        page.click("#theme")
        page.reload()
        assert background(page) == light and page.get_attribute("#theme", "aria-pressed") == "false"
        page.goto(f"{open_server.address}/docs")
        assert background(page) == light
        page.wait_for_selector(".operation")
        assert page.evaluate(CONTRAST)[0][0] >= 4.5, page.evaluate(CONTRAST)[:3]
        page.click("#theme")  # agrees with the system, and follows it from now on
        assert background(page) == dark and page.evaluate(CONTRAST)[0][0] >= 4.5, page.evaluate(
            CONTRAST
        )[:3]
        page.emulate_media(color_scheme="light")
        assert background(page) == light


def test_nothing_moves_for_those_who_want_no_motion(browser: Any, open_server: Server) -> None:
    with visit(browser, open_server.address, reduced_motion="reduce") as page:
        ask(page, QUESTION, wait=False)
        writing(page, 20)
        assert page.evaluate("document.getAnimations().length") == 0
        page.emulate_media(reduced_motion="no-preference")
        assert page.evaluate("document.getAnimations().length") == 1
        page.keyboard.press("Escape")
        done(page)


# The documentation


def test_the_documentation_lists_every_operation(page: Any, open_server: Server) -> None:
    page.click("text=API documentation")
    page.wait_for_selector("#post-v1-chat-completions")
    with urllib.request.urlopen(f"{open_server.address}/openapi.json") as answer:
        document = json.load(answer)
    expected = [(m.upper(), path) for path, methods in document["paths"].items() for m in methods]
    shown = [tuple(text.split()) for text in page.locator(".operation h3").all_inner_texts()]
    assert sorted(shown) == sorted(expected)
    assert page.locator("section h2").first.inner_text() == "Models"
    chat = page.locator("#post-v1-chat-completions")
    rows = [row.split("\t") for row in chat.locator("tbody > tr:visible").all_inner_texts()]
    assert ["temperature", "number or null", "0 to 2", ""] in rows
    assert rows[0] == ["messages", "array of Message or string", "1 to 4096 items", "required"]
    idle = chat.locator("details", has_text="which change nothing").last
    idle.locator("summary").click()
    assert {"audio: null", "use_beam_search: false or null"} <= set(
        idle.locator("p").inner_text().split(", ")
    )
    chat.locator("summary", has_text="Message").first.click()
    assert chat.locator("td code:visible", has_text="role").count() == 1
    assert "429" in chat.locator("summary", has_text="Answers").inner_text()


def test_the_commands_of_the_documentation_work(page: Any, open_server: Server) -> None:
    page.goto(f"{open_server.address}/docs")
    page.wait_for_selector(".operation")
    commands = page.locator(".operation > .code code").all_inner_texts()
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "))
        given = {
            flag: [words[i + 1] for i, word in enumerate(words) if word == flag]
            for flag in ("-X", "-H", "-d")
        }
        address = next(word for word in words if word.startswith("http")).replace(
            "MODEL", "demo_model"
        )
        if "/admin/" in address:  # not without an admin key
            assert given["-H"][0] == "authorization: Bearer $QUANTFLOW_ADMIN_KEY"
            continue
        body = json.loads(given["-d"][0]) if given["-d"] else None
        # not a thousand tokens of each
        if {"prompt", "messages"} & set(body or ()) or address.endswith("/responses"):
            most = {
                "interactive": "request_output_len",
                "tokenize": "model",
                "count_tokens": "model",
                "responses": "max_output_tokens",
            }.get(address.rpartition("/")[2], "max_tokens")
            body[most] = "demo_model" if most == "model" else 1
        request = urllib.request.Request(
            address,
            json.dumps(body).encode() if body else None,
            dict(h.split(": ") for h in given["-H"]),
            method=(*given["-X"], "GET")[0],
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200


def test_the_documentation_asks_for_the_key(browser: Any, keyed_server: Server) -> None:
    with visit(browser, f"{keyed_server.address}/docs", accept_downloads=True) as page:
        page.wait_for_selector("dialog #key")
        assert (
            page.locator("dialog h2").evaluate("node => getComputedStyle(node).marginTop") == "0px"
        )
        assert "this page shows its API" in page.inner_text("dialog") and not page.is_visible(
            "#document"
        )
        page.keyboard.press("Escape")
        page.wait_for_selector("dialog", state="detached")
        page.wait_for_selector("#intro button:focus")
        assert page.inner_text("#intro").split("\n") == [
            (
                "This server tells what it offers only to those who have a key. With one, this page"
                " shows its API."
            ),
            "Enter a key",
        ]
        page.keyboard.press("Enter")
        page.fill("dialog #key", "not-the-key-of-this-server")
        page.press("dialog #key", "Enter")
        page.wait_for_selector("dialog >> text=not one of this server")
        page.fill("dialog #key", KEY)
        page.press("dialog #key", "Enter")
        page.wait_for_selector(".operation")
        assert "Bearer $QUANTFLOW_API_KEY" in page.inner_text("#post-v1-chat-completions .code")
        assert KEY not in page.content() and KEY not in stored(page)
        with page.expect_download() as download:
            page.click("#document")
        assert "/v1/models" in json.loads(download.value.path().read_text())["paths"]


# The languages

# What has Latin letters and no others, but for names, what a model or the server says, and what
# programs are told.
LATIN = """(names) => {
    const programs = /QuantFlow|openapi\\.json|demo_model|OpenAI|LMDeploy|Prometheus|Anthropic|curl|Esc/g;
    const terms = /\\btokens?\\b|API|KV|JSON|Top [pk]|[MG]iB|ms|null|false|true|"[^"]*"|[a-z]+\\/[a-z-]+|[a-z]+_[a-z_]+/g;
    const skipped = "code, pre, kbd, option, .method, #title, #sessions, [lang='en'], [lang=''], script";
    const found = [];
    const look = (node, text) => {
        const known = text?.replace(programs, "").replace(terms, "") ?? "";
        const rest = known.replace(/[A-Za-z]+/g, (word) => (names.includes(word) ? "" : word));
        if (/[A-Za-z]{2}/.test(rest) && !/\\p{Script=Han}/u.test(text) && !node.closest(skipped)) found.push(text);
    };
    look(document.body, document.title.replace(/^.* – /, ""));
    for (const node of document.querySelectorAll("body *")) {
        for (const name of ["aria-label", "title", "placeholder"]) look(node, node.getAttribute(name));
        for (const child of node.childNodes) if (child.nodeType === 3) look(node, child.data);
    }
    return found;
}"""


def latin(page: Any, names: Iterable[str] = ()) -> list[str]:
    return page.evaluate(LATIN, list(names))


def test_chinese(browser: Any, keyed_server: Server) -> None:
    with visit(browser, keyed_server.address, locale="zh-CN") as page:
        page.wait_for_selector("dialog >> text=服务器需要密钥")
        assert (
            page.get_attribute("html", "lang") == "zh-CN"
            and page.title() == "新对话 – QuantFlow"
            and latin(page) == []
        )
        page.fill("dialog #key", "not-the-key-of-this-server")
        page.press("dialog #key", "Enter")
        page.wait_for_selector("dialog >> text=密钥不对")
        page.keyboard.press("Escape")
        page.click("text=输入密钥")
        page.fill("dialog #key", KEY)
        page.press("dialog #key", "Enter")
        page.wait_for_selector(".welcome >> text=上下文长度为 1024 个 token。")
        page.click("#settings-toggle")
        assert page.get_attribute("#top_k", "placeholder") == "全部" and latin(page) == []
        answer_with(page, stream("An answer in `English`.", "\n\n```\ncode\n```"))
        ask(page, "你好")
        assert (
            page.inner_text(".stats").startswith("2 个 token · ")
            and page.get_attribute(".answer .body", "lang") == ""
        )
        answer_with(page, refusal("the queue is full", "queue_full"), 429)
        ask(page, "你好")
        alert(page, "等待的请求太多")
        answer_with(page, refusal("top_p: 5; expected less", "invalid_value", "top_p"), 400)
        press(page, "重试")
        alert(page, "参数 top_p 不被接受：top_p: 5; expected less")
        page.click("[aria-label='删除“你好”']")
        assert "删除后无法恢复“你好”。" in page.inner_text("dialog") and latin(page) == []
        page.goto(f"{keyed_server.address}/docs")
        page.fill("dialog #key", KEY)
        page.press("dialog #key", "Enter")
        page.wait_for_selector(".operation")
        asked = urllib.request.Request(
            f"{keyed_server.address}/openapi.json", headers={"authorization": f"Bearer {KEY}"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            schemas = json.load(answer)["components"]["schemas"]
        assert latin(page, {schema.get("title", name) for name, schema in schemas.items()}) == []
        rows = [
            row.split("\t")
            for row in page.locator(
                "#post-v1-chat-completions tbody > tr:visible"
            ).all_inner_texts()
        ]
        assert rows[0] == ["messages", "由 Message 组成的数组 或 字符串", "1 到 4096 项", "必填"]


@pytest.mark.parametrize(
    ("languages", "lang"), [(["fr", "zh-TW", "en"], "zh-CN"), (["fr-FR", "de"], "en"), ([], "en")]
)
def test_the_first_language_that_the_page_speaks(
    browser: Any, open_server: Server, languages: list[str], lang: str
) -> None:
    given = (
        "Object.defineProperty(Navigator.prototype, 'languages', { get: () =>"
        f" {json.dumps(languages)} }});"
    )
    with visit(browser, open_server.address, given) as page:
        page.wait_for_selector(".welcome >> text=1024")
        assert page.get_attribute("html", "lang") == lang and page.faults == []
        assert page.get_attribute("#send", "aria-label") == ("Send" if lang == "en" else "发送")
