"""The fuzzing targets without a fuzzer: seeds are read, changed seeds are read or refused, and what
may not happen is seen."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from random import Random
from typing import Any

import pytest

from quantflow.errors import ModelError, UserError
from tests.fuzz import server
from tests.fuzz.mutation import flip, joined, mutated, split
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import LONGEST_MESSAGE, TARGETS, Target, judge, lay_out

CHANGES = 80
RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "fuzz_cpu.json"


@pytest.fixture(autouse=True)
def no_warnings() -> None:
    """What damaged weights make numpy say is no exception outside of tests."""
    warnings.simplefilter("ignore")


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read_and_changed_ones_are_read_or_refused(name: str, tmp_path: Path) -> None:
    target, valid = TARGETS[name], seeds(name)
    for data in valid:
        lay_out(data, target.files, tmp_path)
        target.use(tmp_path)
    rng, refused = Random(5), 0
    for _ in range(CHANGES):
        data = mutated(rng.choice(valid), rng, target.files, valid)
        finding = judge(target, data, tmp_path)
        assert finding is None, finding.text
        try:
            target.use(tmp_path)
        except UserError:
            refused += 1
    # Neither so mild that nothing is refused, nor so wild that nothing else is reached. Some
    # targets refuse inside.
    assert refused < CHANGES - 5 and (
        refused > 5 or name in ("artifact", "calibration", "request", "headers")
    )


def test_what_may_not_happen_is_a_finding(tmp_path: Path) -> None:
    def target(error: BaseException) -> Target:
        def use(place: Path) -> None:
            raise error

        return Target(use, ("a.json",), ())

    class PanicException(BaseException):
        """As the tokenizers library's, which is no Exception."""

    assert judge(target(ModelError("it: is damaged")), b"", tmp_path) is None
    for error in (
        KeyError("a"),
        PanicException("index out of bounds"),
        RecursionError(),
        AssertionError("no"),
    ):
        finding = judge(target(error), b"", tmp_path)
        assert (
            finding is not None
            and finding.name.startswith(type(error).__name__)
            and str(error) in finding.text
        )
    finding = judge(target(ModelError("it: " + "x" * LONGEST_MESSAGE)), b"", tmp_path)
    assert finding is not None and "characters" in finding.text
    with pytest.raises(KeyboardInterrupt):
        judge(target(KeyboardInterrupt()), b"", tmp_path)


def test_an_input_of_several_files(tmp_path: Path) -> None:
    names = ("a.json", "b/c.model")
    files = {"a.json": b"{}\n\n%", "b/c.model": b"\0\n%% "}
    assert split(joined(files), names) == files
    assert split(b"%% ../a.json\nx\n%% a.json\n1\n%% a.json\n2\n", names) == {"a.json": b"2"}
    target = Target(lambda place: None, names, ())
    judge(target, joined(files), tmp_path)
    assert {
        str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()
    } == files
    judge(target, joined({"a.json": b"1"}), tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.json"]


@pytest.mark.parametrize("name", ["safetensors", "gguf"])
def test_what_is_changed_keeps_its_frame(name: str) -> None:
    """Where bytes are not changed as such: magic numbers, and lengths that fit."""
    valid, rng, framed = seeds(name), Random(1), 0
    for _ in range(200):
        data = mutated(rng.choice(valid), rng, TARGETS[name].files, valid, lambda data, rng: data)
        if name == "gguf":
            framed += data[:4] == b"GGUF"
        else:
            length = int.from_bytes(data[:8], "little")
            framed += 2 <= length <= len(data) - 8
    assert framed > 180


def test_flips_are_some(tmp_path: Path) -> None:
    assert len({flip(b"0123456789" * 3, Random(i)) for i in range(100)}) > 90 and isinstance(
        flip(b"", Random(0)), bytes
    )


def test_every_route_that_takes_a_body_is_a_part_of_the_target() -> None:
    app: Any = server.harness().app
    taking = {
        route.path
        for route in app.app.routes
        if "POST" in route.methods
        and not route.path.startswith("/admin/")
        and "{" not in route.path
    }
    assert taking == set(server.PATHS)


def test_what_a_server_may_not_do_is_seen() -> None:
    server.check_error(404, "application/json", b'{"error": {"message": "no", "type": "x"}}')
    for status, kind, body in (
        (500, "application/json", b'{"error": {"message": "no", "type": "x"}}'),
        (400, "text/plain", b"no"),
        (400, "application/json", b'{"error": {"message": "", "type": "x"}}'),
        (400, "application/json", b'{"error": {"message": "%b", "type": "x"}}' % (b"9" * 81)),
    ):
        with pytest.raises(AssertionError):
            server.check_error(status, kind, body)
    ok, error = (
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 404 Not\r\ncontent-type: a/b\r\ncontent-length: 1\r\n\r\nx",
    )
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
    assert server.answers(ok + chunked + error) == [
        (200, "", b"{}"),
        (200, "", b"ab"),
        (404, "a/b", b"x"),
    ]
    assert server.answers(ok + error[:-1]) == [(200, "", b"{}")]
    with pytest.raises(AssertionError):
        server.answers(ok + b"<html>")


def test_the_record_is_of_every_target() -> None:
    rows = json.loads(RECORD.read_text())["targets"]
    assert set(rows) == set(TARGETS)
    for name, row in rows.items():
        assert (
            row["seconds"] >= 600
            and row["executions"] > 0
            and 0 < row["branches"]["taken"] <= row["branches"]["of"]
        ), name
