"""What is installed: a name of our own, dependencies that are imported, one set that was tested;
and what is said where another project's `quantflow` stands in ours' place."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import quantflow_llm
from quantflow import __version__
from quantflow.distribution import NAME, missing, shared

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
IMPORTED_AS = {
    "huggingface_hub": "huggingface-hub",
    "prometheus_client": "prometheus-client",
    "prompt_toolkit": "prompt-toolkit",
    "yaml": "pyyaml",
}
BROUGHT = {"pydantic_core": "pydantic", "starlette": "fastapi"}
"""What a dependency is a part of, and would be nothing without."""
NOT_OURS = {"llama_cpp"}  # `bench` measures it where it is
RUNS_WITHOUT = {"httptools"}  # uvicorn takes it for faster parsing where it is
FOREIGN = '"""Quantitative analysis and pricing"""\n__version__ = "1.2.0"\n'


def names(requirements: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(text) for text in requirements]
    return {found.name.lower(): found for found in parsed}


def imported(tops: tuple[str, ...]) -> set[str]:
    """Distributions that the code below `tops` imports, anywhere in it."""
    modules: set[str] = set()
    for path in (path for top in tops for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                modules.add(node.module.split(".")[0])
    modules -= {*sys.stdlib_module_names, "quantflow", "quantflow_kernels", *NOT_OURS}
    return {BROUGHT.get(name, IMPORTED_AS.get(name, name)) for name in modules}


def test_the_product_depends_on_what_it_imports_and_on_nothing_else() -> None:
    core, extras = names(PROJECT["dependencies"]), names([*EXTRAS["serve"], *EXTRAS["lm-eval"]])
    used = imported(("quantflow", "kernels"))
    assert used - {*core, *extras} == set(), "imported, and declared nowhere"
    assert {*core, *extras} - used - RUNS_WITHOUT == set(), "declared, and imported nowhere"


def test_every_dependency_has_a_floor_and_a_ceiling_and_was_tested_within_them() -> None:
    pins = names(
        [
            line
            for line in (ROOT / "constraints.txt").read_text().splitlines()
            if line and not line.startswith("#")
        ]
    )
    for text in [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]:
        asked = Requirement(text)
        if asked.name == NAME:
            assert asked.extras <= set(EXTRAS)
            continue
        bounds = {bound.operator for bound in asked.specifier}
        assert bounds == {">=", "<"}, text
        pin = pins.get(asked.name.lower()) or pins[asked.name.lower().replace("-", "_")]
        for bound in pin.specifier:
            assert bound.version in asked.specifier, f"constraints.txt has {pin}, outside of {text}"


def documents() -> Iterator[Path]:
    """Everything that is written for somebody to read, or says something."""
    skipped = {".git", ".venv", "build", "artifacts", "results", "vectors", "made_elsewhere"}
    for path in ROOT.rglob("*"):
        if not skipped & set(path.relative_to(ROOT).parts) and (
            path.suffix in {".md", ".py", ".rst", ".toml", ".yaml", ".yml", ".ipynb", ".html"}
            or path.name in {"Makefile", "constraints.txt", "run"}
        ):
            yield path


def wrong_installs(text: str) -> list[str]:
    """Commands that would install the registry's `quantflow`."""
    return re.findall(
        r"(?:pipx? install|uv add|uv tool install|uvx)[^\n`&;|#]*?[ '\"]quantflow(?![\w/.-])", text
    )


def test_nothing_tells_anybody_to_install_another_project() -> None:
    for path in documents():
        if path != Path(__file__):
            assert not wrong_installs(path.read_text(encoding="utf-8", errors="replace")), path


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("pip install quantflow", True),
        ("pip install -U 'quantflow[serve]'", True),
        ("uv add quantflow==0.1", True),
        ("pip install 'quantflow-llm[serve]'", False),
        ("pip install -c constraints.txt -e . && quantflow run w4", False),
        ("pip install .\nquantflow run w4", False),
        ("pip uninstall quantflow quantflow-llm", False),
    ],
)
def test_the_check_itself(text: str, wrong: bool) -> None:
    assert bool(wrong_installs(text)) == wrong


def test_the_name_and_the_version_are_the_same_everywhere() -> None:
    assert PROJECT["name"] == NAME == quantflow_llm.NAME
    assert PROJECT["version"] == __version__
    assert PROJECT["scripts"] == {"quantflow": f"{quantflow_llm.__name__}:main"}


def test_a_missing_extra_is_one_that_exists_and_is_said_how_to_install() -> None:
    assert (
        str(missing("quantflow serve", "uvicorn", "serve"))
        == "quantflow serve: the package uvicorn is not installed. pip install"
        " 'quantflow-llm[serve]'"
    )
    for path in (ROOT / "quantflow").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "missing":
                extra = node.args[2]
                assert isinstance(extra, ast.Constant) and extra.value in EXTRAS, path


# Another project's `quantflow`


def test_ours_is_told_from_theirs(tmp_path: Path) -> None:
    assert quantflow_llm.shadowed() == ""
    theirs = tmp_path / "__init__.py"
    theirs.write_text(FOREIGN)
    assert str(theirs) in quantflow_llm.shadowed(theirs)
    theirs.write_bytes(b"# \xe9\n")  # in no UTF-8
    assert str(theirs) in quantflow_llm.shadowed(theirs)
    assert "is of another project" in quantflow_llm.shadowed(tmp_path / "in.zip" / "__init__.py")
    assert shared() == ""


def run(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, with `place` before everything else on the path."""
    code = f"import sys; sys.path.insert(0, {str(place)!r})\n"
    code += "import quantflow_llm; quantflow_llm.main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_where_theirs_is_imported_the_command_says_so_and_ends(tmp_path: Path) -> None:
    (tmp_path / "quantflow").mkdir()
    (tmp_path / "quantflow" / "__init__.py").write_text(FOREIGN)
    done = run(tmp_path, "--version")
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "another project" in done.stderr
    assert f"pip uninstall quantflow {NAME}" in done.stderr


def test_where_both_share_a_folder_ours_runs_and_says_so(tmp_path: Path) -> None:
    record = tmp_path / "quantflow-1.2.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: quantflow\nVersion: 1.2.0\n")
    (record / "RECORD").write_text("quantflow/__init__.py,,\nquantflow/rates/__init__.py,,\n")
    done = run(tmp_path, "--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "quantflow")
    assert len(done.stderr.splitlines()) == 1 and "quantflow 1.2.0, another" in done.stderr
