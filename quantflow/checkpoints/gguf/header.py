"""The header of a GGUF file: metadata, and where each tensor lies."""

from __future__ import annotations

import math
import struct
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from quantflow.checkpoints.gguf.superblocks import SUPERBLOCK, SUPERBLOCK_TYPES
from quantflow.checkpoints.gguf.types import (
    BLOCK,
    BLOCK_TYPES,
    OTHER_TYPES,
    PLAIN_TYPES,
    READ_TYPES,
)
from quantflow.checkpoints.tensor_file import ITEM_BYTES, MAX_HEADER_BYTES, TensorInfo
from quantflow.errors import ModelError, Problem
from quantflow.placeholder import placeholder_at

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32

# far beyond any model, and read in seconds
_MOST_TENSORS, _MOST_KEYS, _MOST_STRINGS = 2**16, 2**16, 2**22

_LONGEST_NAME = 64  # ggml's

_REQUANTIZE = (
    "Start from the original checkpoint, or rewrite it with llama.cpp's llama-quantize"
    " --allow-requantize FILE OUT Q8_0"
)

_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip

_DAMAGED = "The file is damaged or incomplete: copy or download it again"

# shape, ggml's number of the type, place behind the header
Described = tuple[tuple[int, ...], int, int]


def read_metadata(path: Path) -> dict[str, Any]:
    """The keys and values of a GGUF file: numbers, strings, `array`s of numbers and lists of
    strings. Raises ModelError."""
    return read_header(path).metadata


@dataclass(frozen=True)
class Header:
    """base: where the tensors' bytes begin. size: bytes of the file."""

    metadata: dict[str, Any]
    tensors: dict[str, Described]
    base: int
    size: int


def read_header(path: Path) -> Header:
    """Raises ModelError."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            reader = _Reader(path, file, size)
            magic = reader.take(min(4, size))
            if magic != MAGIC:
                if problem := placeholder_at(path, binary=True):
                    raise ModelError(problem)
                raise reader.wrong(f"the first bytes are {magic!r}", f"{MAGIC!r}", _DAMAGED)
            version = reader.number("I")
            if version not in (2, 3):
                swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
                raise reader.wrong(
                    f"version {version}" if swapped > VERSION else "a big-endian file",
                    "version 2 or 3, little-endian",
                    "Convert the original checkpoint with a newer llama.cpp",
                )
            tensor_count, metadata_count = (
                reader.count(24, _MOST_TENSORS),
                reader.count(13, _MOST_KEYS),
            )
            metadata: dict[str, Any] = {}
            for _ in range(metadata_count):
                key = reader.text()
                if key in metadata:
                    raise reader.wrong(f"the key {key!r} stands there twice"[:200])
                metadata[key] = reader.value()
            tensors: dict[str, Described] = {}
            for _ in range(tensor_count):
                name, dims = reader.text(), reader.number("I")
                if len(name) > _LONGEST_NAME or name in tensors or not 0 < dims <= 4:
                    what = (
                        f"tensor {name[:_LONGEST_NAME]!r} has {dims} dimensions, stands there twice"
                        " or has too long a name"
                    )
                    raise reader.wrong(what, "1 to 4, once")
                shape = tuple(reader.number("Q") for _ in range(dims))
                tensors[name] = (shape[::-1], reader.number("I"), reader.number("Q"))
            at = file.tell()
    except OSError as error:
        raise ModelError(
            Problem(str(path), error.strerror or str(error), "a readable GGUF file")
        ) from error
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise reader.wrong(f"general.alignment {alignment!r}"[:80], "a power of two")
    return Header(metadata, tensors, at + -at % alignment, size)


def places(path: Path, header: Header) -> dict[str, tuple[int, TensorInfo]]:
    """ggml's number of the type, and dtype, shape and place as `TensorFile` has them, of every
    tensor."""
    places: dict[str, tuple[int, TensorInfo]] = {}
    problems: list[Problem] = []
    strange: dict[str, list[str]] = {}
    for name, (shape, kind, offset) in header.tensors.items():
        dtype = PLAIN_TYPES.get(kind, "F32")
        if kind in PLAIN_TYPES:
            nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        elif kind in BLOCK_TYPES and len(shape) == 2 and shape[1] % BLOCK == 0:
            dtype, shape = "U8", (shape[0], shape[1] // BLOCK * BLOCK_TYPES[kind][1])
            nbytes = math.prod(shape)
        elif kind in SUPERBLOCK_TYPES and len(shape) == 2 and shape[1] % SUPERBLOCK == 0:
            nbytes = math.prod(shape) // SUPERBLOCK * SUPERBLOCK_TYPES[kind][1]
        elif kind in BLOCK_TYPES or kind in SUPERBLOCK_TYPES:
            problems.append(
                Problem(
                    f"{path} tensor {name!r}",
                    f"shape {list(shape)} in blocks",
                    "two dimensions of whole blocks",
                )
            )
            continue
        else:
            strange.setdefault(OTHER_TYPES.get(kind, f"{kind}"), []).append(name)
            continue
        start = header.base + offset
        if nbytes == 0 or start + nbytes > header.size:
            expected = f"a tensor within the file's {header.size}"
            problems.append(
                Problem(
                    f"{path} tensor {name!r}",
                    f"{nbytes} bytes from byte {start}",
                    expected,
                    "Download it again",
                )
            )
        places[name] = (kind, TensorInfo(dtype, shape, start, start + nbytes))
    for kind_name, names in strange.items():
        such = f"{len(names)} tensors of type {kind_name}, the first of which is {names[0]!r}"
        problems.append(Problem(str(path), such, f"one of {READ_TYPES}", _REQUANTIZE))
    at, last = header.base, ""
    for name, (_, info) in sorted(places.items(), key=lambda item: item[1][1].start):
        if info.start < at:
            problems.append(
                Problem(
                    f"{path} tensor {name!r}",
                    f"it overlaps with {last!r}",
                    "tensors one after the other",
                )
            )
        at, last = info.stop, name
    if problems:
        more = len(problems) - 20
        raise ModelError(
            problems[:20] + ([Problem(str(path), f"{more} more such problems")] if more > 0 else [])
        )
    return places


class _Reader:
    """The bytes of a header, none of which are believed before they are there."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file = path, file
        self.left = min(size, MAX_HEADER_BYTES)

    def wrong(
        self, problem: str, expected: str = "a GGUF file", hint: str = _DAMAGED
    ) -> ModelError:
        return ModelError(Problem(str(self.path), problem, expected, hint))

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise self.wrong(f"the file ends {count - self.left} bytes inside its header")
        self.left -= count
        taken = self.file.read(count)
        if len(taken) < count:
            raise self.wrong("the file shrinks while it is read")
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self, errors: str = "strict") -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise self.wrong("a name or text that is no UTF-8") from error

    def count(self, least: int, most: int = MAX_HEADER_BYTES) -> int:
        """A number of things of at least `least` bytes each."""
        entries = int(self.number("Q"))
        if entries * least > self.left or entries > most:
            raise self.wrong(f"a header that promises {entries} entries in {self.left} bytes")
        return entries

    def value(self) -> Any:
        """A bool, number or string; numbers of an array as an `array`, its strings as a list."""
        kind = self.number("I")
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == 8:
            return self.text()
        item = self.number("I") if kind == 9 else None
        if item in _NUMBERS:
            form = _NUMBERS[item].replace("?", "B")
            size = struct.calcsize("<" + form)
            numbers = array(form, self.take(self.count(size) * size))
            if sys.byteorder == "big":
                numbers.byteswap()
            return numbers
        if item == 8:
            return [
                self.text("surrogateescape") for _ in range(self.count(8, _MOST_STRINGS))
            ]  # tokens of some vocabularies are no whole characters
        raise self.wrong(
            f"a metadata value of type {kind}" + (f" of {item}" if kind == 9 else ""),
            "numbers, strings or an array of them",
        )
