"""An artifact directory: built under a temporary name, renamed when whole. Its manifest is
`quantflow.json`.

quantflow.json           manifest: recipe, identity, status, formats, provenance, quality, and size
                         and sha256 of every file
report.json              what was asked and done, every linear, fallbacks, quality
report.html              the same to look at: drawn from it, and outside the artifact's identity
calibration.safetensors  calibrate's statistics
kv_qparams.safetensors   scales and zero points of the KV cache
run.json                 times, host, memory, the model's place: outside the artifact's identity
<checkpoint files>       in the directory itself or, for several formats, in one folder a format
tp2/rank-0/, …           tensor-parallel ranks, beside the checkpoint they come from

What `export` writes has a manifest too, of kind `export`: where it comes from, and the same of its
files. It has no report.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from quantflow.artifacts.fingerprint import file_digest
from quantflow.checkpoints.directory import is_place, read_json
from quantflow.errors import ModelError, OutputError, Problem

MANIFEST = "quantflow.json"
KV_FILE = "kv_qparams.safetensors"
STATISTICS = "calibration.safetensors"
REPORT, PAGE = "report.json", "report.html"
RUN = "run.json"
EXPORT = "export"  # the kind of a manifest that `export` wrote; a recipe's has none
MANIFEST_KEYS = {
    "name": str, "fingerprint": str, "status": str, "failed_gates": list, "formats": dict,
    "source": dict, "quality": dict, "files": dict,
}  # fmt: skip


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of an artifact, or None where there is none. Raises ModelError for one that is
    damaged."""
    place = path / MANIFEST
    if not place.is_file():
        return None
    manifest = read_json(place)
    problems = [
        Problem(
            f"{place} {key}",
            repr(manifest.get(key))[:80],
            f"{kind.__name__}",
            "The manifest is damaged: run the recipe again",
        )
        for key, kind in MANIFEST_KEYS.items()
        if not isinstance(manifest.get(key), kind)
    ]
    if not problems:
        parts = [*manifest["formats"].values(), *manifest["files"]]
        outside = [f"{p!r}"[:200] for p in parts if not is_place(p)]
        problems = [
            Problem(f"{place}", f"the place {p}", "a place in the artifact") for p in outside[:20]
        ]
        problems += _misshapen(place, manifest)
    if problems:
        raise ModelError(problems)
    return manifest


def _misshapen(place: Path, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong within the keys of a manifest that are there."""
    export, source = manifest.get("kind") == EXPORT, manifest["source"]
    hint = (
        "The manifest is damaged: export again"
        if export
        else "The manifest is damaged: run the recipe again"
    )
    for key in ("model", "format") if export else ("model",):
        if not isinstance(source.get(key), str):
            yield Problem(f"{place} source {key}", repr(source.get(key))[:80], "a text", hint)
    if not isinstance(source.get("weights"), str | None):
        yield Problem(
            f"{place} source weights", repr(source["weights"])[:80], "a digest, or null", hint
        )
    if export and len(manifest["formats"]) != 1:
        yield Problem(
            f"{place} formats", f"{len(manifest['formats'])} formats", "one, as an export has", hint
        )
    kv = manifest.get("kv_qparams")
    if kv is not None and not (
        isinstance(kv, dict) and {"bits", "granularity", "symmetric"} <= set(kv)
    ):
        yield Problem(
            f"{place} kv_qparams", repr(kv)[:80], "bits, granularity and symmetric, or null", hint
        )


def is_export(path: Path) -> bool:
    """Whether `export` wrote this: nothing can make it again but its source, which may be gone."""
    try:
        return (read_manifest(path) or {}).get("kind") == EXPORT
    except ModelError:
        return False


def kv_file(folder: Path) -> Path | None:
    """The KV-cache parameters of a checkpoint: beside its files, or those of the artifact that it
    is a part of; None without any."""
    return next((p for p in (folder / KV_FILE, folder.parent / KV_FILE) if p.is_file()), None)


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """`bytes` and `sha256` of every file of an artifact but the manifest, `run.json` and the page,
    by relative path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = {str(p.relative_to(folder)): p for p in files}
    return {
        n: {"bytes": p.stat().st_size, "sha256": file_digest(p)}
        for n, p in names.items()
        if n not in (MANIFEST, RUN, PAGE)
    }


def is_whole(path: Path, manifest: dict[str, Any]) -> bool:
    """Whether every file that the manifest lists is there in its full size (contents are not
    read)."""
    try:
        return all(
            (path / name).stat().st_size == entry["bytes"]
            for name, entry in manifest["files"].items()
        )
    except (OSError, KeyError, TypeError, AttributeError):
        return False


def foreign_files(path: Path) -> list[str]:
    """Files (hidden ones left out) in an artifact that its manifest does not list; [] where there
    is no manifest to go by."""
    try:
        manifest = read_manifest(path)
        listed = {MANIFEST, RUN, PAGE, *manifest["files"]} if manifest else None
    except (ModelError, KeyError, TypeError):
        return []
    if listed is None:
        return []
    names = (
        str(p.relative_to(path))
        for p in sorted(path.rglob("*"))
        if p.is_file() and not p.name.startswith(".")
    )
    return [name for name in names if name not in listed]


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Whether no other process holds `folder`; this one does, for as long as the block or the
    process lasts."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


@contextmanager
def building(output: Path) -> Iterator[Path]:
    """A fresh folder that takes the place of `output` when the block ends well, and vanishes when
    it does not.

    Raises OutputError where `output` holds something that is no artifact, or lies where nothing can
    be written.
    """
    output = output.resolve()  # through a link, the artifact goes where the link points
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for left in output.parent.glob(f".{escape(output.name)}.partial-*"):
            # another run may be building the same artifact with another store
            with _claimed(left) as dead:
                if dead:
                    shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        problem = f"not writable ({error.strerror})"
        raise OutputError(
            Problem(str(output.parent), problem, "a writable directory", "Choose another --output")
        ) from error
    try:
        with _claimed(partial):
            yield partial
        if output.exists():
            if any(output.iterdir()) and not (output / MANIFEST).is_file():
                raise OutputError(
                    Problem(
                        str(output),
                        "a directory with other content",
                        "an artifact of QuantFlow's, or nothing",
                    )
                )
            # Two renames, so that at no moment a mixture of two artifacts stands there.
            old = output.parent / f".{output.name}.partial-old-{os.getpid()}"
            os.replace(output, old)
            os.replace(partial, output)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(partial, output)
    except OSError as error:
        if error.filename is None:  # of a library's, which does not say of what
            error.filename = str(output)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
