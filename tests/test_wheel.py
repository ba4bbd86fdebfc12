"""An installed QuantFlow, with no repository at hand, has its recipes, texts and demo model: what a
wheel holds is what a user gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from quantflow import bundled
from tests.helpers.tiny import write_llama

ROOT = Path(__file__).parents[1]
MOST_BYTES = 16 * 2**20  # the demo model is most of it


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip(
        "setuptools", reason="a wheel is built with the setuptools at hand: nothing is downloaded"
    )
    source, place = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("quantflow", "kernels", "recipes", "calib_data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "quantflow_llm.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
        "--wheel-dir", place, source,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    (found,) = place.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


def quantflow(
    installed: Path, folder: Path, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """The installed command, in a folder. Its path is the wheel's and the test environment's, not
    the repository's."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    code = "import quantflow.cli.main as cli, sys; print(cli.__file__, file=sys.stderr); cli.main()"
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )
    assert done.stderr.splitlines()[0].startswith(str(installed)), done.stderr
    return done


def test_the_wheel_holds_every_recipe_and_text_and_is_small(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "calib_data").rglob("*")]:
        assert path.is_dir() or f"quantflow/share/{path.relative_to(ROOT)}" in names
    assert {name.partition("/")[0] for name in names} >= {"quantflow", "quantflow_kernels"}
    assert not [
        name for name in names if name.startswith(("kernels/", "recipes/", "calib_data/", "tests/"))
    ]
    assert wheel.stat().st_size < MOST_BYTES


def test_a_model_is_quantised_in_an_empty_folder_with_nothing_set(
    installed: Path, tmp_path: Path
) -> None:
    write_llama(tmp_path / "my-model")
    for name in ("w4", "recipes/w4.yaml"):
        done = quantflow(installed, tmp_path, "run", name, "--model", "my-model", "--json")
        assert done.returncode == 0, done.stderr
        said = [
            line for line in done.stderr.splitlines() if "the bundled recipe w4 is taken" in line
        ]
        assert len(said) == 1 and said[0].startswith(f"{name}: ")
        found = json.loads(done.stdout)
        assert found["output"] == "artifacts/my-model_w4" and found["quality"]
    assert found["existed"]  # the same artifact, by either name
    report = json.loads((tmp_path / "artifacts" / "my-model_w4" / "report.json").read_text())
    assert any("the bundled text" in note for note in report["notes"])
    assert (
        report["calibration"]["source"] == "demo" and report["evaluation"]["source"] == "demo-new"
    )


def test_other_verbs_find_what_came_along(installed: Path, tmp_path: Path) -> None:
    schema = quantflow(installed, tmp_path, "schema")
    assert schema.returncode == 0 and json.loads(schema.stdout)["title"] == "QuantFlow recipe"
    # its model and both texts are bundled
    demo = quantflow(installed, tmp_path, "plan", "demo_w4_kv8", "--json")
    assert demo.returncode == 0 and json.loads(demo.stdout)["layers"] == 8, demo.stderr
    missing = quantflow(installed, tmp_path, "plan", "w44")
    assert missing.returncode == 2 and "Did you mean `w4`?" in missing.stderr


def test_a_source_tree_has_the_same(tmp_path: Path) -> None:
    assert bundled.recipe("w4") == bundled.recipe("recipes/w4.yaml") == ROOT / "recipes" / "w4.yaml"
    assert (
        bundled.recipe("elsewhere/w4.yaml") is None
        and bundled.recipe("w4.json") is None
        and bundled.recipe(tmp_path / "w4") is None
    )
    assert [path.stem for path in sorted((ROOT / "recipes").glob("*.yaml"))] == bundled.recipes()
