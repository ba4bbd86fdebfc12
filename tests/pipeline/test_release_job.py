"""The step of the release job that looks for the previous release's numbers, run as the job runs
it, with a `gh` that answers as told."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

WORKFLOW = Path(__file__).parents[2] / ".github" / "workflows" / "artifacts.yml"
# `gh release list`, `view` and `download`: the newest release's tag, its files' names, and an exit
# code for each.
GH = """#!/bin/sh
case "$2" in
  list) echo "$TAG" ;;
  view) printf "$ASSETS"; exit "$VIEW" ;;
  download) case "$ASSETS" in *release.json*) mkdir -p previous; echo "{}" > previous/release.json ;; *) exit 1 ;; esac ;;
esac
"""


@pytest.mark.parametrize(
    ("tag", "assets", "view", "code", "compared"),
    [
        ("v1", "first.tar\nrelease.json\n", 0, 0, True),
        ("v1", "first.tar\nfirst.release.json\n", 0, 0, False),
        ("v1", "", 0, 0, False),
        ("", "", 0, 0, False),
        ("v1", "", 1, 1, False),  # no answer is not "none"
    ],
)
def test_the_previous_releases_numbers(
    tmp_path: Path, tag: str, assets: str, view: int, code: int, compared: bool
) -> None:
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["build"]["steps"]
    (script,) = (
        step["run"] for step in steps if step.get("name") == "The previous release's numbers"
    )
    (tmp_path / "gh").write_text(GH)
    (tmp_path / "gh").chmod(0o755)
    (tmp_path / "variables").touch()
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "GITHUB_ENV": str(tmp_path / "variables"),
        "GITHUB_REF_NAME": "v2",
        "TAG": tag,
        "ASSETS": assets,
        "VIEW": str(view),
    }
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert (tmp_path / "previous" / "release.json").is_file() is compared
    assert (tmp_path / "variables").read_text() == ("PREVIOUS=previous\n" if compared else "")
    assert ("nothing to compare with" in done.stdout) is (code == 0 and not compared)
