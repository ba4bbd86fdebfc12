"""The statement's parts: the commit of the source, names and sums. A whole one is checked in
tests/pipeline/test_release.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from quantflow.artifacts.provenance import checksums, is_uri, own_source, resource

IDENTITY = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *IDENTITY, *arguments],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package in a git checkout with one commit, `kernels` and `docs` beside it."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for other in ("kernels", "docs"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "file").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return folder


def test_the_commit_of_a_checkout(package: Path) -> None:
    assert own_source(package) == {
        "name": "quantflow",
        "digest": {"gitCommit": git(package, "rev-parse", "HEAD")},
        "annotations": {"role": "source"},
    }


@pytest.mark.parametrize(
    ("file", "counts"),
    [("package/__init__.py", True), ("kernels/file", True), ("docs/file", False)],
)
def test_a_change_of_what_computes_is_told(package: Path, file: str, counts: bool) -> None:
    (package.parent / file).write_text("changed = True")
    found = own_source(package)
    assert found is not None and found["annotations"] == {
        "role": "source",
        **({"modified": True} if counts else {}),
    }


@pytest.mark.parametrize(
    ("remote", "uri"),
    [
        ("https://name:secret@example.org:8443/a/b.git", "git+https://example.org:8443/a/b.git"),
        ("ssh://git@example.org/a/b", "git+ssh://git@example.org/a/b"),
        ("/srv/somewhere", None),
        ("file:///srv/somewhere", None),
        ("ssh://me:secret@example.org/a/b", "git+ssh://example.org/a/b"),
        ("git@example.org:a/b.git", "git+ssh://git@example.org/a/b.git"),
        ("me@example.org:/a/b", "git+ssh://example.org/a/b"),
    ],
)
def test_a_remote_is_named_without_passwords_and_places(
    package: Path, remote: str, uri: str | None
) -> None:
    git(package, "remote", "add", "origin", remote)
    found = own_source(package)
    assert found is not None and found.get("uri") == uri


def test_an_environment_inside_a_checkout_is_no_source(package: Path) -> None:
    installed = package.parent / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert own_source(installed) is None


def test_no_git_no_source(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(package))
    assert own_source(package) is None


def test_resources_leave_out_what_is_not_known() -> None:
    assert resource("a", "text", uri="https://example.org/a", tokens=None) == {
        "name": "a", "uri": "https://example.org/a", "annotations": {"role": "text"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("https://example.org/x", True),
        ("urn:a:b", True),
        ("example.org/x", False),
        ("HTTPS://x", False),
        ("a: b", False),
    ],
)
def test_uris(text: str, is_one: bool) -> None:
    assert is_uri(text) is is_one


def test_a_name_that_sums_cannot_hold_is_refused() -> None:
    assert checksums({"b c": "2" * 64, "a": "1" * 64}) == "1" * 64 + "  a\n" + "2" * 64 + "  b c\n"
    with pytest.raises(ValueError, match="cannot be listed"):
        checksums({"a\nb": "0" * 64})
