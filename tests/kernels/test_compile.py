"""Every kernel in the shipped configurations compiles for four GPU generations, without spills and
with wide loads. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# bytes a program can have
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture(scope="module", params=sorted(SHARED_LIMIT), ids=lambda c: f"sm_{c}")
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The report, from a process of its own: what the interpreter was chosen for cannot be
    compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    command = [
        sys.executable,
        "benchmarks/kernel_report.py",
        "--json",
        "--capability",
        str(request.param),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert len(rows) > 10
    assert [r["kernel"] for r in rows if r["stack_bytes"]] == []


def test_shared_memory_is_there(rows: list[dict[str, Any]]) -> None:
    assert [r["kernel"] for r in rows if r["shared_bytes"] > SHARED_LIMIT[r["capability"]]] == []


def test_weights_and_caches_are_loaded_in_wide_pieces(rows: list[dict[str, Any]]) -> None:
    streamed = {r["kernel"]: r["load_bytes"] for r in rows if r["load_bytes"] is not None}
    assert {name for name in streamed if "matmul" in name} and {
        name for name in streamed if "attention int8" in name
    }
    assert {
        name: size
        for name, size in streamed.items()
        if size < (16 if "matmul" in name or "bf16" in name else 8)
    } == {}
