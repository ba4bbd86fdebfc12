"""The plan's estimate of memory against what a run takes, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pipeline import measure

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "model"
    script = ROOT / "benchmarks" / "make_checkpoint.py"
    subprocess.run(
        [sys.executable, script, "--shape", "llama-small", "--output", folder], check=True, cwd=ROOT
    )
    return folder


@pytest.mark.parametrize(
    "stages", [["rtn"], ["calibrate", {"gptq": {"refine": 0}}]], ids=["rtn", "gptq"]
)
def test_the_peak_is_within_a_quarter_of_the_estimate(
    model: Path, tmp_path: Path, stages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # each thread has buffers of its own: with one, the peak is a tenth lower
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: memory\nmodel: {model}\nstages:"
        f" {[*stages, {'pack': {'format': 'compressed-tensors'}}]}\ncalibration: {{data:"
        f" {ROOT / 'calib_data' / 'demo_calib.txt'}, samples: 16, seqlen: 256}}\n"
    )
    found = measure(str(recipe), [])
    above = found["peak_bytes"] - found["imports_bytes"]
    assert 0.75 < above / found["estimate_bytes"] < 1.25, (
        above / 2**20,
        found["estimate_bytes"] / 2**20,
    )
