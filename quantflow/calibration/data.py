"""Calibration and evaluation text: by a name users know, or from a local file; cut into windows of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from quantflow import bundled
from quantflow.calibration.beginnings import LETTERS, Beginnings
from quantflow.calibration.rows import SEPARATOR, Row, rows
from quantflow.calibration.shapes import Dialogue, read_row
from quantflow.errors import DataError, Problem, RequestError

CHUNK = 64  # documents that are encoded together

# name -> (hub data set, configuration, split, files, field)
HUB: dict[str, tuple[str, str | None, str, str | None, str]] = {
    "c4": ("allenai/c4", None, "train", "en/c4-train.00000-of-01024.json.gz", "text"),
    "c4-new": ("allenai/c4", None, "validation", "en/c4-validation.00000-of-00008.json.gz", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "train", None, "sentence"),
    "ptb-new": ("ptb-text-only/ptb_text_only", "penn_treebank", "test", None, "sentence"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None, "text"),
    "pileval": ("mit-han-lab/pile-val-backup", None, "validation", None, "text"),
}


class Rendered(str):
    """A dialogue in a model's own format: its special tokens stand in it, and none is added when it is tokenised."""


def joined(dialogue: Dialogue) -> str:
    """What was said, for a model without a dialogue format."""
    return "\n".join(message["content"] for message in dialogue.messages if message["content"].strip())


def documents(
    data: str, file: str | None = None, *, field: str | None = None, option: str = "--data FILE",
    render: Callable[[Dialogue], str] = joined,
) -> Iterator[str]:  # fmt: skip
    """The documents of a data set, in order; those that are blank are left out. `data` is a known name or a path; `file` is read in its
    place.

    The kinds of files are those of `rows`, the shapes of a row those of `read_row`. field: where a row's text stands. option: how the
    command line would name a local file, for the message where the hub cannot be reached. render: makes a text of a dialogue; it may
    raise RequestError. Raises DataError.
    """
    path = Path(file or data).expanduser()
    if file is None:
        path = bundled.text(data) or path
    if path.is_file():
        found = rows(path)
    elif file is None and data in HUB:
        found = _from_hub(data, field, option)
    else:
        what = "a directory" if path.is_dir() else "no such file"
        expected = "a file of text, JSON lines, JSON, CSV or Parquet"
        raise DataError(Problem(str(path), what, expected, f"Known names: {', '.join([*HUB, *bundled.TEXTS])}"))
    for where, row in found:
        said = read_row(row, where, field)
        if isinstance(said, str):
            text = said.strip()
        elif not joined(said):
            continue
        else:
            try:
                text = render(said)
            except RequestError as error:
                raise DataError([Problem(where, p.found, p.expected, p.hint) for p in error.problems]) from error
        if text:
            yield text


def _from_hub(name: str, field: str | None, option: str) -> Iterator[Row]:
    repository, configuration, split, files, usual = HUB[name]
    try:
        from datasets import load_dataset

        kwargs: dict[str, Any] = {"data_files": {split: files}} if files else {}
        table = load_dataset(repository, configuration, split=split, **kwargs)
    except ImportError as error:
        raise DataError(Problem(name, "the package `datasets` is not installed", hint=_offline(name, option))) from error
    except Exception as error:  # whatever the hub's client raises (a dozen kinds): the user's way out is the same
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"
        raise DataError(
            Problem(f"data set {name}", f"the hub could not give {repository} ({reason})", hint=_offline(name, option))
        ) from error
    for number, row in enumerate(table, 1):
        yield f"data set {name} row {number}", row if field else str(row[usual])


def _offline(name: str, option: str) -> str:
    option = option.replace("FILE", f"./{name}.jsonl")
    return f'Use a local copy: {option} (a JSON object with "text" a line, or .txt with {SEPARATOR} between)'


@dataclass(frozen=True)
class Windows:
    """Token windows `[W][L]`, the digests of the documents they touch, and where they come from."""

    tokens: list[list[int]]
    documents: frozenset[str]
    source: str

    @property
    def digest(self) -> str:
        """Identity of the tokens."""
        return hashlib.sha256(json.dumps(self.tokens, separators=(",", ":")).encode()).hexdigest()


def _chunk(texts: Iterator[str], tokens: int) -> Iterator[str]:
    """Some texts that are worth reading and encoding together: no more than may be needed for so many tokens."""
    letters = 0
    for text in islice(texts, CHUNK):
        yield text
        letters += len(text)
        if letters >= tokens * LETTERS:
            break


def cut_windows(
    tokenizer: Any, texts: Iterable[str], *, count: int, length: int, skip: int = 0, source: str = "", least: int | None = None
) -> Windows:
    """The first `count` windows of `length` tokens: documents tokenised one by one, concatenated, cut. Raises DataError if there are fewer
    than `least`; by default, than `count`. Of a long document no more is encoded than is needed, and so much gives the tokens of the
    whole."""
    least = count if least is None else least
    ids: list[int] = []
    windows: list[list[int]] = []
    used: set[str] = set()
    remaining = islice(iter(texts), skip, None)
    beginnings = Beginnings(tokenizer)
    seen = 0
    while len(windows) < count:
        missing = (count - len(windows)) * length - len(ids)
        if not (chunk := list(_chunk(remaining, missing))):
            break
        try:
            encoded = beginnings.encode(chunk, missing, special=[not isinstance(text, Rendered) for text in chunk])
        except TypeError as error:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
            bad = next((t for t in chunk if any("\ud800" <= c <= "\udfff" for c in t)), "")
            raise DataError(Problem(source, f"{bad[:40]!r} is no valid Unicode text", "text that UTF-8 can hold")) from error
        for text, tokens in zip(chunk, encoded, strict=True):
            if len(windows) >= count:
                break
            seen += 1
            used.add(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())
            ids += tokens
            whole = min(len(ids) // length, count - len(windows))
            windows += [ids[i * length : (i + 1) * length] for i in range(whole)]
            ids = ids[whole * length :]
    if len(windows) < least:
        total = len(windows) * length + len(ids)
        raise DataError(
            Problem(
                source,
                f"{seen} documents with {total} tokens (after skipping {skip}): {len(windows)} windows",
                f"{least} windows of {length} tokens",
                "Give more text, or lower the number or length of the windows",
            )
        )
    return Windows(windows, frozenset(used), source)
