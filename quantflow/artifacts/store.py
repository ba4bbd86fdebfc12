"""The store: results per layer and per stage under the hash of everything that affects them, each
written at once or not at all.

<root>/hashes.json                 content hashes of weight files, by (path, size, mtime, header)
<root>/<key>/layer-00012.safetensors   a layer's result
<root>/<key>/stream-00012-x.bin        a stream as it left it (the latest layer's only)
<root>/<key>/*.json                    results of artifact stages
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantflow.artifacts.fingerprint import file_digest
from quantflow.checkpoints.tensor_file import TensorFile
from quantflow.errors import ModelError, Problem, UserError
from quantflow.paths import naming


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file at once or not at all, and synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, the order of keys kept: the first of an artifact's formats is the one that was
    evaluated."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


KEY_LENGTH = 20  # hexadecimal digits of a key that name its folder
KEY_FOLDER = re.compile(rf"[0-9a-f]{{{KEY_LENGTH}}}")


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the store: two runs at once would write into the same scratch files. Raises
        UserError where another one has it."""
        with open(self.root / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                hint = "Wait for it, or set QUANTFLOW_STORE"
                raise UserError(
                    Problem(str(self.root), "another run is using this store", hint=hint)
                ) from error
            yield

    def folder(self, key: str) -> Path:
        return self.root / key[:KEY_LENGTH]

    def layer(self, key: str, index: int) -> Path:
        return self.folder(key) / f"layer-{index:05}.safetensors"

    def stream(self, key: str, index: int, name: str) -> Path:
        return self.folder(key) / f"stream-{index:05}-{name}.bin"

    def finished_layers(self, key: str, layers: int) -> int:
        """How many layers, from the first on, have a result (a torn file is as good as none)."""
        for index in range(layers):
            try:
                TensorFile(self.layer(key, index))
            except ModelError:
                return index
        return layers

    def read_json(self, key: str, name: str) -> Any | None:
        """A stored result, or None where there is none (a torn file is as good as none)."""
        try:
            return json.loads((self.folder(key) / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write_json(self, key: str, name: str, value: Any) -> None:
        write_json(self.folder(key) / f"{name}.json", value)

    def forget(self, key: str) -> None:
        """Removes the results under a key."""
        shutil.rmtree(self.folder(key), ignore_errors=True)

    def drop_streams(self, key: str, keep: int | None = None) -> None:
        """Removes saved streams but those after layer `keep`."""
        for path in self.folder(key).glob("stream-*"):
            if keep is None or not path.name.startswith(f"stream-{keep:05}-"):
                path.unlink(missing_ok=True)

    def drop_torn(self) -> None:
        """Removes what killed runs left half-written or as scratch, under whatever key. The caller
        holds the store alone."""
        folders = [self.root, *(f for f in self.root.iterdir() if KEY_FOLDER.fullmatch(f.name))]
        for path in (
            path for folder in folders for path in [*folder.glob(".*.tmp"), *folder.glob(".work-*")]
        ):
            path.unlink(missing_ok=True)

    def cached_digests(self, files: Iterable[Path]) -> dict[Path, str] | None:
        """Content hashes of `files` where all are cached; None otherwise. Reads no weight."""
        cache = self._cache()
        digests = {file: cache.get(_identity(file)) for file in files}
        return (
            None
            if any(v is None for v in digests.values())
            else {k: v for k, v in digests.items() if v is not None}
        )

    def digests(
        self, files: Iterable[Path], step: Callable[[str], None] = lambda name: None
    ) -> dict[Path, str]:
        """Content hashes of `files`, computed where the cache has none. step: is told the name of
        each that has been computed."""
        cache = self._cache()
        identities = {file: _identity(file) for file in files}
        unknown = [file for file, identity in identities.items() if identity not in cache]
        if unknown:
            with ThreadPoolExecutor(2) as pool:  # hashing releases the interpreter
                for file, digest in zip(unknown, pool.map(file_digest, unknown), strict=True):
                    cache[identities[file]] = digest
                    step(file.name)
            write_json(self.root / "hashes.json", cache)
        return {file: cache[identity] for file, identity in identities.items()}

    def remember(self, folder: Path, place: Path, digests: Mapping[str, str]) -> None:
        """Puts content hashes that are known into the cache: of the files in `folder`, by name,
        which is about to become `place`."""
        known = {_identity(folder / name, place / name): digest for name, digest in digests.items()}
        write_json(self.root / "hashes.json", self._cache() | known)

    def _cache(self) -> dict[str, str]:
        try:
            value = json.loads((self.root / "hashes.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Shelf:
    """A key's place in a store: the results of one walk, a layer at a time."""

    store: Store
    key: str

    @property
    def folder(self) -> Path:
        return self.store.folder(self.key)

    def layer(self, index: int) -> Path:
        return self.store.layer(self.key, index)

    def stream(self, index: int, name: str) -> Path:
        return self.store.stream(self.key, index, name)

    def finished(self, layers: int) -> int:
        return self.store.finished_layers(self.key, layers)

    def drop_streams(self, keep: int | None = None) -> None:
        self.store.drop_streams(self.key, keep)


def store_beside(output: Path) -> Store:
    """The store of what is written to `output`: `QUANTFLOW_STORE`, else a folder beside it."""
    root = os.environ.get("QUANTFLOW_STORE")
    return Store(Path(root) if root else output.absolute().parent / ".quantflow-store")


def _identity(file: Path, place: Path | None = None) -> str:
    """What tells a file's content without reading it; `place`: where it is going to lie."""
    status = file.stat()
    with open(file, "rb") as stream:
        header = stream.read(min(8 + int.from_bytes(stream.read(8), "little"), 2**24))
    digest = hashlib.sha256(header).hexdigest()
    return f"{(place or file).resolve()}|{status.st_size}|{status.st_mtime_ns}|{digest}"
