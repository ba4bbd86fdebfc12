"""The tables of docs/performance.md are those of the results files."""

from __future__ import annotations

import pytest

from benchmarks import tables


def test_the_page_is_up_to_date() -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.written(text) == text, "run python benchmarks/tables.py"


def test_a_table_is_written_between_its_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "TABLES", {"one": lambda record: ["| a |"] if record is None else []})
    text = "before\n<!-- one -->\nold\n<!-- end of one -->\nafter"
    assert tables.written(text) == "before\n<!-- one -->\n| a |\n<!-- end of one -->\nafter"
    for broken in ("nothing", text + text):
        with pytest.raises(SystemExit, match="expected"):
            tables.written(broken)
