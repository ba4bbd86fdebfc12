"""The process: from start to exit code."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from quantflow.serve.connection import SEND_S
from tests.helpers.serving import DEMO, until

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60  # of a test that is about order, on a machine that has other work
PATIENT = ("--drain-timeout", "120")  # what runs is finished on such a machine too
BODY = {"prompt": "The table", "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 8}


@contextmanager
def started(
    *arguments: str,
    code: str | None = None,
    limits: dict[int, int] | None = None,
    **environment: str,
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server of its own, and its port. code: run in place of the command, with the same
    arguments. limits: of its resources."""
    command = [
        sys.executable,
        *(["-c", code] if code else ["-m", "quantflow.cli.main"]),
        "serve",
        str(DEMO),
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [*command, "--cache-max-entry-count", "0.01", "--max-batch-size", "8", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: [
            resource.setrlimit(kind, (most, most)) for kind, most in (limits or {}).items()
        ],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", **environment},
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith("ready: "), process.stderr and process.stderr.read()
        yield process, int(line.split()[1].rsplit(":", 1)[1])
    finally:
        process.kill()
        process.communicate()


OPENED: list[Any] = []  # connections and responses


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


def connect(port: int, timeout: float = 60) -> HTTPConnection:
    OPENED.append(HTTPConnection("127.0.0.1", port, timeout=timeout))
    return OPENED[-1]


def begin(port: int, **body: Any) -> Any:
    """A stream that has begun."""
    connection = connect(port)
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps({**BODY, **body}),
        {"content-type": "application/json"},
    )
    response = connection.getresponse()
    OPENED.append(response)
    assert response.status == 200 and response.readline().startswith(b"data: ")
    return response


def refused(port: int) -> bool:
    """Whether nobody listens there any more."""
    try:
        socket.create_connection(("127.0.0.1", port), PATIENCE_S).close()
    except OSError:
        return True
    return False


def fetch(port: int, path: str) -> bytes:
    connection = connect(port)
    connection.request("GET", path)
    with connection.getresponse() as answer:
        return answer.read()


def test_sigterm_finishes_what_runs_and_takes_nothing_new() -> None:
    with started(*PATIENT) as (process, port):
        kept = connect(port)
        kept.request("GET", "/health")
        assert kept.getresponse().read() == b'{"status":"ok"}'
        response = begin(port, max_tokens=400)
        process.send_signal(signal.SIGTERM)
        assert until(lambda: refused(port))
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(PATIENCE_S) == 0
        assert process.stderr and "Traceback" not in process.stderr.read()


def test_what_does_not_finish_in_time_is_ended_with_an_error() -> None:
    with started("--drain-timeout", "0.3") as (process, port):
        response = begin(port)
        process.send_signal(signal.SIGINT)
        assert b'"code":"aborted"' in response.read()
        assert process.wait(PATIENCE_S) == 0


def test_a_second_signal_quits_at_once() -> None:
    with started() as (process, port):
        response = begin(port)
        process.send_signal(signal.SIGTERM)
        assert until(lambda: refused(port))  # two that come at once are one
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
        response.close()


def test_a_terminals_ctrl_c_lets_all_ranks_finish() -> None:
    """A terminal sends it to every process: the other ranks and the template's process leave it to
    the first."""
    with started("--tp", "2", *PATIENT) as (process, port):
        response = begin(port, max_tokens=100, n=2)
        os.killpg(process.pid, signal.SIGINT)
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(PATIENCE_S) == 0
        assert process.stderr and "died" not in process.stderr.read()


def test_an_idle_server_stops_at_once() -> None:
    """Long before the time is over that those who run would have had."""
    with started("--drain-timeout", "600") as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


HALF = (
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type:"
    b" application/json\r\ncontent-length: 50\r\n\r\n{"
)


def test_half_a_request_does_not_keep_the_process() -> None:
    with started(*PATIENT) as (process, port):
        response = begin(port, max_tokens=400)
        held = []
        for sent in (
            b"",
            HALF[:9],
            HALF,
            HALF.replace(b"content-type: application/json", b"content-type: text/plain"),
        ):
            held.append(socket.create_connection(("127.0.0.1", port), PATIENCE_S))
            held[-1].sendall(sent)
        # and half of another request behind one that runs
        whole = json.dumps({**BODY, "max_tokens": 300, "n": 1}).encode()
        piped = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        OPENED.extend([*held, piped])
        piped.sendall(HALF[:-1].replace(b"50", b"%d" % len(whole)) + whole + HALF)
        # The halves came before, and have been read, once the whole one waits.
        assert until(
            lambda: re.search(rb"_running 8\b.*_waiting 1\b", fetch(port, "/metrics"), re.S)
        )
        process.send_signal(signal.SIGTERM)
        answers = [b"".join(iter(lambda one=one: one.recv(65536), b"")) for one in held]
        assert (
            answers[0] == b""
            and b" 503 " in answers[1]
            and b" 503 " in answers[2]
            and b"shutting_down" in answers[2]
        )
        assert answers[3].startswith(b"HTTP/1.1 415 ") and b" 503 " not in answers[3]
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert b"data: [DONE]\n\n" in b"".join(iter(lambda: piped.recv(65536), b""))
        assert process.wait(PATIENCE_S) == 0
        assert process.stderr and "Traceback" not in process.stderr.read()


def test_an_answer_that_nobody_reads_does_not_keep_the_process() -> None:
    with started("--drain-timeout", "0.5") as (process, port), socket.socket() as asleep:
        asleep.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asleep.connect(("127.0.0.1", port))
        body = json.dumps({"prompt": "x y " * 700_000}).encode()
        asleep.sendall(
            HALF[:-1].replace(b"/v1/completions", b"/tokenize").replace(b"50", b"%d" % len(body))
            + body
        )
        assert asleep.recv(9) == b"HTTP/1.1 "
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SEND_S / 2) == 0  # which it would have had to read it


DIES = """
import sys, threading, time
from quantflow.engine.engine import Engine
step, born = Engine.step, []
def dying(self):
    if threading.current_thread().name == "quantflow-engine" and self.has_work:
        born.append(time.monotonic())
        if born[-1] - born[0] > 0.5 and len(born) > 50:
            raise RuntimeError("the thread is killed")
    return step(self)
Engine.step = dying
from quantflow.cli.main import main
main()
"""


@pytest.mark.parametrize("supervised", [True, False])
def test_the_engine_dies(supervised: bool) -> None:
    with started(*(["--supervised"] if supervised else []), code=DIES) as (process, port):
        response = begin(port)
        assert b'"code":"engine_stopped"' in response.read()
        if supervised:
            assert process.wait(PATIENCE_S) == 1
            assert process.stderr and "the thread is killed" in process.stderr.read()
        else:
            connection = connect(port)
            connection.request("GET", "/health")
            answer = connection.getresponse()
            OPENED.append(answer)
            assert answer.status == 503 and process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 1


HANGS = """
import threading, time
from quantflow.engine.engine import Engine
step = Engine.step
def hanging(self):
    if self.scheduler.running and len(self.scheduler.running) == 3:
        time.sleep(1000)
    return step(self)
Engine.step = hanging
from quantflow.cli.main import main
main()
"""


def test_an_engine_that_hangs_does_not_keep_the_process() -> None:
    with started("--drain-timeout", "0.5", code=HANGS) as (process, port):
        connection = connect(port)
        connection.request(
            "POST",
            "/v1/completions",
            json.dumps({**BODY, "n": 3, "stream": False}),
            {"content-type": "application/json"},
        )
        assert until(
            lambda: re.search(rb"^quantflow_sequences_running 3", fetch(port, "/metrics"), re.M)
        )
        process.send_signal(signal.SIGTERM)
        response = connection.getresponse()
        assert response.status == 503 and json.loads(response.read())["error"]["code"] == "aborted"
        assert process.wait(PATIENCE_S) == 1
        assert process.stderr and "hangs" in process.stderr.read()


def test_the_first_token_comes_soon() -> None:
    """Two seconds from start to first token, without the imports; where other tests are running,
    no longer than these took."""
    code = """
import sys, time
start = time.time()
from pathlib import Path
from quantflow.cli.main import main
import quantflow.serve.run, torch, quantflow.serve.app
began = time.time()
Path(sys.argv.pop()).write_text(f"{began} {began - start}")
main()
"""
    file = ROOT / "tests" / ".began"
    try:
        with started(str(file), code=code) as (_, port):
            begin(port, max_tokens=1, n=1)
            began, imports = map(float, file.read_text().split())
            seconds = time.time() - began
            assert seconds < max(4, imports), (seconds, imports)
    finally:
        file.unlink(missing_ok=True)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantflow.cli.main", "serve", *arguments]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **paths, **environment},
    )


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("no-such-model", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2 and "in use" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-model"], "no-such-model"),
        ([str(DEMO), "--host", "999.1.1.1"], "999.1.1.1"),
        ([str(DEMO), "--api-key-file", "no-such-file"], "no-such-file"),
        ([str(DEMO), "--session-len", "99999"], "session_len"),
        ([str(DEMO), "--drain-timeout", "inf"], "--drain-timeout"),
    ],
)
def test_what_is_wrong_at_start(arguments: list[str], said: str) -> None:
    done = run(*arguments, "--port", "0")
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_an_open_door_is_warned_of() -> None:
    with started("--host", "0.0.0.0") as (process, port):
        assert port
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        assert process.stderr and "no key is asked for" in process.stderr.read()


def test_names_that_were_given_are_the_only_ones() -> None:
    with started("--served-model-name", "a", "--served-model-name", "b") as (_, port):
        for name, status in (("a", 200), ("b", 200), ("c", 404)):
            connection = connect(port)
            body = json.dumps({"prompt": "x", "model": name, "max_tokens": 1})
            connection.request(
                "POST", "/v1/completions", body, {"content-type": "application/json"}
            )
            response = connection.getresponse()
            found = json.loads(response.read())
            assert response.status == status
            assert found.get("model") == "a" or found["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("options", [(), ("--no-prefix-cache",)])
def test_what_was_asked_before_is_not_known_without_a_prefix_cache(
    options: tuple[str, ...],
) -> None:
    prompt = "The table has one row for each client, and every row has a name. " * 4
    body = json.dumps({"prompt": prompt, "max_tokens": 1}).encode()
    with started(*options) as (_, port):
        known = []
        for _ in range(2):
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request(
                "POST", "/v1/completions", body, {"content-type": "application/json"}
            )
            known.append(
                json.loads(connection.getresponse().read())["usage"]["prompt_tokens_details"][
                    "cached_tokens"
                ]
            )
            connection.close()
    assert known[0] == 0 and (known[1] == 0 if options else known[1] > 0)
