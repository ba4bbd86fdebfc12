"""A model given by its place in the hub's cache; the caches made here are such by huggingface_hub's
own reckoning."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir

from quantflow.checkpoints.checkpoint import Checkpoint, resolve_model
from quantflow.errors import ModelError
from tests.helpers.runs import invoke
from tests.helpers.tiny import write_llama

OLD, NEW = "0a" * 20, "1b" * 20


def cached(hub: Path, name: str, *revisions: str, main: str = "") -> Path:
    """A repository of the cache: blobs, snapshots of links to them, and what refs/main says, if
    anything."""
    repository = hub / f"models--{name.replace('/', '--')}"
    for seed, revision in enumerate(revisions):
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir(exist_ok=True)
        for file in write_llama(hub.parent / f"source-{revision}", seed=seed).iterdir():
            blob = repository / "blobs" / f"{revision}-{file.name}"
            file.rename(blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    if main:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(main)
    return repository


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def test_every_place_that_stands_for_a_model(hub: Path) -> None:
    repository = cached(hub, "org/name", OLD, NEW, main=NEW)
    (info,) = scan_cache_dir(hub).repos
    assert info.repo_id == "org/name" and info.refs["main"].commit_hash == NEW
    wanted = repository / "snapshots" / NEW
    places = (
        repository,
        repository / "snapshots",
        wanted,
        hub,
        hub.parent,
        hub / "org" / "name",
        hub.parent / "org" / "name",
    )
    for place in places:
        assert resolve_model(str(place)) == wanted, place
    assert resolve_model(str(repository / "snapshots" / OLD)).name == OLD
    assert not Checkpoint(wanted).problems()  # whose files are links out of it
    assert NEW in invoke("inspect", repository, "--json").stdout
    assert invoke("generate", repository, "--prompt", "The", "--max-tokens", 1).exit_code == 0


def test_the_only_snapshot_needs_no_ref(hub: Path) -> None:
    repository = cached(hub, "org/name", OLD)
    assert (
        resolve_model(str(repository)).name
        == resolve_model(str(repository / "snapshots")).name
        == OLD
    )


def test_what_leaves_a_choice_is_refused(hub: Path) -> None:
    repository = cached(hub, "org/name", OLD, NEW)
    with pytest.raises(ModelError, match=rf"2 snapshots and no refs/main: {OLD}, {NEW}"):
        resolve_model(str(repository))
    cached(hub, "org/other--name", "2c" * 20)
    with pytest.raises(
        ModelError,
        match=r"a cache of 2 models: org/name, org/other--name;.* Name it: .*models--org--name",
    ):
        resolve_model(str(hub))


@pytest.mark.parametrize("main", ["2c" * 20, "../../../etc", "", "\xff"])
def test_a_ref_that_leads_nowhere(hub: Path, main: str) -> None:
    repository = cached(hub, "org/name", OLD, main="x")
    (repository / "refs" / "main").write_text(main)
    with pytest.raises(
        ModelError, match=rf"refs/main: revision .*which has no snapshot; expected one of {OLD}"
    ):
        resolve_model(str(repository))


def test_nothing_there(hub: Path) -> None:
    (hub / "models--org--name" / "blobs").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"no snapshot of the model.*Is the download complete"):
        resolve_model(str(hub / "models--org--name"))
    (hub / "datasets--org--data" / "snapshots").mkdir(parents=True)
    with pytest.raises(ModelError, match="a repository of datasets"):
        resolve_model(str(hub / "datasets--org--data"))


def test_a_model_directory_of_any_name_is_itself(tmp_path: Path) -> None:
    for name in ("models--org--name", "snapshots", "hub"):
        assert resolve_model(str(write_llama(tmp_path / name))) == tmp_path / name
    (tmp_path / "models--a--b").mkdir()
    folder = write_llama(tmp_path)
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize("main", [OLD, NEW, ""])
def test_a_link_among_the_snapshots_names_nothing_of_the_readers(
    hub: Path, tmp_path: Path, main: str
) -> None:
    repository = cached(hub, "org/name", OLD, main=main)
    (repository / "snapshots" / NEW).symlink_to(write_llama(tmp_path / "elsewhere"))
    if main == NEW:
        with pytest.raises(
            ModelError, match=rf"revision '{NEW}', which has no snapshot; expected one of {OLD}"
        ):
            resolve_model(str(repository))
    else:
        assert resolve_model(str(repository)).name == OLD


def test_the_cache_itself_may_be_a_link(hub: Path, tmp_path: Path) -> None:
    repository = cached(hub, "org/name", OLD, main=OLD)
    (tmp_path / "link").symlink_to(hub)
    assert (
        resolve_model(str(tmp_path / "link" / "org" / "name")).resolve()
        == (repository / "snapshots" / OLD).resolve()
    )


def test_a_ref_that_cannot_be_read_is_no_traceback(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = cached(hub, "org/name", OLD, main=OLD)

    def refuse(*arguments: object, **options: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ModelError, match="refs/main: Permission denied; expected a readable file"):
        resolve_model(str(repository))
