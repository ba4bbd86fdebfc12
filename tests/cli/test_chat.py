"""`quantflow chat`: here, and with a server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from quantflow.cli.chat import Chat, Message, Remote, turns
from quantflow.cli.console import show
from quantflow.errors import OutputError, Problem, RequestError
from quantflow.serve.config import ServerConfig
from tests.helpers.serving import DEMO, Running, serving

ROOT = Path(__file__).parents[2]
KEY = "key-of-a-user-0001"


class Echo:
    """Says what it was told last, a letter at a time."""

    name, tokens = "echo", (3, 7)

    def __init__(self) -> None:
        self.heard: list[list[Message]] = []

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        self.heard.append(list(messages))
        for letter in messages[-1]["content"]:
            if letter == "!":
                raise KeyboardInterrupt
            if letter == "?":
                raise RequestError(Problem("messages", "too long"))
            yield letter


def made() -> tuple[Chat, Echo, list[str]]:
    said: list[str] = []
    echo = Echo()
    return Chat(echo, said.append), echo, said


def lines(*given: str | type[BaseException]) -> Any:
    rest = iter(given)

    def read() -> str:
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a", ""], ["a"]),
        (["a", "b", "", "c", ""], ["a\nb", "c"]),
        (["", "", "a", "", "exit", "b", ""], ["a"]),
        (["/reset", "a", "/no command", "", "/stats"], ["/reset", "a\n/no command", "/stats"]),
        (["a", "exit", ""], ["a\nexit"]),
        (["a", KeyboardInterrupt, "b", ""], ["b"]),
        ([KeyboardInterrupt, "b", ""], ["b"]),
        (["a"], ["a"]),
        ([], []),
    ],
)
def test_turns(given: Any, expected: list[str]) -> None:
    assert list(turns(lines(*given))) == expected


def test_a_dialogue_is_remembered() -> None:
    chat, echo, said = made()
    chat.command("/system Be short.")
    chat.say("one")
    chat.say("two")
    assert [(m["role"], m["content"]) for m in echo.heard[-1]] == [
        ("system", "Be short."), ("user", "one"), ("assistant", "one"), ("user", "two")
    ]  # fmt: skip
    chat.command("/reset")
    chat.say("three")
    assert len(echo.heard[-1]) == 2 and "".join(said).count("three") == 1


def test_an_answer_that_is_stopped_stays_as_far_as_it_came() -> None:
    chat, echo, said = made()
    chat.say("ab!cd")
    assert said[-1] == " [stopped]\n\n" and chat.messages[-1]["content"] == "ab"
    chat.say("x")
    assert len(echo.heard[-1]) == 3


def test_what_was_refused_is_forgotten() -> None:
    chat, echo, _ = made()
    chat.say("what?")
    chat.say("x")
    assert len(echo.heard[-1]) == 1


def test_the_terminal_is_not_worked_by_what_is_said() -> None:
    chat, _, said = made()
    chat.say("\x1b[2Ja\tb\x07\x9b")
    assert "".join(said) == "␛[2Ja\tb␇\ufffd\n\n"


def test_nor_by_what_a_server_says(capfd: pytest.CaptureFixture[str]) -> None:
    show([Problem("http://x", "bad\x1b[2J\x1b]52;c;AAAA")])
    assert "\x1b" not in capfd.readouterr().err


def test_a_dialogue_is_saved(tmp_path: Path) -> None:
    chat, _, _ = made()
    chat.say("täble")
    chat.command(f"/save {tmp_path / 'a.json'}")
    assert json.loads((tmp_path / "a.json").read_text()) == chat.messages
    chat.command(f"/save {tmp_path / 'a.txt'}")
    assert (tmp_path / "a.txt").read_text() == "user: täble\n\nassistant: täble\n"
    for wrong, error in (("/save", RequestError), (f"/save {tmp_path}/none/a", OutputError), ("/nope", RequestError)):
        with pytest.raises(error):
            chat.command(wrong)


def run(target: str, text: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantflow.cli.main", "chat", target, "--max-tokens", "12", "--temperature", "0", *options]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(
        command, input=text, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **paths, **environment}
    )


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(config=ServerConfig(port=0, keys=(KEY,))) as running:
        yield running


def test_a_server_says_what_the_model_says_here(server: Running) -> None:
    text = "/system Be short.\nWhat is\na table?\n\nAnd an index?\n\n/stats\n"
    here, there = run(str(DEMO), text), run(server.address, text, QUANTFLOW_API_KEY=KEY)
    assert here.returncode == there.returncode == 0, here.stderr + there.stderr
    answers = [done.stdout.rsplit("\n", 2)[0] for done in (here, there)]
    assert answers[0] == answers[1] and len(answers[0]) > 40
    for done in (here, there):
        assert "answer 12 tokens" in done.stdout.splitlines()[-1] and "tokens/s" in done.stdout


def test_what_is_wrong_is_said(server: Running, tmp_path: Path) -> None:
    for target, said, code in (
        (server.address, "QUANTFLOW_API_KEY", 2), ("http://127.0.0.1:9", "quantflow serve", 4), ("no-such-model", "no-such-model", 2)
    ):  # fmt: skip
        done = run(target, "x\n\n")
        assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr
    long = run(server.address, "word " * 2000 + "\n\nshort\n\n", QUANTFLOW_API_KEY=KEY)
    assert long.returncode == 0 and "fewer than 1024" in long.stderr and len(long.stdout) > 10


@pytest.mark.parametrize("remote", [False, True])
def test_ctrl_c_stops_the_answer_and_not_the_program(server: Running, remote: bool) -> None:
    target = server.address if remote else str(DEMO)
    command = [sys.executable, "-m", "quantflow.cli.main", "chat", target, "--temperature", "0", "--max-tokens", "900", "--system", "x"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "QUANTFLOW_API_KEY": KEY, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    try:
        assert process.stdin and process.stdout
        process.stdin.write(b"Tell me all about tables, at great length.\n\n")
        process.stdin.flush()
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        process.stdin.write(b"/stats\nexit\n")
        process.stdin.flush()
        out, err = process.communicate(timeout=30)
        assert b"[stopped]" in out and b"tokens" in out and process.returncode == 0, err
        assert time.monotonic() - began < 10
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "event",
    ['{"error": "text"}', '{"error": {"message": "bad\x1b[2J"}}', "5", "[]", "nonsense", '{"choices": 5}', '{"choices": [{"delta": null}]}',
     '{"choices": [{"delta": {"content": {}}}], "usage": []}'],
)  # fmt: skip
def test_a_server_that_talks_nonsense_does_not_end_the_dialogue(event: str) -> None:
    class Nonsense(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer("application/json", b'{"data": [{"id": "m"}]}')

        def do_POST(self) -> None:
            self.answer("text/event-stream", f"data: {event}\n\n".encode())

        def answer(self, kind: str, body: bytes) -> None:
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Nonsense) as fake:
        thread = threading.Thread(target=fake.serve_forever)
        thread.start()
        said: list[str] = []
        chat = Chat(Remote(f"http://127.0.0.1:{fake.server_port}", None, {}), said.append)
        chat.say("x")
        chat.say("y")
        fake.shutdown()
        thread.join()
    assert "\x1b" not in "".join(said)


def test_input_that_is_no_text() -> None:
    assert list(turns(lines("a\udcffb", ""))) == ["a?b"]
    chat, _, _ = made()
    with pytest.raises(OutputError):
        chat.command("/save a\0b")
