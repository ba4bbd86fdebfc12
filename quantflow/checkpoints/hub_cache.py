"""A model in the cache of the Hugging Face hub, given by the directory of its repository, of its
snapshots, or of the cache itself."""

from __future__ import annotations

import re
from pathlib import Path

from quantflow.errors import ModelError, Problem

_MODEL = "models--"


def snapshot(path: Path) -> Path:
    """The snapshot that a directory of the cache stands for: of a repository (`models--org--name`,
    or `org/name` within the cache) the one that refs/main names, else the only one; of a cache,
    that of its only model. Any other path as it is, whether or not it is there.

    Raises ModelError where several could be meant, or none is there.
    """
    if (path / "config.json").is_file() or path.is_file():
        return path
    if path.name.startswith(("datasets--", "spaces--")) and path.is_dir():
        raise ModelError(
            Problem(str(path), f"a repository of {path.name.partition('--')[0]}", "one of a model")
        )
    if path.name == "snapshots" and path.parent.name.startswith(_MODEL):
        return _of_repository(path.parent)
    if path.name.startswith(_MODEL) and path.is_dir():
        return _of_repository(path)
    for cache in (path, path / "hub"):
        if models := sorted(p for p in cache.glob(f"{_MODEL}*") if p.is_dir()):
            if len(models) > 1:
                names = ", ".join(_name(p) for p in models[:5]) + (
                    f" and {len(models) - 5} more" if len(models) > 5 else ""
                )
                raise ModelError(
                    Problem(
                        str(path),
                        f"a cache of {len(models)} models: {names}",
                        "one model",
                        f"Name it: {models[0]}",
                    )
                )
            return _of_repository(models[0])
    if not path.exists():
        for cache in (path.parent.parent, path.parent.parent / "hub"):
            inside = cache / f"{_MODEL}{path.parent.name}--{path.name}"
            if path.parent.name and inside.is_dir():
                return _of_repository(inside)
    return path


def _of_repository(repository: Path) -> Path:
    # A link to elsewhere is none: a model that somebody sent may not name files of the reader's.
    place = (repository / "snapshots").resolve()
    snapshots = sorted(
        p
        for p in (repository / "snapshots").glob("*")
        if p.is_dir() and p.resolve().parent == place
    )
    names = ", ".join(p.name for p in snapshots[:5]) + (
        f" and {len(snapshots) - 5} more" if len(snapshots) > 5 else ""
    )
    if not snapshots:
        raise ModelError(
            Problem(
                str(repository),
                "no snapshot of the model",
                "one in snapshots",
                "Is the download complete?",
            )
        )
    main = repository / "refs" / "main"
    if main.is_file():
        try:
            with open(main, "rb") as file:
                revision = file.read(100).decode("ascii", "replace").strip()
        except OSError as error:
            raise ModelError(
                Problem(str(main), error.strerror or str(error), "a readable file")
            ) from error
        if (
            re.fullmatch(r"[0-9A-Za-z]+", revision)
            and (snapshot := repository / "snapshots" / revision) in snapshots
        ):
            return snapshot
        hint = f"Download it, or give one that is there: {snapshots[0]}"
        raise ModelError(
            Problem(
                str(main), f"revision {revision!r}, which has no snapshot", f"one of {names}", hint
            )
        )
    if len(snapshots) > 1:
        hint = f"Give one of them: {snapshots[0]}"
        raise ModelError(
            Problem(
                str(repository),
                f"{len(snapshots)} snapshots and no refs/main: {names}",
                "one snapshot",
                hint,
            )
        )
    return snapshots[0]


def _name(repository: Path) -> str:
    return repository.name.removeprefix(_MODEL).replace("--", "/", 1)
