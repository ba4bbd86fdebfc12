"""`make check` stays quick: its tests start no server, no browser and no run of a recipe."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOW = {
    "playwright", "tests.helpers.serving", "tests.helpers.shown", "tests.helpers.places",
    "tests.helpers.lmdeploy_suite", "multiprocessing",
}  # fmt: skip
"""Modules of tests that take seconds each."""


def fast() -> list[Path]:
    """The test files of `make check`."""
    names = re.search(
        r"^FAST := \$\(addprefix tests/,(.*)\)$", (ROOT / "Makefile").read_text(), re.M
    )
    assert names
    places = [ROOT / "tests" / name for name in names[1].split()]
    assert all(place.exists() for place in places), places
    return [
        path
        for place in places
        for path in (place.rglob("test_*.py") if place.is_dir() else [place])
    ]


def test_it_has_a_good_part_of_the_tests_and_none_that_is_slow() -> None:
    files = fast()
    assert len(files) > len([*(ROOT / "tests").rglob("test_*.py")]) / 5
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            used = (
                {alias.name for alias in node.names}
                if isinstance(node, ast.Import)
                else {node.module or ""}
                if isinstance(node, ast.ImportFrom)
                else set()
            )
            assert not {name for name in used for slow in SLOW if name.startswith(slow)}, path
