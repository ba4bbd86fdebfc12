"""Reading and writing safetensors files without mapping them into memory.

A mapped file's pages count as resident memory, and a 4 GiB file would grow the process by 4 GiB;
these two classes hold one tensor at a time. The layout:
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from quantflow.errors import ModelError, Problem
from quantflow.paths import naming
from quantflow.placeholder import placeholder_at

if TYPE_CHECKING:
    from torch import Tensor

# Bits of an item of every dtype that safetensors 0.8 defines: a file that has it is no damaged one.
ITEM_BITS = {
    "C64": 64, "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16,
    "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_TORCH_NAMES = {
    "C64": "complex64", "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32",
    "U16": "uint16", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
# of those that torch has, one item in whole bytes
ITEM_BYTES = {name: ITEM_BITS[name] // 8 for name in _TORCH_NAMES}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def dtype_name(dtype: object) -> str:
    """The safetensors name (`"BF16"`) of a torch dtype."""
    wanted = str(dtype).removeprefix("torch.")
    return next(name for name, torch_name in _TORCH_NAMES.items() if torch_name == wanted)


def torch_dtype(name: str) -> Any:
    """The torch dtype of a safetensors name; KeyError for one that torch has not."""
    import torch

    return getattr(torch, _TORCH_NAMES[name])


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its dtype's safetensors name, its shape and the bytes `[start, stop)`
    of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def rows(self, part: slice) -> TensorInfo:
        """Where some of its slices along the first dimension lie, one after the other."""
        first, last, _ = part.indices(self.shape[0])
        size = self.nbytes // self.shape[0]
        return TensorInfo(
            self.dtype,
            (last - first, *self.shape[1:]),
            self.start + first * size,
            self.start + last * size,
        )


class TensorFile:
    """A safetensors file: its header, checked, and one tensor at a time.

    Raises ModelError for a file that is truncated, has overlapping or impossible offsets, or is no
    safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, (path,)
        self.tensors, self.metadata = _read_header(path)

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        """The tensor `name`, or one or some of its slices along the first dimension, freshly
        allocated on the CPU."""
        import torch

        info = self.tensors[name]
        if info.dtype not in _TORCH_NAMES:
            raise ModelError(
                Problem(
                    f"{self.path} tensor {name}",
                    f"dtype {info.dtype}",
                    f"one of {', '.join(_TORCH_NAMES)}",
                )
            )
        shape, start, nbytes = info.shape, info.start, info.nbytes
        if isinstance(index, slice):
            info = info.rows(index)
            shape, start, nbytes = info.shape, info.start, info.nbytes
        elif index is not None:
            shape, nbytes = info.shape[1:], info.nbytes // info.shape[0]
            start += index * nbytes
        tensor = torch.empty(shape, dtype=torch_dtype(info.dtype))
        if nbytes:
            view = tensor.reshape(-1).view(torch.uint8).numpy().data
            with open(self.path, "rb", buffering=0) as file:
                file.seek(start)
                if not read_full(file, view):
                    raise ModelError(
                        Problem(
                            f"{self.path} tensor {name}",
                            "the file ends inside the tensor",
                            hint="Download it again",
                        )
                    )
        return tensor


def read_full(file: FileIO, view: memoryview) -> bool:
    """Reads as many bytes as `view` holds, which the system hands over in pieces; False where the
    file ends before."""
    done = 0
    while done < len(view):
        if not (count := file.readinto(view[done:])):
            return False
        done += count
    return True


class Tensors(Protocol):
    """What tensors are read from, one at a time, and the files that they lie in."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def files(self) -> Sequence[Path]: ...

    def read(self, name: str, index: int | slice | None = None) -> Tensor: ...


COMPARED_BYTES = 2**24  # of a tensor, that are compared at once
_FLOATS = ("F32", "F16", "BF16")
# a model is opened many times in a process, and equality is known only at the last byte
_found_same: dict[Hashable, bool] = {}


def same_tensor(one: Tensors, name: str, other: Tensors, other_name: str) -> bool:
    """Whether two tensors have the same shape and the same bits, those of plain floats in the wider
    of their dtypes.

    Read a slice at a time up to the first that differs, and once in a process as long as the files
    stay as they are.
    """
    key = (_identity(one), name, _identity(other), other_name)
    if key not in _found_same:
        _found_same[key] = _same_bits(one, name, other, other_name)
    return _found_same[key]


def _identity(tensors: Tensors) -> Hashable:
    return tuple(
        (file, (status := file.stat()).st_ino, status.st_size, status.st_mtime_ns)
        for file in tensors.files
    )


def _same_bits(one: Tensors, name: str, other: Tensors, other_name: str) -> bool:
    import torch

    a, b = one.tensors[name], other.tensors[other_name]
    if a.shape != b.shape or (a.dtype != b.dtype and not {a.dtype, b.dtype} <= set(_FLOATS)):
        return False
    step = max(1, COMPARED_BYTES * a.shape[0] // max(1, a.nbytes)) if a.shape else 1
    parts = (
        [slice(first, first + step) for first in range(0, a.shape[0], step)]
        if a.nbytes and a.shape
        else [None] * bool(a.nbytes)
    )
    for part in parts:
        left, right = one.read(name, part), other.read(other_name, part)
        if a.dtype != b.dtype:
            left, right = left.float(), right.float()
        if not torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)):
            return False
    return True


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    def wrong(problem: str, expected: str = "") -> ModelError:
        return ModelError(
            Problem(
                str(path),
                problem,
                expected,
                "The file is damaged or incomplete: copy or download it again",
            )
        )

    # The header's bytes.
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise wrong("a directory, or no regular file", "a safetensors file")
        size = status.st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                if problem := placeholder_at(path, binary=True):
                    raise ModelError(problem)
                raise wrong(f"{size} bytes", "a safetensors file, which has at least 8")
            length = int.from_bytes(prefix, "little")
            if length > min(size - 8, MAX_HEADER_BYTES) or not length:
                if problem := placeholder_at(path, binary=True):
                    raise ModelError(problem)
                raise wrong(
                    f"a header of {length} bytes in a file of {size}", "a safetensors header"
                )
            raw = file.read(length)
    except OSError as error:
        raise ModelError(
            Problem(str(path), error.strerror or str(error), "a readable safetensors file")
        ) from error
    # The header as JSON.
    try:
        header = json.loads(raw)
    except (
        ValueError,
        RecursionError,
    ) as error:  # not UTF-8, not JSON, a number of thousands of digits; nested too deeply
        raise wrong("a header that is not JSON", "a safetensors header") from error
    if not isinstance(header, dict):
        raise wrong("a header that is no JSON object", "a safetensors header")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise wrong("a __metadata__ that is no JSON object", "names and strings")
    # Every tensor's dtype, shape and place, each within the file.
    base, tensors = 8 + length, {}
    for name, entry in header.items():
        try:
            dtype, shape = str(entry["dtype"]), _integers(entry["shape"])
            start, stop = _integers(entry["data_offsets"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise wrong(f"tensor {name} has no valid dtype, shape and data_offsets") from error
        if dtype not in ITEM_BITS:
            raise wrong(f"tensor {name} has dtype {dtype}", f"one of {', '.join(ITEM_BITS)}")
        # more than torch can say, where another dimension is 0
        if len(shape) > 8 or any(d >= 2**48 for d in shape):
            raise wrong(
                f"tensor {name} of shape {list(shape)[:9]}", "at most 8 dimensions, each below 2^48"
            )
        if (
            any(d < 0 for d in shape)
            or start < 0
            or (stop - start) * 8 != math.prod(shape) * ITEM_BITS[dtype]
        ):
            raise wrong(
                f"tensor {name} of shape {list(shape)} and dtype {dtype} has {stop - start} bytes"
            )
        if base + stop > size:
            raise wrong(
                f"tensor {name} ends at byte {base + stop}, the file at {size}: it is truncated"
            )
        tensors[name] = TensorInfo(dtype, shape, base + start, base + stop)
    # Tensors may not overlap.
    at, last = base, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start < at:
            raise wrong(f"tensors {last} and {name} overlap")
        at, last = info.stop, name
    return tensors, {str(k): str(v) for k, v in metadata.items()}


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int for v in values):
        raise TypeError(f"{values!r} is no list of integers")
    return tuple(values)


def check_announced(
    name: str, tensor: Tensor, spec: tuple[str, Sequence[int]], missing: Collection[str]
) -> None:
    """Raises ValueError for a tensor of another dtype or shape than was announced, and for one that
    was there before. missing: those that were not."""
    dtype, shape = spec
    if (
        dtype_name(tensor.dtype) != dtype
        or tuple(tensor.shape) != tuple(shape)
        or name not in missing
    ):
        raise ValueError(
            f"{name}: {dtype_name(tensor.dtype)} {tuple(tensor.shape)} announced as {dtype}"
            f" {tuple(shape)}, or written twice"
        )


class AnnouncedWriter:
    """Writes a file whose tensors were announced and arrive one at a time, in any order; a format's
    own writer lays it out.

    specs: name -> (safetensors dtype, shape) of all of them. head: what stands before them.
    offsets: where each begins in the file, of `size` bytes. `close` checks that every tensor came,
    and syncs the file. The caller writes to a temporary name and renames.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, tuple[str, tuple[int, ...]]],
        head: bytes,
        offsets: Mapping[str, int],
        size: int,
    ) -> None:
        self.path, self._offsets = path, dict(offsets)
        self._specs = dict(specs)
        self._missing = set(specs)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `close`
        with naming(path):
            self._file.write(head)
            self._file.truncate(size)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes the tensor; it must have the dtype and shape that were announced."""
        check_announced(name, tensor, self._specs[name], self._missing)
        self._missing.discard(name)
        self._put(name, self._as_stored(name, tensor))

    def _as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """What of an announced tensor goes into the file."""
        return tensor

    def _put(self, name: str, tensor: Tensor) -> None:
        import torch

        if tensor.numel():
            with naming(self.path):
                self._file.seek(self._offsets[name])
                self._file.write(
                    tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                )

    def close(self) -> None:
        with naming(self.path), self._file:
            if self._missing:
                raise ValueError(
                    f"{self.path}: never written: {', '.join(sorted(self._missing)[:5])}"
                )
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(OSError):  # of what was not written yet: that of the block counts
                self._file.close()


class TensorWriter(AnnouncedWriter):
    """Writes a safetensors file."""

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
        offset = 0
        offsets: dict[str, int] = {}
        # Widest items first, as the safetensors library lays them out, keeps every tensor aligned
        # to its own items.
        for name in sorted(specs, key=lambda n: (-ITEM_BYTES[specs[n][0]], n)):
            dtype, shape = specs[name]
            nbytes = math.prod(shape) * ITEM_BYTES[dtype]
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [offset, offset + nbytes],
            }
            offsets[name] = offset
            offset += nbytes
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        head = len(raw).to_bytes(8, "little") + raw
        super().__init__(
            path,
            specs,
            head,
            {name: len(head) + o for name, o in offsets.items()},
            len(head) + offset,
        )


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes `tensors` to `path` at once or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with TensorWriter(
            temporary,
            {n: (dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()},
            metadata,
        ) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
