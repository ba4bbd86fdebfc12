"""Another process that is asked in lines: however many files this one has open."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantflow.engine.child import Child, ChildEnded, ChildSlow

MANY = 1100  # more than select() knows


@pytest.fixture
def crowded() -> Iterator[None]:
    """So many files are open that a new one has a number from 1024 on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY + 200
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"at most {hard} files may be open here")
    resource.setrlimit(
        resource.RLIMIT_NOFILE,
        (max(soft, wanted) if soft != resource.RLIM_INFINITY else soft, hard),
    )
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(MANY)]
    try:
        yield
    finally:
        for number in opened:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Answers a line with its length; to `slow` nothing, and `end` ends it."""
    source = (
        "import sys\n"
        "for line in sys.stdin.buffer:\n"
        "    if line == b'end\\n': break\n"
        "    if line != b'slow\\n': print(len(line), 'x' * (len(line) - 1), flush=True)\n"
    )
    (tmp_path / "echoing.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "echoing"


def test_a_child_is_asked_where_a_thousand_files_are_open(crowded: None, module: str) -> None:
    child = Child(module)
    child.start()
    assert child._process and child._process.stdout and child._process.stdout.fileno() >= 1024
    large = b"y" * 300_000  # more than a pipe holds
    assert child.ask(b"abc", 20) == b"4 xxx\n"
    assert len(child.ask(large, 20)) == len(large) + len(b"300001 \n")
    with pytest.raises(ChildSlow):
        child.ask(b"slow", 0.1)
    assert not child.running
    child.start()
    with pytest.raises(ChildEnded):
        child.ask(b"end", 20)
    assert not child.running
