"""A residual stream: the hidden states of all calibration windows, between two decoder layers.

Small ones are held in memory; larger ones in a file that is read and written window by window (not
mapped: mapped pages count as resident memory). Both give the same bits.

A stream can be saved in another thread while it moves on. In a file, that file becomes the saved
one as it is, and what is written next goes to a new one: nothing is copied. In memory, a window is
not written over before it is saved.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from pathlib import Path
from threading import Condition
from typing import Protocol

import torch
from torch import Tensor

from quantflow.checkpoints.tensor_file import read_full
from quantflow.errors import ModelError, Problem
from quantflow.paths import naming

COPIED_BYTES = 2**24  # that go to or from a saved file at once, or a window


class Snapshot(Protocol):
    """A stream at one moment. Its methods may be called in another thread."""

    def save(self, path: Path) -> int:
        """Gives it the name `path`, at once or not at all; returns the checksum that `load`
        wants. Called once."""

    def release(self) -> None:
        """Says that it will not be saved, or is: the stream waits for it no longer."""


class Stream:
    """Hidden states `[W, L, H]`. `path` None holds them in memory on `device`."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        path: Path | None,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._place: _Memory | _Files = (
            _Memory(shape, dtype, device) if path is None else _Files(shape, dtype, path)
        )

    @property
    def windows(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def spans(self, batch: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of all windows, `batch` at a time."""
        return _spans(self.windows, batch)

    def read(self, start: int, stop: int) -> Tensor:
        """Windows `[start, stop)`, on the device."""
        return self._place.read(start, stop).to(self.device)

    def write(self, start: int, value: Tensor) -> None:
        """Sets the windows from `start` on."""
        self._place.write(start, value.detach())

    def snapshot(self) -> Snapshot:
        """The stream as it is now. The snapshot before must have been saved or released; this one
        must be, by another thread, for `write` may wait for it."""
        return self._place.snapshot()

    def save(self, path: Path) -> int:
        """Writes the stream to `path`, atomically; returns the checksum that `load` wants."""
        snapshot = self.snapshot()
        try:
            return snapshot.save(path)
        finally:
            snapshot.release()

    def load(self, path: Path, checksum: int) -> bool:
        """Fills the stream from a saved file; False where the file is absent, torn or not the one
        the checksum is of."""
        try:
            if path.stat().st_size != self.nbytes:
                return False
            seen = 0
            with open(path, "rb", buffering=0) as file:
                for start, stop in self.spans(_copied(self.shape, self.dtype)):
                    part = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
                    _read_into(file, part, path)
                    seen = zlib.crc32(_bytes(part), seen)
                    self.write(start, part)
        except OSError:
            return False
        return seen == checksum

    def close(self) -> None:
        """Frees the memory or removes the files."""
        self._place.close()


class _Memory:
    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._leaving: _Copy | None = None
        with torch.inference_mode(False):  # a step that trains may use it as well
            self._held: Tensor | None = torch.empty(shape, dtype=dtype, device=device)

    def read(self, start: int, stop: int) -> Tensor:
        assert self._held is not None, "a closed stream"
        return self._held[start:stop]

    def write(self, start: int, value: Tensor) -> None:
        assert self._held is not None, "a closed stream"
        stop = start + len(value)
        if self._leaving:
            self._leaving.wait(stop)
        self._held[start:stop] = value

    def snapshot(self) -> Snapshot:
        assert self._held is not None, "a closed stream"
        self._leaving = _Copy(self._held)
        return self._leaving

    def close(self) -> None:
        self._held = self._leaving = None


class _Copy:
    """A snapshot of what is in memory: it is there as long as nothing is written over it."""

    def __init__(self, held: Tensor) -> None:
        self._held, self._saved, self._moved = held, 0, Condition()

    def wait(self, stop: int) -> None:
        """Until the windows before `stop` are saved, or released."""
        with self._moved:
            self._moved.wait_for(lambda: self._saved >= stop)

    def save(self, path: Path) -> int:
        temporary = path.with_name(f".{path.name}.tmp")
        checksum, held = 0, self._held
        try:
            with naming(path), open(temporary, "wb", buffering=0) as file:
                for start, stop in _spans(len(held), _copied(held.shape, held.dtype)):
                    data = _bytes(held[start:stop])
                    checksum = zlib.crc32(data, checksum)
                    _write_all(file, data)
                    self._tell(stop)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # half of one, where the disk is full
        return checksum

    def release(self) -> None:
        self._tell(len(self._held))

    def _tell(self, stop: int) -> None:
        with self._moved:
            self._saved = stop
            self._moved.notify_all()


class _Files:
    """The windows lie in a file; those that were not written since the last snapshot, in its."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, path: Path) -> None:
        self._shape, self._dtype, self._first, self._snapshots = shape, dtype, path, 0
        self._window_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._path = path
        self._left: Path | None = None  # the last snapshot's, until somebody saves it
        self._behind: FileIO | None = None  # the same file, whatever its name is by now
        self._unmoved: set[int] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._create()

    def _create(self) -> None:
        with naming(self._path), open(self._path, "ab") as file:
            file.truncate(self._shape[0] * self._window_bytes)

    def read(self, start: int, stop: int) -> Tensor:
        with torch.inference_mode(False):
            part = torch.empty((stop - start, *self._shape[1:]), dtype=self._dtype)
        for behind, windows in groupby(range(start, stop), self._unmoved.__contains__):
            first, *more = windows
            into = part[first - start : first - start + 1 + len(more)]
            if behind and self._behind:
                self._behind.seek(first * self._window_bytes)
                _read_into(self._behind, into, self._path)
                continue
            with open(self._path, "rb", buffering=0) as file:
                file.seek(first * self._window_bytes)
                _read_into(file, into, self._path)
        return part

    def write(self, start: int, value: Tensor) -> None:
        with naming(self._path), open(self._path, "r+b", buffering=0) as file:
            file.seek(start * self._window_bytes)
            _write_all(file, _bytes(value))
        self._unmoved.difference_update(range(start, start + len(value)))

    def snapshot(self) -> Snapshot:
        for window in sorted(self._unmoved):
            self.write(window, self.read(window, window + 1))
        self._forget()
        self._snapshots += 1
        self._left = self._path
        self._behind = open(self._left, "rb", buffering=0)  # noqa: SIM115 - closed by `_forget`
        self._path = self._first.with_suffix(f".{self._snapshots}{self._first.suffix}")
        self._create()
        self._unmoved = set(range(self._shape[0]))
        return _File(self._left, self._shape, self._dtype)

    def _forget(self) -> None:
        if self._behind:
            self._behind.close()
        self._behind, self._unmoved = None, set()
        if self._left:
            self._left.unlink(missing_ok=True)

    def close(self) -> None:
        self._forget()
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _File:
    """A snapshot that lies in a file of its own."""

    path: Path
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def save(self, path: Path) -> int:
        checksum, most = 0, _copied(self.shape, self.dtype)
        buffer = torch.empty((min(most, self.shape[0]), *self.shape[1:]), dtype=self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            for start, stop in _spans(self.shape[0], most):
                part = buffer[: stop - start]
                _read_into(file, part, self.path)
                checksum = zlib.crc32(_bytes(part), checksum)
        os.replace(self.path, path)
        return checksum

    def release(self) -> None:
        """Nothing waits for it."""


@dataclass(frozen=True)
class Room:
    """Where streams may lie: in memory, and beyond `budget` bytes in files of `folder`; all in
    memory where there is no folder."""

    device: torch.device
    folder: Path | None = None
    budget: int = 0

    def sharing(self, nbytes: int) -> Room:
        """For streams of so many bytes together, which lie all in memory or all in files."""
        return Room(self.device, None if nbytes <= self.budget else self.folder)

    def stream(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Stream:
        """A stream in files, where there is a folder. name: one that no other open stream there
        has."""
        path = self.folder / f".work-{name}.bin" if self.folder else None
        return Stream(shape, dtype, self.device, path)


def _spans(windows: int, batch: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + batch, windows)) for start in range(0, windows, batch))


def _copied(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Windows that are copied at once."""
    return max(1, COPIED_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_all(file: FileIO, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += file.write(data[done:])


def _read_into(file: FileIO, part: Tensor, path: Path) -> None:
    if not read_full(file, _bytes(part)):
        raise ModelError(
            Problem(str(path), "the activation file ends early", hint="Run again with --fresh")
        )
