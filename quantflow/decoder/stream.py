"""A residual stream: the hidden states of all calibration windows, between two decoder layers.

Small ones are held in memory; larger ones in a file that is read and written window by window (not
mapped: mapped pages count as resident memory). Both give the same bits.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from quantflow.checkpoints.tensor_file import read_full
from quantflow.errors import ModelError, Problem
from quantflow.paths import naming

COPIED_BYTES = 2**24  # that are copied between files at once, or a window


class Stream:
    """Hidden states `[W, L, H]`. `path` None holds them in memory on `device`."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        path: Path | None,
    ) -> None:
        self.shape, self.dtype, self.device, self.path = shape, dtype, device, path
        self._held: Tensor | None = None
        if path is None:
            with torch.inference_mode(False):  # a step that trains may read it as well
                self._held = torch.empty(shape, dtype=dtype, device=device)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with naming(path), open(path, "ab") as file:
                file.truncate(self.nbytes)

    @property
    def windows(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def _chunk(self) -> int:
        """Windows that are copied at once."""
        return max(1, COPIED_BYTES * self.windows // max(1, self.nbytes))

    def spans(self, batch: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of all windows, `batch` at a time."""
        return (
            (start, min(start + batch, self.windows)) for start in range(0, self.windows, batch)
        )

    def read(self, start: int, stop: int) -> Tensor:
        """Windows `[start, stop)`, on the device."""
        if self._held is not None:
            return self._held[start:stop]
        assert self.path is not None
        with torch.inference_mode(False):
            part = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(start * part[0].nbytes)
            _read_into(file, part, self.path)
        return part.to(self.device)

    def write(self, start: int, value: Tensor) -> None:
        """Sets the windows from `start` on."""
        if self._held is not None:
            self._held[start : start + len(value)] = value.detach()
            return
        assert self.path is not None
        with naming(self.path), open(self.path, "r+b", buffering=0) as file:
            file.seek(start * value[0].nbytes)
            _write_all(file, _bytes(value))

    def save(self, path: Path) -> int:
        """Writes the stream to `path`, atomically; returns the checksum that `load` wants."""
        temporary = path.with_name(f".{path.name}.tmp")
        checksum = 0
        with naming(path), open(temporary, "wb", buffering=0) as file:
            for start, stop in self.spans(self._chunk):
                data = _bytes(self.read(start, stop))
                checksum = zlib.crc32(data, checksum)
                _write_all(file, data)
        os.replace(temporary, path)
        return checksum

    def load(self, path: Path, checksum: int) -> bool:
        """Fills the stream from a saved file; False where the file is absent, torn or not the one
        the checksum is of."""
        try:
            if path.stat().st_size != self.nbytes:
                return False
            seen = 0
            with open(path, "rb", buffering=0) as file:
                for start, stop in self.spans(self._chunk):
                    part = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
                    _read_into(file, part, path)
                    seen = zlib.crc32(_bytes(part), seen)
                    self.write(start, part.to(self.device))
        except OSError:
            return False
        return seen == checksum

    def close(self) -> None:
        """Frees the memory or removes the file."""
        self._held = None
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Room:
    """Where the streams of a walk lie: in files of `folder`, or in memory where that is None."""

    device: torch.device
    folder: Path | None = None

    def stream(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Stream:
        """name: one that no other open stream in the folder has."""
        path = self.folder / f".work-{name}.bin" if self.folder else None
        return Stream(shape, dtype, self.device, path)


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
