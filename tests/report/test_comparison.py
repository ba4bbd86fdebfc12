"""Artifacts side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantflow.cli.console import console
from quantflow.report.comparison import differences
from quantflow.report.page import read_report
from tests.helpers.runs import invoke, make_bench
from tests.report.test_page import parsed

PACK = {"pack": {"format": "compressed-tensors"}}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """4 and 3 bits on the same text, and 4 on another."""
    bench = make_bench(tmp_path_factory.mktemp("compare"))
    found = {}
    for name, bits, windows in (("four", 4, 4), ("three", 3, 4), ("other", 4, 3)):
        found[name] = bench.root / "out" / name
        recipe = bench.recipe(
            name,
            output=str(found[name]),
            weights={"bits": bits, "group_size": 16},
            stages=[
                "rtn" if name != "other" else {"rtn": {"range_search": True}},
                PACK,
                bench.evaluate(windows=windows),
            ],
        )
        result = invoke("run", recipe, "--set", f"name={name}")
        assert result.exit_code == 0, result.stderr
    return found


def test_figures_come_from_the_reports(artifacts: dict[str, Path], tmp_path: Path) -> None:
    result = invoke(
        "compare",
        artifacts["four"],
        artifacts["three"],
        "--json",
        "--output",
        tmp_path / "page.html",
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    for row, name in zip(found["artifacts"], ("four", "three"), strict=True):
        report = read_report(artifacts[name])
        assert (row["name"], row["fingerprint"]) == (name, report["fingerprint"])
        assert (
            row["quality"] == report["quality"]["weights"]
            and row["bytes"] == report["sizes"]["compressed-tensors"]
        )
    assert found["artifacts"][1]["quality"]["kl_mean"] > found["artifacts"][0]["quality"]["kl_mean"]
    assert found["artifacts"][1]["bytes"] < found["artifacts"][0]["bytes"]
    assert found["differences"] == {"weights.bits": [4, 3]} and found["notes"] == []
    page = (tmp_path / "page.html").read_text()
    assert parsed(page).open == [] and page.count("<svg") == 3 and "weights.bits" in page


def test_the_table(artifacts: dict[str, Path]) -> None:
    result = invoke("compare", artifacts["four"], artifacts["three"])
    report = read_report(artifacts["three"])
    assert (
        result.exit_code == 0 and f"{report['quality']['weights']['kl_mean']:.5f}" in result.stdout
    )
    assert "weights.bits: 4 | 3" in result.stdout


def test_a_narrow_terminal_has_a_table_for_each(
    artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(console, "_width", 40)
    lines = invoke("compare", artifacts["four"], artifacts["three"]).stdout.splitlines()
    assert sum("output error" in line for line in lines) == 2 and max(map(len, lines)) <= 40
    for name in ("four", "three"):
        assert any(
            f"{read_report(artifacts[name])['quality']['weights']['perplexity']:.4f}" in line
            for line in lines
        )


def test_figures_on_other_texts_are_marked(artifacts: dict[str, Path]) -> None:
    result = invoke("compare", artifacts["four"], artifacts["other"], "--json")
    found = json.loads(result.stdout)
    assert len(found["notes"]) == 1 and "different texts" in found["notes"][0]
    assert found["differences"] == {
        "stages.rtn.range_search": [False, True],
        "stages.evaluate.windows": [4, 3],
    }


def test_artifacts_of_one_name_are_told_by_their_folders(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_bytes(
            (artifacts["four"] / "report.json").read_bytes()
        )
    found = json.loads(invoke("compare", tmp_path / "a", tmp_path / "b", "--json").stdout)
    assert [row["name"] for row in found["artifacts"]] == ["a", "b"] and found["differences"] == {}


def test_every_folder_that_is_none_is_named(artifacts: dict[str, Path], tmp_path: Path) -> None:
    result = invoke("compare", artifacts["four"], tmp_path / "x", tmp_path / "y")
    assert (
        result.exit_code == 2
        and str(tmp_path / "x") in result.stderr
        and str(tmp_path / "y") in result.stderr
    )
    assert invoke("compare", artifacts["four"]).exit_code == 2


def test_statistics_alone_stand_beside_the_others(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    """Of a recipe that writes no checkpoint there are no sizes, and nothing was measured."""
    root = artifacts["four"].parents[1]
    (tmp_path / "alone.yaml").write_text(
        f"name: alone\nmodel: {root / 'model'}\ncalibration: {{data: {root / 'calib.txt'}, samples:"
        " 4, seqlen: 32}\nstages: [calibrate]\n"
    )
    assert invoke("run", tmp_path / "alone.yaml", "--output", tmp_path / "alone").exit_code == 0
    result = invoke(
        "compare",
        artifacts["four"],
        tmp_path / "alone",
        "--json",
        "--output",
        tmp_path / "page.html",
    )
    assert result.exit_code == 0, result.stderr
    row = json.loads(result.stdout)["artifacts"][1]
    assert (row["bytes"], row["quality"], row["median_error"]) == (None, None, None)
    assert invoke("compare", artifacts["four"], tmp_path / "alone").exit_code == 0


def recipe(*stages: Any, **more: Any) -> dict[str, Any]:
    return {"name": "n", "stages": list(stages), **more}


def test_stages_are_matched_by_name() -> None:
    """One stage more shifts none of the others; the second of a name is another one; a stage
    without settings is a difference, too."""
    a = recipe(
        {"awq": {"grid": 20}},
        {"gptq": {"damp": 0.01}},
        {"pack": {"format": "awq"}},
        {"pack": {"format": "gptq"}},
    )
    b = recipe(
        {"calibrate": {}},
        {"gptq": {"damp": 0.05}},
        {"pack": {"format": "awq"}},
        {"pack": {"format": "gguf"}},
        seed=1,
    )
    found = {d.path: d.values for d in differences([a, b])}
    assert found == {
        "stages.awq.grid": (20, None),
        "stages.gptq.damp": (0.01, 0.05),
        "stages.pack[2].format": ("gptq", "gguf"),
        "stages.calibrate": (None, {}),
        "seed": (None, 1),
    }


def test_lists_are_values() -> None:
    a, b = (
        {"weights": {"ignore": names, "overrides": []}}
        for names in (["lm_head"], ["lm_head", "*.q_proj"])
    )
    assert [(d.path, d.shown()) for d in differences([a, b])] == [
        ("weights.ignore", ['["lm_head"]', '["lm_head", "*.q_proj"]'])
    ]
