"""The documentation site: it is built without a warning, a broken link is one, and its reference
has every public name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import quantflow
from tests.helpers.pages import ROOT, every_page

needs_sphinx = pytest.mark.skipif(
    not all(map(find_spec, ("sphinx", "myst_parser", "furo"))),
    reason="sphinx, myst-parser or furo is not installed: pip install 'quantflow-llm[docs]'",
)


def build(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """As `make docs` does it."""
    options = ["-q", "-W", "--keep-going", "-c", str(ROOT / "docs" / "site"), "-b", "html"]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(source), str(output)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )


def test_the_reference_has_the_public_names() -> None:
    text = (ROOT / "docs" / "api" / "index.rst").read_text(encoding="utf-8")
    shown = re.findall(r"^\.\. auto\w+:: quantflow\.(\w+)$", text, re.M)
    assert sorted(shown) == sorted(quantflow.__all__)


def test_make_docs_builds_as_here() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "sphinx -q -W --keep-going -c docs/site -b html . build/docs" in text


@needs_sphinx
def test_the_site_is_built_with_every_page_and_its_docstrings(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for page in every_page():
        assert (tmp_path / page.relative_to(ROOT)).with_suffix(".html").is_file(), page
    reference = (tmp_path / "docs" / "api" / "index.html").read_text(encoding="utf-8")
    for name in quantflow.__all__:
        assert f'id="quantflow.{name}"' in reference
    assert "goes on where it stopped" in " ".join(reference.split())  # of quantize's docstring


@needs_sphinx
@pytest.mark.parametrize("target", ["absent.md", "there.md#absent"])
def test_a_broken_link_fails(tmp_path: Path, target: str) -> None:
    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / "there.md").write_text("# There\n")
    (pages / "index.md").write_text(f"# Pages\n[there](there.md), [that]({target})\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and "absent" in done.stderr
