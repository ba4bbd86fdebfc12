"""What the server says to whoever runs it."""

from __future__ import annotations

import io
import logging
import re
import signal
import socket
import unicodedata
from typing import Any

import pytest

from quantflow.serve.log import MOST_TRACE, Log, about
from tests.helpers.serving import Running, until
from tests.serve.test_lifecycle import connect, started

TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
MARKS = ("-RIGHT MARK", "-LEFT MARK", "ARABIC LETTER MARK")
TURNING = "".join(
    c
    for c in map(chr, range(0x110000))
    if unicodedata.bidirectional(c) in TURNS or unicodedata.name(c, "").endswith(MARKS)
)
LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (error|warning|info|debug) (-|req-[0-9a-f]{24})"
    r" (-|127\.0\.0\.1:\d+) \S.*"
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def logged() -> Any:
    """A logger, what it has said, and the time that it goes by."""
    said, clock = io.StringIO(), Clock()
    handler, logger = Log(said, clock), logging.Logger("of a test", logging.DEBUG)
    logger.addHandler(handler)
    return logger, said, clock, handler


def test_a_line_says_when_what_and_of_whom(logged: Any) -> None:
    logger, said, *_ = logged
    with about("req-" + "0" * 24, "127.0.0.1:80"):
        logger.warning("refused with %d: %s", 400, "no\r\nvalid\x1b[31m HT\u2028TP")
    logger.error("the engine has died")
    first, second = said.getvalue().splitlines()
    assert LINE.fullmatch(first) and LINE.fullmatch(second)
    assert first.endswith(
        r"warning req-000000000000000000000000 127.0.0.1:80 refused with 400:"
        r" no\x0d\x0avalid\x1b[31m HT\u2028TP"
    )
    assert second.endswith(" error - - the engine has died")


def test_a_line_cannot_be_turned(logged: Any) -> None:
    """By none of the letters that Unicode's own table says to set, to isolate or to mark a
    direction."""
    logger, said, *_ = logged
    logger.warning("refused: %s", TURNING)
    assert (
        said.getvalue().isascii() and r"\u202e" in said.getvalue() and r"\u061c" in said.getvalue()
    )
    try:
        raise ValueError(TURNING)
    except ValueError:
        logger.exception("it failed")
    assert not set(TURNING) & set(said.getvalue())


def test_a_traceback_cannot_be_taken_for_lines_of_the_log(logged: Any) -> None:
    logger, said, *_ = logged
    try:
        raise ValueError(
            "2026-01-01T00:00:00.000Z error - - forged\n2026-01-01T00:00:00.000Z error - -"
            " forged\x1b[2J"
        )
    except ValueError:
        logger.exception("it failed")
    first, *others = said.getvalue().splitlines()
    assert LINE.fullmatch(first) and others and all(line.startswith("  ") for line in others)
    assert "\x1b" not in said.getvalue()


def test_a_long_traceback_has_its_beginning_and_its_end(logged: Any) -> None:
    logger, stream = logged[:2]
    try:
        raise ValueError("x" * 1_000_000 + " at last")
    except ValueError:
        logger.exception("it failed")
    found = stream.getvalue()
    assert MOST_TRACE < len(found) < MOST_TRACE + 300
    assert (
        "Traceback (most recent call last)" in found
        and found.rstrip().endswith("x at last")
        and " characters …" in found
    )


def test_lines_that_are_alike_are_counted(logged: Any) -> None:
    logger, said, clock, handler = logged
    for number in range(1000):
        clock.now += 0.001
        logger.warning("refused with %d: %s", 400, f"request {number}")
        if number == 500:
            logger.warning("something else")
        logger.debug("GET / 200")
    lines = [line for line in said.getvalue().splitlines() if " debug " not in line]
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["0", "1", "2", "3", "4", "else"]
    assert said.getvalue().count("GET / 200") == 1000  # whoever asks for all of them gets them
    clock.now += 10
    handler.tell_rest()
    assert (
        said.getvalue()
        .splitlines()[-1]
        .endswith(" warning - - 995 more like this in 11 s: refused with 400: request 5")
    )
    before = said.getvalue()
    handler.tell_rest(at_once=True)
    assert said.getvalue() == before  # nothing was left out since
    logger.warning("refused with %d: %s", 400, "again")
    assert said.getvalue().splitlines()[-1].endswith("refused with 400: again")


def test_failures_at_different_places_are_not_alike(logged: Any) -> None:
    logger, said, *_ = logged

    def fail(kind: type[Exception]) -> None:
        try:
            raise kind
        except Exception:
            logger.exception("Exception in ASGI application\n")

    for _ in range(20):
        fail(ValueError)
        fail(TypeError)
    assert said.getvalue().count("ValueError") == said.getvalue().count("TypeError") == 5


def test_kinds_without_end_take_no_memory(logged: Any) -> None:
    logger, said, _, handler = logged
    for number in range(5000):
        logger.warning(f"a line of its own, {number}")
    assert len(handler._kinds) < 300 and said.getvalue().count("\n") == 5000


def test_what_went_wrong_inside_is_under_the_requests_id(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("/secret/path is broken")

    said = io.StringIO()
    handler, logger = Log(said), logging.getLogger("uvicorn.error")
    monkeypatch.setattr(type(server.service), "cards", broken)
    monkeypatch.setattr(logger, "handlers", [handler])
    id = server.get("/v1/models").headers["x-request-id"]
    assert until(lambda: "/secret/path" in said.getvalue())  # the client hears of it first
    first, *others = said.getvalue().splitlines()
    assert (
        LINE.fullmatch(first)
        and f" error {id} 127.0.0.1:" in first
        and "/secret/path" in others[-1]
    )


def test_malformed_requests_do_not_fill_the_log_and_debugging_shows_every_answer() -> None:
    ids: list[str] = []
    with started("--log-level", "debug") as (process, port):
        for number in range(300):
            with socket.create_connection(("127.0.0.1", port), 60) as connection:
                connection.sendall(
                    (b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\nx\x00: y\r\n\r\n")[number % 2]
                )
                answer = b""
                while part := connection.recv(65536):
                    answer += part
                assert b" 400 " in answer.split(b"\r\n")[0]
                ids += re.findall(r"x-request-id: (req-\w+)", answer.decode())
        for path in ("/health", "/v1/models", "/nothing%0aat%20all"):
            asked = connect(port)
            asked.request("GET", path)
            asked.getresponse().read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stderr
        lines = [line for line in process.stderr.read().splitlines() if re.match(r"\d{4}-", line)]
    assert all(LINE.fullmatch(line) for line in lines)
    answers = [line.split(" ", 4)[4] for line in lines if " debug req-" in line]
    assert answers == ["GET /health 200", "GET /v1/models 200", r"GET /nothing\x0aat all 404"]
    refused = [line for line in lines if "refused with 400: request: no valid HTTP" in line]
    rest = [line for line in refused if "more like this" in line]
    # where 300 take more than ten seconds, there are a few more
    assert len(refused) < 40 and ids[0] in refused[0]
    assert len(refused) - len(rest) + sum(int(line.split()[4]) for line in rest) == 300
