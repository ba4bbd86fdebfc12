"""`quantflow chat`: here, and with a server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from quantflow.cli.chat import is_address, talk
from quantflow.cli.console import show
from quantflow.cli.dialogue import COMMANDS, Chat
from quantflow.cli.partner import Message, Parameters, Remote
from quantflow.engine.request import SamplingParams
from quantflow.errors import OutputError, Problem, RequestError, ServerError
from quantflow.serve.config import ServerConfig
from tests.helpers.serving import DEMO, Running, serving

ROOT = Path(__file__).parents[2]
KEY = "key-of-a-user-0001"


class Echo:
    """Says what it was told last, a letter at a time."""

    name, tokens = "echo", (3, 7)

    def __init__(self) -> None:
        self.heard: list[list[Message]] = []

        self.told: list[dict[str, Any]] = []

    def check(self, parameters: Parameters) -> None:
        SamplingParams(**parameters)

    def stream(self, messages: Sequence[Message], parameters: Parameters) -> Iterator[str]:
        self.heard.append(list(messages))
        self.told.append(dict(parameters))
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


def test_a_dialogue_is_remembered() -> None:
    chat, echo, said = made()
    chat.command("/system Be short.")
    chat.say("one")
    chat.say("two")
    assert [(m["role"], m["content"]) for m in echo.heard[-1]] == [
        ("system", "Be short."), ("user", "one"), ("assistant", "one"), ("user", "two")
    ]  # fmt: skip
    chat.turn("/clear")
    chat.say("three")
    assert len(echo.heard[-1]) == 2 and "".join(said).count("three") == 1
    chat.turn("/reset")  # as it is called elsewhere
    chat.turn("/etc/passwd is what")
    chat.turn("/help me\nwith two lines")
    assert [m["content"] for m in echo.heard[-1][1:]] == ["/etc/passwd is what"] * 2 + [
        "/help me\nwith two lines"
    ]


def test_an_answer_that_is_stopped_stays_as_far_as_it_came() -> None:
    chat, echo, said = made()
    chat.say("ab!cd")
    assert said[-1] == " [stopped]\n\n" and chat.messages[-1]["content"] == "ab"
    chat.say("x")
    assert len(echo.heard[-1]) == 3


def test_what_was_refused_is_forgotten(capfd: pytest.CaptureFixture[str]) -> None:
    chat, echo, said = made()
    chat.turn("what?")
    assert (
        "not finished, and forgotten" in said[-1] and "messages: too long" in capfd.readouterr().err
    )
    chat.turn("x")
    assert len(echo.heard[-1]) == 1


def test_a_question_is_answered_anew(capfd: pytest.CaptureFixture[str]) -> None:
    chat, echo, _ = made()
    chat.turn("/regen")
    assert "nothing has been asked" in capfd.readouterr().err
    for text in ("one", "two"):
        chat.turn(text)
    chat.turn("/regen")
    assert echo.heard[-1] == echo.heard[-2] and len(chat.messages) == 4
    chat.turn("thr?ee")
    kept = list(chat.messages)
    chat.turn("/regen")  # of a question that has no answer yet
    assert echo.heard[-1] == echo.heard[-2] and chat.messages == kept
    echo.stream = lambda *_: iter(["3"])  # type: ignore[method-assign]
    chat.turn("/regen")
    assert chat.messages == [
        *kept,
        {"role": "user", "content": "thr?ee"},
        {"role": "assistant", "content": "3"},
    ]
    echo.stream = Echo().stream  # type: ignore[method-assign]
    chat.turn("/regen")
    assert chat.messages[-1]["content"] == "3", "an answer stays where there is no other"


def test_parameters_are_set(capfd: pytest.CaptureFixture[str]) -> None:
    chat, echo, said = made()
    for line in (
        "/set temperature 0.5",
        "/set parameter top_k 7",
        "/set seed 3",
        "/set seed none",
        '/set system "Be short."',
        "x",
    ):
        chat.turn(line)
    assert (
        echo.told == [{"temperature": 0.5, "top_k": 7, "seed": None}]
        and echo.heard[0][0]["content"] == "Be short."
    )
    assert capfd.readouterr().err == ""
    for line, wrong in (
        ("temperature hot", "a number"),
        ("top_k 1.5", "an integer"),
        ("top_p 5", "from 0 to 1"),
        ("colour 3", "temperature"),
    ):
        chat.turn(f"/set {line}")
        assert wrong in capfd.readouterr().err
    chat.turn("/set")
    assert said[-1].splitlines()[:3] == ["temperature 0.5", "top_p none", "top_k 7"]


def test_the_terminal_is_not_worked_by_what_is_said() -> None:
    chat, _, said = made()
    chat.say("\x1b[2Ja\tb\x07\x9b")
    assert "".join(said) == "␛[2Ja\tb␇\ufffd\n\n"
    said.clear()
    chat.say("שלום, مرحبا \u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")
    assert "".join(said) == "שלום, مرحبا " + 12 * "\ufffd" + "\n\n"


def test_nor_by_what_a_server_says(capfd: pytest.CaptureFixture[str]) -> None:
    show([Problem("http://x", "bad\x1b[2J\x1b]52;c;AAAA\u202etxt.exe")])
    shown = capfd.readouterr().err
    assert "\x1b" not in shown and "\ufffdtxt.exe" in shown


def test_a_dialogue_is_saved(tmp_path: Path) -> None:
    chat, _, _ = made()
    chat.say("täble")
    chat.command(f"/save {tmp_path / 'a.json'}")
    assert json.loads((tmp_path / "a.json").read_text()) == chat.messages
    chat.command(f"/save {tmp_path / 'a.txt'}")
    assert (tmp_path / "a.txt").read_text() == "user: täble\n\nassistant: täble\n"
    for wrong, error in (
        ("/save", RequestError),
        (f"/save {tmp_path}/none/a", OutputError),
        ("/nope", RequestError),
    ):
        with pytest.raises(error):
            chat.command(wrong)


def run(
    target: str, text: str, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "quantflow.cli.main", "chat", target, "--max-tokens", "12",
        "--temperature", "0", *options,
    ]  # fmt: skip
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(
        command,
        input=text,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **paths, **environment},
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
        (server.address, "QUANTFLOW_API_KEY", 2),
        ("127.0.0.1:9", "nothing listens there", 4),
        ("no-such-model", "no-such-model", 2),
    ):
        done = run(target, "x\n\n")
        assert ("no answer from the server" in done.stderr) == (
            code == 4
        ) and "not enough" not in done.stderr
        assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr
    for target in (server.address, str(DEMO)):
        long = run(target, "word " * 2000 + "\n\nshort\n\n", QUANTFLOW_API_KEY=KEY)
        assert (
            long.returncode == 2 and "fewer than 1024" in long.stderr and len(long.stdout) > 10
        ), "the rest are answered"


@pytest.mark.parametrize("remote", [False, True])
def test_ctrl_c_stops_the_answer_and_not_the_program(server: Running, remote: bool) -> None:
    target = server.address if remote else str(DEMO)
    command = [
        sys.executable, "-m", "quantflow.cli.main", "chat", target, "--temperature", "0",
        "--max-tokens", "900", "--system", "x",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "QUANTFLOW_API_KEY": KEY,
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    try:
        assert process.stdin and process.stdout
        process.stdin.write(b"Tell me all about tables, at great length.\n\n")
        process.stdin.flush()
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"/stats\nexit\n")
        process.stdin.flush()
        out, err = process.communicate(timeout=120)
        assert b"[stopped]" in out and b"tokens" in out and process.returncode == 0, err
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "event",
    [
        '{"error": "text"}',
        '{"error": {"message": "bad\x1b[2J"}}',
        "5",
        "[]",
        "nonsense",
        '{"choices": 5}',
        '{"choices": [{"delta": null}]}',
        '{"choices": [{"delta": {"content": {}}}], "usage": []}',
    ],
)
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
        chat = Chat(Remote(f"http://127.0.0.1:{fake.server_port}", None), said.append)
        codes = [chat.turn("x"), chat.turn("y")]
        fake.shutdown()
        thread.join()
    assert codes == [4, 4] and "\x1b" not in "".join(said)


def test_out_of_a_pipe_the_first_failure_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for text, code, answered in (
        ("a\n\nb", 0, 2),
        ("a\n\n/nothing\nb", 2, 2),
        ("down\n\na?\n\nb", 4, 3),
        ("a?\n\ndown", 2, 2),
        ("", 0, 0),
    ):
        chat, echo, _ = made()
        say = echo.stream

        def stream(
            messages: Sequence[Message], parameters: Parameters, say: Any = say
        ) -> Iterator[str]:
            yield from say(messages, parameters)
            if messages[-1]["content"] == "down":
                raise ServerError(Problem("server", "gone"))

        echo.stream = stream  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", StringIO(text))
        assert (talk(chat), len(echo.heard)) == (code, answered), text


def test_a_file_with_no_name_for_it() -> None:
    chat, _, _ = made()
    with pytest.raises(OutputError):
        chat.command("/save a\0b")


def test_what_is_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model:4").mkdir()
    assert [
        is_address(text)
        for text in (
            "http://x",
            "https://x/v1",
            "localhost:80",
            "a.b:80/v1",
            "model:4",
            "a/b",
            "a:b",
            "./x",
        )
    ] == [True, True, True, True, False, False, False, False]


def test_help_names_every_command() -> None:
    chat, _, said = made()
    chat.turn("/?")
    assert all(f"  {name}" in said[-1] for name in (*COMMANDS, "/bye")) and "Ctrl-J" in said[-1]
