"""What is typed at the terminal's chat, key by key, and what comes out of a pipe."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from quantflow.cli.prompt import piped, typed, unquoted

ROOT = Path(__file__).parents[2]
ENTER, ALT_ENTER, CTRL_J, CTRL_C, CTRL_D, UP = "\r", "\x1b\r", "\n", "\x03", "\x04", "\x1b[A"


def pasted(text: str) -> str:
    """As terminals send it: marked, and with carriage returns."""
    return f"\x1b[200~{text.replace(chr(10), chr(13))}\x1b[201~"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (f"one{ENTER}two{ENTER}", ["one", "two"]),
        (f"{ENTER} {ENTER}one{ENTER}", [" one"]),
        (f"one{ALT_ENTER}two{CTRL_J}{CTRL_J}three{ENTER}", ["one\ntwo\n\nthree"]),
        (f"one\\{ENTER}two{ENTER}", ["one\ntwo"]),
        (f'"""one{ENTER}{ENTER}two"""{ENTER}three{ENTER}', ["one\n\ntwo", "three"]),
        (f'"""{ENTER}one{ENTER}"""{ENTER}', ["one"]),
        (f'"""{ENTER}x = """a"""{ENTER}"""{ENTER}', ['x = """a"""']),
        (f'"""one"""{ENTER}', ["one"]),
        (pasted("one\n\ntwo\n") + ENTER, ["one\n\ntwo"]),
        ("What is " + pasted("a\n/bye\nb") + "?" + ENTER, ["What is a\n/bye\nb?"]),
        (pasted("curl \\\n  -X GET") + ENTER, ["curl \\\n  -X GET"]),
        (f"forgotten{CTRL_C}one{ENTER}", ["one"]),
        (f"{CTRL_C}{CTRL_C}one{ENTER}", ["one"]),
        (f"one{ENTER}/bye{ENTER}two{ENTER}", ["one"]),
        (f"/help{ENTER}exit{ENTER}", ["/help"]),
        ("", []),
    ],
)
def test_keys(keys: str, expected: list[str]) -> None:
    with create_pipe_input() as pipe:
        pipe.send_text(keys + CTRL_D)
        assert list(typed(input=pipe, output=DummyOutput())) == expected


def test_quotes_that_are_a_part_of_the_text_stay() -> None:
    for text in ('"""A docstring."""\nx = 1', 'print("""a""")', '"""a""" and """b"""', '""'):
        assert unquoted(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\n", ["a"]),
        ("a", ["a"]),
        ("a\r\nb\n\nc\n\n\n\n", ["a\nb", "c"]),
        ("\n\na\n\nexit\nb\n", ["a"]),
        (
            "/clear\na\n/no command\n\n /stats\n\n/stats\n/bye\n/stats",
            ["/clear", "a\n/no command", " /stats", "/stats"],
        ),
        ("a\nexit\n", ["a\nexit"]),
        ('"""\na\n', ['"""\na']),
        ("a\udcffb", ["a?b"]),
        ("", []),
    ],
)
def test_a_pipe(text: str, expected: list[str]) -> None:
    assert list(piped(text.splitlines(keepends=True))) == expected


class Words(BaseHTTPRequestHandler):
    """A server that answers each question with a word at a time, for ever where it is asked so."""

    asked: list[str]

    def do_GET(self) -> None:
        self._begin("application/json")
        self.wfile.write(b'{"data": [{"id": "words"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body["messages"][-1]["content"])
        self._begin("text/event-stream")
        try:
            while True:
                self._say({"choices": [{"delta": {"content": "word "}}]})
                if "ever" not in self.asked[-1]:
                    break
                time.sleep(0.02)
            self._say({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        except OSError:
            pass

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.end_headers()

    def _say(self, event: Any) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Words.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Words) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_real_terminal(address: str) -> None:
    """A paste does not send, Ctrl-C stops an answer that would never end, and at an empty prompt
    says how to leave."""
    environment = {
        **os.environ,
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "NO_PROXY": "*",
        "COLUMNS": "80",
        "LINES": "24",
    }
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(
            sys.executable,
            [sys.executable, "-m", "quantflow.cli.main", "chat", address],
            environment,
        )
    seen = ""

    def await_(text: str, again: str = "") -> None:
        """again: keys to press once more where nothing came of them: what was asked before is
        loaded beside the prompt."""
        nonlocal seen
        until, patience = time.monotonic() + 120, time.monotonic() + 5
        while not re.search(text, seen):
            assert time.monotonic() < until, seen
            if again and time.monotonic() > patience:
                press(again)
                patience += 5
            if select.select([terminal], [], [], 0.1)[0]:
                seen += os.read(terminal, 65536).decode(errors="replace")
        seen = re.split(text, seen, maxsplit=1)[1]

    def press(keys: str) -> None:
        os.write(terminal, keys.encode())

    try:
        await_("Ask something")
        press(pasted("one\ntwo"))
        await_("two")
        assert Words.asked == []
        press(ENTER)
        await_("word ")
        await_("Ask something")
        press(f"for ever{ENTER}")
        await_("word word word")
        press(CTRL_C)
        await_("stopped")
        await_("Ask something")
        press(CTRL_C)
        await_("Ctrl-D or /bye leaves")
        await_("Ask something")  # until then the terminal itself echoes, and Ctrl-C empties it
        press("three")
        await_("three")
        press(CTRL_C)
        await_("Ask something")
        press(UP)
        await_("three", again=UP)
        press(ENTER)
        await_("word ")
        await_("Ask something")
        press(CTRL_D)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        pid = 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)
    assert Words.asked == ["one\ntwo", "for ever", "three"]
