"""Every notebook runs without an error, and what is committed is a run's output, small, and of no
particular machine."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat
import pytest

from notebooks.execute import execute

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
MOST_BYTES = 1_500_000  # of all of them
# Places on a machine: absolute paths of Unix (no URL, no relative one, no closing tag) and Windows,
# and addresses of objects.
PRIVATE = re.compile(r"(?<![\w.:/<~])/[\w.-]+/|\b[A-Z]:\\|\bat 0x[0-9a-f]{6,}")


def texts(cell: nbformat.NotebookNode) -> str:
    """All that a cell's outputs say."""
    parts = []
    for output in cell.get("outputs", []):
        parts += [
            output.get("text", ""),
            *(value for kind, value in output.get("data", {}).items() if kind.startswith("text/")),
        ]
    return "\n".join(parts)


def test_the_index_names_them_all() -> None:
    index = (ROOT / "notebooks" / "README.md").read_text()
    assert re.findall(r"\(([^()]+)\.ipynb\)", index) == NAMES


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("/data/models/x", True),
        ("in '/a/b.txt'", True),
        ("C:\\Users", True),
        ("<Figure at 0x7f12ab34cd>", True),
        ("artifacts/first/report.html", False),
        ("https://example.org/a/b", False),
        ("</b></i>", False),
        ("~/x/y", False),
        ("6 / 255", False),
    ],
)
def test_what_counts_as_a_place(text: str, private: bool) -> None:
    assert bool(PRIVATE.search(text)) is private


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where matplotlib lists this machine's fonts, once for all notebooks."""
    return tmp_path_factory.mktemp("caches")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_runs(path: Path, tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the folder beside the bundled files, the package as it stands in this checkout."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / "calib_data").symlink_to(ROOT / "calib_data")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("MPLCONFIGDIR", str(caches / "matplotlib"))
    monkeypatch.setenv("IPYTHONDIR", str(caches / "ipython"))
    # raises for a cell that fails
    done = execute(tmp_path / "notebooks" / path.name, tmp_path / "notebooks")
    committed = nbformat.read(path, as_version=4)
    assert [cell.source for cell in done.cells] == [cell.source for cell in committed.cells]
    for cell, kept in zip(done.cells, committed.cells, strict=True):
        kinds = [[output.output_type for output in one.get("outputs", [])] for one in (cell, kept)]
        assert kinds[0] == kinds[1], (
            f"`make notebooks` would write another kind of output below: {cell.source}"
        )
        assert not PRIVATE.search(texts(cell)), texts(cell)
    assert {p.name for p in (tmp_path / "notebooks").iterdir()} - {"__pycache__"} == {
        p.name for p in (ROOT / "notebooks").iterdir()
    } - {"__pycache__", ".ipynb_checkpoints"}, "nothing is left behind"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_what_is_committed(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), (
        "run from top to bottom"
    )
    assert sum(bool(cell.outputs) for cell in code) >= len(code) / 2
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith(
        f"# {path.stem[:2]} "
    )
    for cell in notebook.cells:
        assert dict(cell.metadata) == {}, "no times of execution"
        assert "\x1b" not in texts(cell) and not PRIVATE.search(texts(cell)), texts(cell)
        assert all(
            output.output_type != "error" and output.get("name") != "stderr"
            for output in cell.get("outputs", [])
        )
    kernel, language = notebook.metadata.kernelspec, notebook.metadata.language_info
    assert (kernel.display_name, dict(language)) == ("Python 3", {"name": "python"}), (
        "no particular environment or version"
    )


def test_they_are_small() -> None:
    assert sum(path.stat().st_size for path in NOTEBOOKS) < MOST_BYTES
