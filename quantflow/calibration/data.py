"""Calibration and evaluation text: by a name users know, or from a local file; cut into windows of
tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from quantflow import bundled
from quantflow.calibration.beginnings import CHARACTERS, Beginnings
from quantflow.calibration.rows import SEPARATOR, Row, rows
from quantflow.calibration.shapes import Conversation, OddTurn, no_text, read_row
from quantflow.errors import DataError, Problem, RequestError
from quantflow.placeholder import no_file

CHUNK = 64  # documents that are encoded together
ENOUGH = 1024  # rows that say whether most of a data set can be used

# name -> (hub data set, configuration, split, files, field)
HUB: dict[str, tuple[str, str | None, str, str | None, str]] = {
    "c4": ("allenai/c4", None, "train", "en/c4-train.00000-of-01024.json.gz", "text"),
    "c4-new": ("allenai/c4", None, "validation", "en/c4-validation.00000-of-00008.json.gz", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "train", None, "sentence"),
    "ptb-new": ("ptb-text-only/ptb_text_only", "penn_treebank", "test", None, "sentence"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None, "text"),
    "pileval": ("mit-han-lab/pile-val-backup", None, "validation", None, "text"),
}


@dataclass(frozen=True)
class Document:
    """special: whether a tokenizer adds the special tokens of a text to it (BOS); in a model's own
    dialogue format they stand already."""

    text: str
    special: bool = True


@dataclass
class LeftOut:
    """What of a data set cannot be used, as far as it was read. rows: how many were read; count:
    how many of them were left out; first: why the first was."""

    rows: int = 0
    count: int = 0
    first: Problem | None = None

    def sift(self, items: Iterable[Document | Problem | str]) -> Iterator[Document]:
        """The documents among what `read_documents` yields. Raises DataError where the first ENOUGH
        rows show that most cannot be used."""
        for item in items:
            self.rows += 1
            if isinstance(item, Problem):
                self.count, self.first = self.count + 1, self.first or item
            else:
                yield Document(item) if isinstance(item, str) else item
            if self.rows == ENOUGH:
                self.check()

    def check(self) -> None:
        """Raises DataError where more than half of the rows were left out."""
        if self.first and 2 * self.count > self.rows:
            reason = (
                f"{self.first.found} (so, or for a like reason, {self.count} of the first"
                f" {self.rows} rows)"
            )
            raise DataError(replace(self.first, found=reason))

    def as_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "count": self.count, "first": str(self.first)}

    @property
    def note(self) -> str:
        """In a sentence; "" where nothing was left out."""
        of = (
            f"{self.count} of the first {self.rows} rows {'was' if self.count == 1 else 'were'}"
            " left out"
        )
        return f"{of}; the first: {self.first}" if self.first else ""


def joined(conversation: Conversation) -> str:
    """A conversation as plain text, for a model without a dialogue format."""
    return "\n".join(
        message["content"] for message in conversation.messages if message["content"].strip()
    )


def documents(data: str, file: str | None = None, *, field: str | None = None) -> Iterator[str]:
    """The text of each document of a data set, of each conversation its messages. Raises DataError,
    as `read_documents` and `LeftOut` do."""
    left_out = LeftOut()
    yield from (
        document.text for document in left_out.sift(read_documents(data, file, field=field))
    )
    left_out.check()


def read_documents(
    data: str,
    file: str | None = None,
    *,
    field: str | None = None,
    option: str = "--data FILE",
    render: Callable[[Conversation], Document] = lambda conversation: Document(
        joined(conversation)
    ),
) -> Iterator[Document | Problem]:
    """The documents of a data set, in order; those that are blank are passed over, and in the place
    of a conversation that cannot be used comes what is wrong with it, wherever its file lies.
    `data` is a known name or a path; `file` is read in its place.

    The kinds of files are those of `rows`, the shapes of a row those of `read_row`. field: where a
    row's text stands. option: how the command line would name a local file, for the message where
    the hub cannot be reached. render: makes a text of a conversation; it may raise RequestError.
    Raises DataError, also where no row has a text.
    """
    # The rows: of a file, a bundled text or a data set of the hub.
    path = Path(file or data).expanduser()
    if file is None:
        path = bundled.text(data) or path
    if path.is_file():
        items = rows(path)
    elif file is None and data in HUB:
        field = field or HUB[data][4]
        items = _from_hub(data, option)
    else:
        problem, way_out = no_file(path)
        expected = "a file of text, JSON lines, JSON, CSV or Parquet"
        raise DataError(
            Problem(
                str(path),
                problem,
                expected,
                way_out or f"Known names: {', '.join([*HUB, *bundled.TEXTS])}",
            )
        )
    # Row by row a document, or what is wrong with it.
    blank, empty = None, True  # the first row without a text; whether all are
    for where, row in items:
        try:
            content = read_row(row, where, field)
            document = (
                Document(content.strip())
                if isinstance(content, str)
                else render(content)
                if joined(content)
                else Document("")
            )
        except OddTurn as error:
            yield replace(
                error.problems[0], where=error.problems[0].where.removeprefix(f"{path.parent}/")
            )
        except RequestError as error:
            yield replace(error.problems[0], where=where.removeprefix(f"{path.parent}/"))
        else:
            if not document.text:
                blank = blank or (row, where)
                continue
            yield document
        empty = False
    if blank and empty and isinstance(blank[0], dict):
        raise no_text(*blank, field)


def _from_hub(name: str, option: str) -> Iterator[Row]:
    repository, configuration, split, files, _ = HUB[name]
    try:
        from datasets import load_dataset

        kwargs: dict[str, Any] = {"data_files": {split: files}} if files else {}
        table = load_dataset(repository, configuration, split=split, **kwargs)
    except ImportError as error:
        raise DataError(
            Problem(name, "the package `datasets` is not installed", hint=_offline(name, option))
        ) from error
    except (
        Exception
    ) as error:  # whatever the hub's client raises (a dozen kinds): the user's way out is the same
        reason = (
            f"{type(error).__name__}:"
            f" {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"
        )
        raise DataError(
            Problem(
                f"data set {name}",
                f"the hub could not give {repository} ({reason})",
                hint=_offline(name, option),
            )
        ) from error
    for number, row in enumerate(table, 1):
        yield f"data set {name} row {number}", row


def _offline(name: str, option: str) -> str:
    option = option.replace("FILE", f"./{name}.jsonl")
    return (
        f'Use a local copy: {option} (a JSON object with "text" a line, or .txt with {SEPARATOR}'
        " between)"
    )


@dataclass(frozen=True)
class Windows:
    """Token windows `[W][L]`, the digests of the documents they touch, and where they come from.
    left_out: what of that could not be used, None where all could."""

    tokens: list[list[int]]
    documents: frozenset[str]
    source: str
    left_out: LeftOut | None = None

    @property
    def digest(self) -> str:
        """Identity of the tokens."""
        return hashlib.sha256(json.dumps(self.tokens, separators=(",", ":")).encode()).hexdigest()


def _chunk(documents: Iterator[Document], tokens: int) -> Iterator[Document]:
    """Some documents that are worth reading and encoding together: no more than may be needed for
    so many tokens."""
    characters = 0
    for document in islice(documents, CHUNK):
        yield document
        characters += len(document.text)
        if characters >= tokens * CHARACTERS:
            break


def cut_windows(
    tokenizer: Any,
    items: Iterable[Document | Problem | str],
    *,
    count: int,
    length: int,
    skip: int = 0,
    source: str = "",
    least: int | None = None,
) -> Windows:
    """The first `count` windows of `length` tokens: documents tokenised one by one, concatenated,
    cut. items: what `read_documents` yields, or texts. Raises DataError if there are fewer than
    `least` (by default, than `count`), or if more than half of the rows cannot be used. Of a long
    document no more is encoded than is needed, and so much gives the tokens of the whole."""
    least = count if least is None else least
    ids: list[int] = []
    windows: list[list[int]] = []
    used: set[str] = set()
    left_out = LeftOut()
    remaining = islice(left_out.sift(items), skip, None)
    beginnings = Beginnings(tokenizer)
    seen = 0
    # Documents in chunks, as many as the missing windows may need.
    while len(windows) < count:
        missing = (count - len(windows)) * length - len(ids)
        if not (chunk := list(_chunk(remaining, missing))):
            break
        try:
            encoded = beginnings.encode(
                [document.text for document in chunk],
                missing,
                special=[document.special for document in chunk],
            )
        except TypeError as error:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
            bad = next(
                (d.text for d in chunk if any("\ud800" <= c <= "\udfff" for c in d.text)), ""
            )
            raise DataError(
                Problem(
                    source, f"{bad[:40]!r} is no valid Unicode text", "text that UTF-8 can hold"
                )
            ) from error
        # Their tokens one after the other, cut into windows.
        for document, tokens in zip(chunk, encoded, strict=True):
            if len(windows) >= count:
                break
            seen += 1
            used.add(hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).hexdigest())
            ids += tokens
            whole = min(len(ids) // length, count - len(windows))
            windows += [ids[i * length : (i + 1) * length] for i in range(whole)]
            ids = ids[whole * length :]
    # Whether that was enough.
    left_out.check()
    if len(windows) < least:
        total = len(windows) * length + len(ids)
        raise DataError(
            Problem(
                source,
                f"{seen} documents with {total} tokens (after skipping {skip}): {len(windows)}"
                " windows",
                f"{least} windows of {length} tokens",
                "Give more text, or lower the number or length of the windows",
            )
        )
    return Windows(windows, frozenset(used), source, left_out if left_out.count else None)
