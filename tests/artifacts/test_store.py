"""Results are written at once or not at all, and found again under the hash of what they depend
on."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import quantflow.artifacts.store as store_module
from quantflow.artifacts import fingerprint
from quantflow.artifacts.artifact import (
    MANIFEST,
    MANIFEST_KEYS,
    RUN,
    building,
    file_entries,
    foreign_files,
    is_whole,
    read_manifest,
)
from quantflow.artifacts.fingerprint import closure, code_digest, digest, file_digest
from quantflow.artifacts.store import Store, write_atomic, write_json
from quantflow.checkpoints.directory import Directory
from quantflow.errors import ModelError, OutputError
from quantflow.formats.reader import checkpoint_folder

KEY = "0123456789abcdef0123456789abcdef"
LAYER = save({"x": torch.arange(3)})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# Writing


def test_write_atomic_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b.bin", b"\0\1")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["a", "a/b.bin"]
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"\0\1"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"b": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and json.loads(path.read_text()) == {
        "b": 1
    }


def test_json_keeps_the_order_of_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"é": [1.5, None], "a": 1})
    assert (
        tmp_path / "a"
    ).read_bytes() == '{\n  "é": [\n    1.5,\n    null\n  ],\n  "a": 1\n}\n'.encode()


# Layers


def test_finished_layers_stop_at_the_first_gap(store: Store) -> None:
    assert store.finished_layers(KEY, 4) == 0
    for index in (0, 1, 3):
        write_atomic(store.layer(KEY, index), LAYER)
    assert store.finished_layers(KEY, 4) == 2
    write_atomic(store.layer(KEY, 2), LAYER)
    assert store.finished_layers(KEY, 4) == 4 and store.finished_layers(KEY, 3) == 3
    store.layer(KEY, 1).write_bytes(LAYER[:-1])
    assert store.finished_layers(KEY, 4) == 1  # a torn file is as good as none
    assert store.finished_layers("f" * 32, 4) == 0


def test_drop_streams(store: Store) -> None:
    names = [
        "stream-00000-x.bin",
        "stream-00001-x.bin",
        "layer-00001.safetensors",
        ".work-x.bin",
        "quality.json",
    ]
    for name in names:
        write_atomic(store.folder(KEY) / name, b"x")
    store.drop_streams(KEY, keep=1)
    assert {p.name for p in store.folder(KEY).iterdir()} == set(names[1:]), (
        "scratch files may be in use"
    )
    store.drop_streams(KEY)
    assert {p.name for p in store.folder(KEY).iterdir()} == set(names[2:])
    store.drop_streams("f" * 32)  # nothing there: nothing to do


def test_drop_torn(store: Store) -> None:
    torn = [
        store.root / ".hashes.json.77.tmp",
        store.folder(KEY) / ".layer-00002.safetensors.77.tmp",
        store.folder("f" * 32) / ".quality.json.77.tmp",
        store.folder(KEY) / ".work-x.bin",
    ]
    kept = [
        store.root / "hashes.json",
        store.folder(KEY) / "stream-00001-x.bin",
        store.layer(KEY, 0),
        # A store may have been put where other things lie.
        store.root / "project" / ".mail.tmp",
        store.root / ".lock",
    ]
    for path in [*torn, *kept]:
        write_atomic(path, b"x")
    store.drop_torn()
    assert not [p for p in torn if p.exists()] and [p for p in kept if p.exists()] == kept


def test_forget(store: Store) -> None:
    write_atomic(store.layer(KEY, 0), LAYER)
    other = "f" * 32
    write_atomic(store.layer(other, 0), LAYER)
    store.forget(KEY)
    store.forget(KEY)
    assert store.finished_layers(KEY, 1) == 0 and store.finished_layers(other, 1) == 1


def test_json_results(store: Store) -> None:
    assert store.read_json(KEY, "quality") is None
    store.write_json(KEY, "quality", {"kl": 0.5})
    assert store.read_json(KEY, "quality") == {"kl": 0.5}
    path = store.folder(KEY) / "quality.json"
    path.write_bytes(path.read_bytes()[:-4])
    assert store.read_json(KEY, "quality") is None, "a torn file is as good as none"


# Content hashes


def weights(path: Path, header: bytes = b'{"a": 1}', data: bytes = b"data") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose content was read."""
    seen: list[Path] = []

    def note(path: Path) -> str:
        seen.append(path)
        return file_digest(path)

    monkeypatch.setattr(store_module, "file_digest", note)
    return seen


def test_content_hashes_are_computed_once(store: Store, tmp_path: Path, hashed: list[Path]) -> None:
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b", data=b"other")
    assert store.cached_digests([a]) is None and hashed == []
    found = store.digests([a, b])
    assert found == {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in (a, b)} and hashed == [
        a,
        b,
    ]
    assert Store(store.root).digests([b, a]) == found == store.cached_digests(
        [a, b]
    ) and hashed == [a, b]
    c = weights(tmp_path / "c")
    assert store.cached_digests([a, c]) is None
    store.digests([a, c])
    assert hashed == [a, b, c]


@pytest.mark.parametrize("change", ["size", "mtime", "header"])
def test_a_file_that_changed_is_hashed_again(
    store: Store, tmp_path: Path, hashed: list[Path], change: str
) -> None:
    path = weights(tmp_path / "a")
    store.digests([path])
    status = path.stat()
    times = (status.st_atime_ns, status.st_mtime_ns)
    if change == "size":
        weights(path, data=b"longer data")
    elif change == "header":
        weights(path, header=b'{"b": 1}')
    else:
        times = (times[0], times[1] + 1)
    os.utime(path, ns=times)
    assert store.cached_digests([path]) is None
    assert store.digests([path]) == {path: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert hashed == [path, path]


@pytest.mark.parametrize("content", ["", "[1]", '{"a": ', "\x00"])
def test_a_damaged_cache_of_hashes_is_as_good_as_none(
    store: Store, tmp_path: Path, content: str
) -> None:
    path = weights(tmp_path / "a")
    write_atomic(store.root / "hashes.json", content.encode())
    assert store.cached_digests([path]) is None
    assert store.digests([path])[path] == hashlib.sha256(path.read_bytes()).hexdigest()


# Fingerprints


def test_digest_leaves_out_the_order_of_mappings_and_nothing_else() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    values = [
        {"a": 1}, {"a": 2}, {"a": "1"}, {"a": 1.5}, {"b": 1}, ["a", 1], {"a": [1, 2]},
        {"a": [2, 1]}, {"a": None}, {"a": True}, {},
    ]  # fmt: skip
    assert len({digest(v) for v in values}) == len(values)
    assert digest("é") == hashlib.sha256('"é"'.encode()).hexdigest()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in place of ours, and kernels in place of those."""
    files = {
        "quantflow/__init__.py": "",
        "quantflow/quant/__init__.py": "from quantflow.quant import shared",
        "quantflow/quant/shared.py": "",
        "quantflow/quant/a.py": (
            "import torch\ndef f():\n    try:\n        from quantflow.quant.b import x\n   "
            " finally:\n        pass"
        ),
        "quantflow/quant/b.py": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from quantflow import typed\n"
            "from quantflow_kernels import (\n    fast,\n)"
        ),
        "quantflow/typed.py": "",
        "quantflow/other.py": "from quantflow.quant import a",
        "quantflow_kernels/__init__.py": "",
        "quantflow_kernels/fast.py": "",
        "quantflow_kernels/fast.c": "",
        "quantflow_kernels/slow.c": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(fingerprint, "_PACKAGE", tmp_path / "quantflow")
    monkeypatch.setattr(fingerprint, "_kernels", lambda: tmp_path / "quantflow_kernels")
    return tmp_path


def test_the_closure_of_imports_by_hand(package: Path) -> None:
    used = (
        "quantflow.quant",
        "quantflow.quant.a",
        "quantflow.quant.b",
        "quantflow.quant.shared",
        "quantflow_kernels.fast",
    )
    assert tuple(sorted(closure("quantflow.quant.a"))) == used
    assert (
        closure("quantflow.quant.a")["quantflow_kernels.fast"]
        == package / "quantflow_kernels" / "fast.py"
    )
    with pytest.raises(ModuleNotFoundError, match=r"quantflow\.gone"):
        closure("quantflow.quant.a", "quantflow.gone")


@pytest.mark.parametrize(
    ("file", "seen"),
    [
        ("quantflow/quant/b.py", True),
        ("quantflow/quant/__init__.py", True),
        ("quantflow_kernels/fast.c", True),
        ("quantflow/typed.py", False),
        ("quantflow/other.py", False),
        ("quantflow_kernels/slow.c", False),
        ("quantflow/__init__.py", False),
    ],
)
def test_an_identity_changes_with_what_can_change_a_result(
    package: Path, file: str, seen: bool
) -> None:
    before = code_digest.__wrapped__("quantflow.quant.a")
    assert code_digest.__wrapped__("quantflow.quant.a") == before
    assert code_digest.__wrapped__("quantflow.quant.a", alone=("quantflow.other",)) != before
    (package / file).write_text((package / file).read_text() + "\n# changed")
    assert (code_digest.__wrapped__("quantflow.quant.a") != before) == seen


def test_an_identity_changes_with_the_libraries(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()
    for installed in (
        {"torch": "2.13.0", "triton": "3.6"},
        {"torch": "2.14.0", "triton": "3.6"},
        {"torch": "2.13.0", "triton": ""},
    ):
        monkeypatch.setattr(fingerprint, "_version", installed.__getitem__)
        found.add(code_digest.__wrapped__("quantflow.quant.a"))
    assert len(found) == 3


# The artifact's folder


def fill(folder: Path, content: bytes = b"new") -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "a.bin").write_bytes(content)
    (folder / RUN).write_text("{}")
    keys = {key: kind() for key, kind in MANIFEST_KEYS.items()}
    write_json(
        folder / MANIFEST,
        {**keys, "source": {"model": "m", "weights": None}, "files": file_entries(folder)},
    )


def test_an_artifact_appears_at_once(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "artifact"
    with building(output) as folder:
        assert folder.parent == output.parent
        fill(folder)
        assert not output.exists()
    assert (output / "sub" / "a.bin").read_bytes() == b"new" and [
        p.name for p in output.parent.iterdir()
    ] == ["artifact"]


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt(), ModelError("a: b")])
def test_a_build_that_fails_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    output = tmp_path / "artifact"
    with building(output) as folder:
        fill(folder, b"old")
    with pytest.raises(type(error)), building(output) as folder:
        fill(folder)
        raise error
    assert (output / "sub" / "a.bin").read_bytes() == b"old" and [
        p.name for p in tmp_path.iterdir()
    ] == ["artifact"]


def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    alive = ".art[1].partial-77"  # another run holds it
    for name in (".art[1].partial-12", ".art[1].partial-old-12", ".other.partial-12", alive):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(b"x")
    handle = os.open(tmp_path / alive, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with building(tmp_path / "art[1]") as folder:
        fill(folder)
    os.close(handle)
    assert {p.name for p in tmp_path.iterdir()} == {".other.partial-12", "art[1]", alive}


def test_the_old_artifact_is_replaced_whole(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    with building(output) as folder:
        fill(folder, b"old")
        (folder / "only-in-old").write_bytes(b"")
    with building(output) as folder:
        fill(folder)
    assert sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()) == [
        MANIFEST,
        RUN,
        "sub/a.bin",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_other_peoples_folders_are_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter.tex").write_text("years")
    with pytest.raises(OutputError, match="other content"), building(output) as folder:
        fill(folder)
    assert (output / "chapter.tex").read_text() == "years" and [
        p.name for p in tmp_path.iterdir()
    ] == ["thesis"]
    (tmp_path / "empty").mkdir()
    with building(tmp_path / "empty") as folder:
        fill(folder)
    assert (tmp_path / "empty" / MANIFEST).is_file()


def test_file_entries_and_is_whole(tmp_path: Path) -> None:
    fill(tmp_path, b"abc")
    manifest = read_manifest(tmp_path)
    assert manifest is not None and manifest["files"] == {
        "sub/a.bin": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    }
    assert is_whole(tmp_path, manifest) and foreign_files(tmp_path) == []
    (tmp_path / "sub" / "a.bin").write_bytes(b"ab")
    assert not is_whole(tmp_path, manifest)
    (tmp_path / "sub" / "a.bin").unlink()
    assert not is_whole(tmp_path, manifest)
    for wrong in ({}, {"files": {"sub/a.bin": "text"}}, {"files": ["a"]}, {"files": {"sub": {}}}):
        assert not is_whole(tmp_path, wrong)


def test_foreign_files(tmp_path: Path) -> None:
    assert foreign_files(tmp_path / "nowhere") == []
    fill(tmp_path)
    (tmp_path / "sub" / "notes.txt").write_text("mine")
    (tmp_path / ".DS_Store").write_bytes(b"")
    assert foreign_files(tmp_path) == ["sub/notes.txt"]
    (tmp_path / MANIFEST).write_text("{")
    assert foreign_files(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    ["x" * 256, "a/" + "x" * 300, "a/" * 600, "a\0b", "../x", "/x", "a/../../x"],
    ids=range(7),
)
def test_places_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    """They come from a file: the system's own objection to one would be no message."""
    write_json(
        tmp_path / "model.safetensors.index.json", {"weight_map": {"t": f"{name}.safetensors"}}
    )
    write_json(tmp_path / "config.json", {})
    with pytest.raises(ModelError, match="weight file"):
        Directory(tmp_path)
    (tmp_path / "config.json").unlink()
    manifest = {key: kind() for key, kind in MANIFEST_KEYS.items()}
    for changed in (
        {"formats": {"awq": name}},
        {"formats": {"awq": "a"}, "files": {name: {"bytes": 1}}},
    ):
        write_json(tmp_path / MANIFEST, {**manifest, **changed})
        with pytest.raises(ModelError, match="a place in the artifact"):
            read_manifest(tmp_path)
    write_json(tmp_path / MANIFEST, {**manifest, "formats": {"awq": name}})
    with pytest.raises(ModelError, match="a folder of the artifact"):
        checkpoint_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": {}}, ["source model: None; expected a text"]),
        (
            {"source": {"model": "m", "weights": 3}},
            ["source weights: 3; expected a digest, or null"],
        ),
        (
            {"kv_qparams": {"bits": 8}},
            ["kv_qparams: {'bits': 8}; expected bits, granularity and symmetric"],
        ),
        (
            {"kind": "export", "source": {}},
            ["source model: None", "source format: None", "formats: 0 formats; expected one"],
        ),
        (
            {
                "kind": "export",
                "formats": {"awq": ".", "gptq": "g"},
                "source": {"model": "m", "format": "awq"},
            },
            ["formats: 2 formats"],
        ),
    ],
)
def test_a_manifest_of_another_shape_is_a_message(
    tmp_path: Path, changes: dict[str, Any], said: list[str]
) -> None:
    """Wherever it is read: `inspect` and `compare` had tracebacks."""
    keys = {key: kind() for key, kind in MANIFEST_KEYS.items()}
    write_json(tmp_path / MANIFEST, {**keys, "source": {"model": "m"}, **changes})
    with pytest.raises(ModelError) as caught:
        read_manifest(tmp_path)
    assert len(caught.value.problems) == len(said)
    for problem, text in zip(caught.value.problems, said, strict=True):
        assert text in str(problem) and problem.hint.startswith("The manifest is damaged: ")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_place_that_cannot_be_written_is_the_users_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(OutputError, match=f"^{re.escape(str(tmp_path))}: not writable .*--output"),
        building(tmp_path / "out"),
    ):
        pytest.fail("nothing was made")


def test_a_full_disk_is_named_though_the_write_does_not_say_of_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left") as raised, building(tmp_path / "out"):
        raise full
    assert raised.value.filename == str(tmp_path / "out") and not list(tmp_path.iterdir())

    def refuse(_: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="quota") as raised:
        write_atomic(tmp_path / "x.json", b"{}")
    assert raised.value.filename == str(tmp_path / "x.json") and not list(tmp_path.iterdir())
