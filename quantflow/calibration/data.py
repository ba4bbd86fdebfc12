"""Calibration and evaluation text: by a name users know, or from a local file; cut into windows of tokens."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from quantflow import bundled
from quantflow.errors import DataError, Problem

SEPARATOR = "<|endoftext|>"

# name -> (hub data set, configuration, split, files, field)
HUB: dict[str, tuple[str, str | None, str, str | None, str]] = {
    "c4": ("allenai/c4", None, "train", "en/c4-train.00000-of-01024.json.gz", "text"),
    "c4-new": ("allenai/c4", None, "validation", "en/c4-validation.00000-of-00008.json.gz", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "train", None, "sentence"),
    "ptb-new": ("ptb-text-only/ptb_text_only", "penn_treebank", "test", None, "sentence"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None, "text"),
    "pileval": ("mit-han-lab/pile-val-backup", None, "validation", None, "text"),
}
_FIELDS = ("text", "content", "sentence", "document", "prompt")


def documents(data: str, file: str | None = None, *, option: str = "--data FILE") -> Iterator[str]:
    """The documents of a data set, in order. `data` is a known name or a path; `file` is read in its place. option: how the command
    line would name a local file, for the message where the hub cannot be reached.

    .txt: documents separated by `<|endoftext|>`; .jsonl (also .gz): an object a line with a text field, or a string; .json: a list
    of those. Raises DataError.
    """
    path = Path(file or data).expanduser()
    if file is None:
        path = bundled.text(data) or path
    if path.is_file():
        yield from (d for d in (text.strip() for text in _read(path)) if d)
    elif file is None and data in HUB:
        yield from _from_hub(data, option)
    else:
        raise DataError(
            Problem(str(path), "no such file", "a .txt, .json or .jsonl file", f"Known names: {', '.join([*HUB, *bundled.TEXTS])}")
        )


def _read(path: Path) -> Iterator[str]:
    try:
        opener: Callable[..., IO[str]] = gzip.open if path.suffix == ".gz" else open
        # -sig: Windows puts a byte order mark first, which JSON does not allow.
        with opener(path, "rt", encoding="utf-8-sig") as stream:
            kind = path.name.removesuffix(".gz").rpartition(".")[2]
            if kind == "jsonl":
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield _text_of(_parse(line, f"{path}:{number}"), f"{path}:{number}")
            elif kind == "json":
                raw = stream.read()
                # c4 calls a file of JSON lines ".json".
                if not raw.lstrip().startswith("["):
                    for number, line in enumerate(raw.splitlines(), 1):
                        if line.strip():
                            yield _text_of(_parse(line, f"{path}:{number}"), f"{path}:{number}")
                    return
                for number, item in enumerate(_parse(raw, str(path)), 1):
                    yield _text_of(item, f"{path} item {number}")
            else:
                yield from stream.read().split(SEPARATOR)
    except UnicodeDecodeError as error:
        raise DataError(Problem(str(path), f"not UTF-8 text ({error.reason} at byte {error.start})", "UTF-8")) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(Problem(str(path), str(error), "a readable text file")) from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, or a number of thousands of digits
        raise DataError(Problem(where, f"not JSON ({error})", "one JSON object a line in .jsonl, a list in .json")) from error


def _text_of(item: Any, where: str) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, dict):
        for field in _FIELDS:
            if isinstance(item.get(field), str):
                return item[field]
        parts = [v for v in item.values() if isinstance(v, str)]
        if parts:
            return "\n".join(parts)
    raise DataError(Problem(where, f"{str(item)[:60]!r} has no text", f"a string, or an object with {', '.join(_FIELDS)}"))


def _from_hub(name: str, option: str) -> Iterator[str]:
    repository, configuration, split, files, field = HUB[name]
    try:
        from datasets import load_dataset

        kwargs: dict[str, Any] = {"data_files": {split: files}} if files else {}
        rows = load_dataset(repository, configuration, split=split, **kwargs)
    except ImportError as error:
        raise DataError(Problem(name, "the package `datasets` is not installed", hint=_offline(name, option))) from error
    except Exception as error:  # whatever the hub's client raises (a dozen kinds): the user's way out is the same
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"
        raise DataError(
            Problem(f"data set {name}", f"the hub could not give {repository} ({reason})", hint=_offline(name, option))
        ) from error
    for row in rows:
        yield str(row[field])


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


def _encode(tokenizer: Any, texts: list[str], source: str) -> Any:
    """The encodings of `texts`. Raises DataError for half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        return tokenizer.encode_batch(texts)
    except TypeError as error:
        bad = next((t for t in texts if any("\ud800" <= c <= "\udfff" for c in t)), "")
        raise DataError(Problem(source, f"{bad[:40]!r} is no valid Unicode text", "text that UTF-8 can hold")) from error


def cut_windows(
    tokenizer: Any, texts: Iterable[str], *, count: int, length: int, skip: int = 0, source: str = "", least: int | None = None
) -> Windows:
    """The first `count` windows of `length` tokens: documents tokenised one by one, concatenated, cut. Raises DataError if there are fewer
    than `least`; by default, than `count`."""
    least = count if least is None else least
    ids: list[int] = []
    windows: list[list[int]] = []
    used: set[str] = set()
    remaining = islice(iter(texts), skip, None)
    seen = 0
    while len(windows) < count and (chunk := list(islice(remaining, 64))):
        for text, encoding in zip(chunk, _encode(tokenizer, chunk, source), strict=True):
            if len(windows) >= count:
                break
            seen += 1
            used.add(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())
            ids += encoding.ids
            while len(ids) >= length and len(windows) < count:
                windows.append(ids[:length])
                ids = ids[length:]
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
