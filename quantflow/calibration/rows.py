"""The rows of a data file, one after another, whatever it is written in: text, JSON, tables."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from quantflow.errors import DataError, Problem
from quantflow.placeholder import placeholder_at

SEPARATOR = "<|endoftext|>"
READ = 2**20  # letters of a text that are read at once
BATCH = 256  # rows of a table
LONGEST_LINE, LONGEST_LIST = 2**27, 2**31  # letters: 20 KB of zstd can be a line of a gigabyte
LONGEST_CELL = 2**31 - 1  # letters in a cell of a CSV file, where Python's own limit is 128 KiB

Row = tuple[str, Any]  # where it stands, and what is there


def rows(path: Path) -> Iterator[Row]:
    """The rows of a file: a text's documents, the values of JSON lines or of a JSON list, a table's rows as objects. Its name says what it
    is, in any case; one without an ending is a text. Nothing but a JSON list is read whole. Raises DataError."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _OPENERS else ""
    kind = suffixes[-1] if suffixes else ""
    reader, table = _READERS.get(kind), _TABLES.get(kind)
    if reader is None and (table is None or packed):
        names = f"{', '.join(filter(None, _READERS))} (also packed: {', '.join(filter(None, _OPENERS))}), {', '.join(_TABLES)}"
        raise DataError(Problem(str(path), f"a name that ends with {kind}{packed}", names, "Rename the file if it is one of these"))
    if problem := placeholder_at(path, binary=table is not None):
        raise DataError(problem)
    try:
        if table:
            yield from table(path)
        elif reader:
            # -sig: Windows puts a byte order mark first, which JSON does not allow.
            with io.TextIOWrapper(_OPENERS[packed](path), encoding="utf-8-sig", newline=_NEWLINES.get(kind)) as stream:
                yield from reader(stream, path)
    except UnicodeDecodeError as error:
        raise DataError(Problem(str(path), f"not UTF-8 text ({error.reason} at byte {error.start})", "UTF-8")) from error
    except csv.Error as error:
        raise DataError(Problem(str(path), f"no table ({error})", "a table with a name above each column")) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(Problem(str(path), str(error), "a readable file")) from error


def _texts(stream: IO[str], path: Path) -> Iterator[Row]:
    """Documents with the separator between them."""
    held: list[str] = []  # of the document that is being read
    tail, number = "", 1
    while part := stream.read(READ):
        *ended, rest = (tail + part).split(SEPARATOR)
        for text in ended:
            yield f"{path} document {number}", "".join([*held, text])
            held, number = [], number + 1
        tail = rest[-(len(SEPARATOR) - 1) :]  # which may be the beginning of one
        held.append(rest[: len(rest) - len(tail)])
    yield f"{path} document {number}", "".join([*held, tail])


def _unnamed(stream: IO[str], path: Path) -> Iterator[Row]:
    """A text, unless it is JSON of which nobody said so."""
    for where, text in _texts(stream, path):
        if text.lstrip().startswith(('{"', "[{")):
            raise DataError(Problem(str(path), "JSON in a file whose name does not say so", "a text", "Call it .jsonl, or .json"))
        yield where, text


def _numbered(stream: IO[str], path: Path, longest: int | None = None) -> Iterator[tuple[int, str]]:
    """The lines, from 1 on. longest: LONGEST_LINE by default."""
    longest, number = longest or LONGEST_LINE, 0
    while line := stream.readline(longest):
        number += 1
        if len(line) == longest:
            raise DataError(Problem(f"{path}:{number}", f"a line of {longest} letters or more", "a document a line"))
        yield number, line


def _lines(stream: IO[str], path: Path) -> Iterator[Row]:
    for number, line in _numbered(stream, path):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, f"{path}:{number}", "one JSON value a line")


def _json(stream: IO[str], path: Path) -> Iterator[Row]:
    """A list, or lines: c4 calls a file of JSON lines ".json"."""
    lines = _numbered(stream, path, LONGEST_LIST)  # a whole list is one line, often
    number, first = next(((n, line) for n, line in lines if line.strip()), (0, ""))
    if first.lstrip().startswith("["):
        rest = stream.read(LONGEST_LIST)
        if len(rest) == LONGEST_LIST:
            raise DataError(Problem(str(path), f"a list of more than {LONGEST_LIST} letters", "JSON lines"))
        values = _parsed(first + rest, str(path), "a JSON list")
        yield from ((f"{path} item {n}", value) for n, value in enumerate(values, 1))
    elif first:
        where = f"{path}:{number}"
        if first.strip() == "{" or first.rstrip().endswith((",", "[", "{")):
            found = "a JSON object over several lines"
            raise DataError(Problem(where, found, "a list of objects, or one object a line", "`jq -c .` writes an object in one line"))
        yield where, _parsed(first, where, "one JSON object a line, or a list")
        for n, line in lines:
            if line.strip():
                yield f"{path}:{n}", _parsed(line, f"{path}:{n}", "one JSON object a line, or a list")


def _parsed(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, or a number of thousands of digits
        raise DataError(Problem(where, f"not JSON ({error})", expected)) from error


def _csv(stream: IO[str], path: Path, separator: str = ",") -> Iterator[Row]:
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.DictReader((line for _, line in _numbered(stream, path)), delimiter=separator)
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if None in row:
            raise DataError(Problem(where, f"more cells than the {len(reader.fieldnames or ())} columns", "a cell for each column"))
        yield where, row


def _tsv(stream: IO[str], path: Path) -> Iterator[Row]:
    return _csv(stream, path, "\t")


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield from _batches(file.iter_batches(BATCH), path)
    except ArrowException as error:
        raise DataError(Problem(str(path), f"not Parquet ({error})", hint="Is the download complete?")) from error


def _arrow(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, ArrowInvalid, OSFile, ipc

    try:
        with OSFile(str(path)) as source:
            try:
                file = ipc.open_file(source)
                batches: Iterator[Any] = (file.get_batch(i) for i in range(file.num_record_batches))
            except ArrowInvalid:  # as `datasets` saves them
                source.seek(0)
                batches = iter(ipc.open_stream(source))
            yield from _batches(batches, path)
    except ArrowException as error:
        raise DataError(Problem(str(path), f"not Arrow ({error})", hint="Is the download complete?")) from error


def _batches(batches: Iterator[Any], path: Path) -> Iterator[Row]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # Arrow believes the offsets that stand in a file, and would read what lies behind it in memory
        for start in range(0, batch.num_rows, BATCH):
            for row in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield f"{path} row {number}", row


def _zstandard(path: Path) -> IO[bytes]:
    from pyarrow import input_stream

    return input_stream(str(path), compression="zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"),
    ".gz": gzip.open, ".zst": _zstandard, ".bz2": bz2.open, ".xz": lzma.open,
}  # fmt: skip
_READERS: dict[str, Callable[[IO[str], Path], Iterator[Row]]] = {
    "": _unnamed, ".txt": _texts, ".text": _texts, ".md": _texts, ".raw": _texts, ".tokens": _texts,
    ".jsonl": _lines, ".ndjson": _lines, ".json": _json, ".csv": _csv, ".tsv": _tsv,
}  # fmt: skip
_TABLES: dict[str, Callable[[Path], Iterator[Row]]] = {".parquet": _parquet, ".arrow": _arrow}
# JSON's lines end at \n alone: U+2028 may stand in a string. A table's cells may hold any line break.
_NEWLINES = {".jsonl": "\n", ".ndjson": "\n", ".json": "\n", ".csv": "", ".tsv": ""}
