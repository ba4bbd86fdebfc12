"""The tables of docs/performance.md are those of the results files."""

from __future__ import annotations

import pytest

from benchmarks import tables


def test_the_page_is_up_to_date() -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.written(text) == text, "run python benchmarks/tables.py"


def test_a_table_is_written_between_its_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tables, "TABLES", {"one": lambda record: ["| a |"] if record is None else []}
    )
    text = "before\n<!-- one -->\nold\n<!-- end of one -->\nafter"
    assert tables.written(text) == "before\n<!-- one -->\n| a |\n<!-- end of one -->\nafter"
    for broken in ("nothing", text + text):
        with pytest.raises(SystemExit, match="expected"):
            tables.written(broken)


def test_the_gpus_engine() -> None:
    case = {"name": "W4A16", "batch": 8, "prompt": 128}
    row = {
        "case": case,
        "mode": "fast",
        "decode_tokens_s": 801.6,
        "step_ms": 9.98,
        "of_limit": 0.456,
        "prefill_tokens_s": 1.0,
        "peak_bytes": 3 * 2**29,
    }
    record = {
        "device": "GPU",
        "torch": "2",
        "date": "today",
        "commit": "0123456789",
        "shape": "llama-8b",
        "rows": [row],
    }
    assert tables.engine_gpu(record)[-1] == "| W4A16 | fast | 8 | 802 | 9.98 | 46% | 1 | 1.5 |"
    assert tables.engine_gpu(None) == ["On a GPU: not yet measured."]
