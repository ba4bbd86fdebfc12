"""The rows of a data file, one after another, whatever it is written in: text, JSON, tables."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import IO, Any

from quantflow.errors import DataError, Problem
from quantflow.placeholder import placeholder_at

SEPARATOR = "<|endoftext|>"
READ = 2**20  # characters of a text that are read at once
BATCH = 256  # rows of a table
# Letters: 20 KB of zstd can be a line of a gigabyte. A text of one document may be all of a
# Wikipedia, and a list a whole data set.
LONGEST_LINE, LONGEST_TEXT, LONGEST_LIST = 2**27, 2**30, 2**31
_MARKS = {"UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-16": (b"\xff\xfe", b"\xfe\xff")}
_JSON = re.compile(r'\s*(\[\s*)?\{\s*"')  # how objects begin, and lists of them

Row = tuple[str, Any]  # where it stands, and what is there


def rows(path: Path) -> Iterator[Row]:
    """The rows of a file: a text's documents, the values of JSON lines or of a JSON list, a table's
    rows as objects. Its name says what it is, in any case; one without an ending is a text. Nothing
    but a JSON list and a document is read whole. Raises DataError."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _OPENERS else ""
    kind = suffixes[-1] if suffixes else ""
    reader, table = _READERS.get(kind), _TABLES.get(kind)
    if reader is None and (table is None or packed):
        names = (
            f"{', '.join(filter(None, _READERS))} (also packed:"
            f" {', '.join(filter(None, _OPENERS))}), {', '.join(_TABLES)}"
        )
        raise DataError(
            Problem(
                str(path),
                f"a name that ends with {kind}{packed}",
                names,
                "Rename the file if it is one of these",
            )
        )
    # a text may be HTML
    if problem := placeholder_at(path, binary=table is not None, page=reader is not _texts):
        raise DataError(problem)
    try:
        if table:
            yield from table(path)
        elif reader:
            # -sig: Windows puts a byte order mark first, which JSON does not allow.
            with io.TextIOWrapper(
                _OPENERS[packed](path), encoding="utf-8-sig", newline=_NEWLINES.get(kind)
            ) as stream:
                yield from reader(stream, path)
    except UnicodeDecodeError as error:
        with _OPENERS[packed](path) as stream:
            mark = stream.read(4)
        raise DataError(_not_utf8(path, mark, error)) from error
    except csv.Error as error:
        raise DataError(
            Problem(str(path), f"no table ({error})", "a table with a name above each column")
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(Problem(str(path), str(error), "a readable file")) from error


def _not_utf8(path: Path, mark: bytes, error: UnicodeDecodeError) -> Problem:
    """mark: the first bytes, which say what a text of Windows' is."""
    encoding = next((name for name, begins in _MARKS.items() if mark.startswith(begins)), "")
    problem = (
        f"{encoding}, by its byte order mark"
        if encoding
        else f"not UTF-8 text ({error.reason} at byte {error.start})"
    )
    convert = f"`iconv -f {encoding or 'ENCODING'} -t UTF-8 OLD > NEW` writes it so"
    return Problem(
        str(path),
        problem,
        "UTF-8",
        convert if encoding else f"{convert}; ENCODING is LATIN1 or WINDOWS-1252, often",
    )


def _texts(stream: IO[str], path: Path) -> Iterator[Row]:
    """Documents with the separator between them. Raises DataError for JSON, which would be taken
    for a text of braces."""
    held: list[str] = []  # of the document that is being read
    size, tail, number = 0, "", 1
    while part := stream.read(READ):
        if number == 1 and not held and _JSON.match(part) and SEPARATOR not in part:
            hint = (
                f"Call it .jsonl, or .json; or put {SEPARATOR} behind it, if the braces are what"
                " the model is to read"
            )
            raise DataError(
                Problem(str(path), "JSON in a file whose name does not say so", "a text", hint)
            )
        *ended, rest = (tail + part).split(SEPARATOR)
        size = len(rest) if ended else size + len(part)
        if size > LONGEST_TEXT:
            problem = f"a document of more than {LONGEST_TEXT} characters"
            raise DataError(
                Problem(
                    f"{path} document {number + len(ended)}",
                    problem,
                    f"documents with {SEPARATOR} between them",
                )
            )
        for text in ended:
            yield f"{path} document {number}", "".join([*held, text])
            held, number = [], number + 1
        tail = rest[-(len(SEPARATOR) - 1) :]  # which may be the beginning of one
        held.append(rest[: len(rest) - len(tail)])
    yield f"{path} document {number}", "".join([*held, tail])


def _numbered(stream: IO[str], path: Path) -> Iterator[tuple[int, str]]:
    """The lines, from 1 on. One that is longer than LONGEST_LINE ends them with a part of it, as
    long as that."""
    number, line = 0, ""
    while len(line) < LONGEST_LINE and (line := stream.readline(LONGEST_LINE)):
        number += 1
        yield number, line


def _whole(lines: Iterable[tuple[int, str]], path: Path) -> Iterator[tuple[int, str]]:
    """Raises DataError for a line that is too long."""
    for number, line in lines:
        if len(line) >= LONGEST_LINE:
            raise DataError(
                Problem(
                    f"{path}:{number}",
                    f"a line of {LONGEST_LINE} characters or more",
                    "a document a line",
                )
            )
        yield number, line


def _lines(stream: IO[str], path: Path) -> Iterator[Row]:
    for number, line in _whole(_numbered(stream, path), path):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, f"{path}:{number}", "one JSON value a line")


def _json(stream: IO[str], path: Path) -> Iterator[Row]:
    """A list, or lines: c4 calls a file of JSON lines ".json"."""
    lines = _numbered(stream, path)
    number, first = next(((n, line) for n, line in lines if line.strip()), (0, ""))
    if first.lstrip().startswith("["):  # a whole list is one line, often
        rest = stream.read(LONGEST_LIST)
        if len(first) + len(rest) > LONGEST_LIST:
            raise DataError(
                Problem(str(path), f"a list of more than {LONGEST_LIST} characters", "JSON lines")
            )
        values = _parsed(first + rest, str(path), "a JSON list")
        yield from ((f"{path} item {n}", value) for n, value in enumerate(values, 1))
    elif first:
        where = f"{path}:{number}"
        if first.strip() == "{" or (
            first.endswith("\n") and first.rstrip().endswith((",", "[", "{"))
        ):
            problem = "a JSON object over several lines"
            raise DataError(
                Problem(
                    where,
                    problem,
                    "a list of objects, or one object a line",
                    "`jq -c .` writes an object in one line",
                )
            )
        for n, line in _whole(chain([(number, first)], lines), path):
            if line.strip():
                yield (
                    f"{path}:{n}",
                    _parsed(line, f"{path}:{n}", "one JSON object a line, or a list"),
                )


def _parsed(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: bad JSON, or a number of thousands of digits
        raise DataError(Problem(where, f"not JSON ({error})", expected)) from error


def _csv(stream: IO[str], path: Path, separator: str = ",") -> Iterator[Row]:
    csv.field_size_limit(LONGEST_TEXT)  # Python's own limit is 128 KiB
    number, ended = 0, False

    def lines() -> Iterator[str]:
        nonlocal number, ended
        for number, line in _whole(_numbered(stream, path), path):  # noqa: B007
            yield line
        ended = True

    def whole(cells: list[str]) -> list[str]:
        """A row for which the reader asked for a line behind the last one has a quote that nothing
        ends."""
        if ended and cells:
            begins = number - len(
                re.findall(r"\r\n|\r|\n", re.sub(r"(\r\n|\r|\n)\Z", "", cells[-1]))
            )
            problem, expected = (
                'a cell whose quote (") does not end',
                "a \" behind the cell's text, and two for one within it",
            )
            raise DataError(Problem(f"{path}:{begins}", problem, expected))
        return cells

    source = lines()
    names = whole(next(csv.reader(source, delimiter=separator), []))
    # "id, text": the blanks belong to the separator, of which a quote that follows must know.
    spaced = separator == "," and any(name.startswith(" ") for name in names[1:])
    names = [name.strip().strip('"') if spaced else name.strip() for name in names]
    _check_names(filter(None, names), path)  # those without a name are nobody's text
    for cells in csv.reader(source, delimiter=separator, skipinitialspace=spaced):
        if not whole(cells):
            continue
        where = f"{path}:{number}"
        if len(cells) > len(names):
            raise DataError(
                Problem(
                    where, f"more cells than the {len(names)} columns", "a cell for each column"
                )
            )
        yield where, dict(zip_longest(names, cells))


def _tsv(stream: IO[str], path: Path) -> Iterator[Row]:
    return _csv(stream, path, "\t")


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield from _batches(file.iter_batches(BATCH), path)
    except ArrowException as error:
        raise DataError(
            Problem(str(path), f"not Parquet ({error})", hint="Is the download complete?")
        ) from error


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
        raise DataError(
            Problem(str(path), f"not Arrow ({error})", hint="Is the download complete?")
        ) from error


def _check_names(names: Iterable[str], path: Path) -> None:
    """Raises DataError where two columns have one name: a row by names would have the last of
    them."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(
            Problem(
                str(path),
                f"more than one column {', '.join(twice)}",
                "a name of its own for each column",
            )
        )


def _batches(batches: Iterator[Any], path: Path) -> Iterator[Row]:
    number = 0
    for batch in batches:
        _check_names(batch.schema.names, path)
        # Arrow believes the offsets that stand in a file, and would read what lies behind it in
        # memory
        batch.validate(full=True)
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
    "": _texts, ".txt": _texts, ".text": _texts, ".md": _texts, ".raw": _texts, ".tokens": _texts,
    ".jsonl": _lines, ".ndjson": _lines, ".json": _json, ".csv": _csv, ".tsv": _tsv,
}  # fmt: skip
_TABLES: dict[str, Callable[[Path], Iterator[Row]]] = {".parquet": _parquet, ".arrow": _arrow}
# JSON's lines end at \n alone: U+2028 may stand in a string. A table's cells may hold any line
# break.
_NEWLINES = {".jsonl": "\n", ".ndjson": "\n", ".json": "\n", ".csv": "", ".tsv": ""}
