"""Files of tokenizers, and what the `tokenizers` library makes of damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantflow.checkpoints.directory import read_file, read_json
from quantflow.errors import ModelError, Problem, panicked

Json = dict[str, Any]

SPLITS = "a tokenizer that can split any text"


def optional_json(file: Path) -> Json:
    return read_json(file) if file.is_file() else {}


def file_bytes(file: Path) -> bytes:
    data = read_file(file)
    if not data:
        raise ModelError(Problem(str(file), "an empty file", hint="Is the download complete?"))
    return data


def file_text(file: Path) -> str:
    try:
        return file_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(Problem(str(file), f"not text ({error})", "UTF-8")) from error


def guarded(
    where: Path | str,
    expected: str,
    build: Callable[[], Any],
    passing: type[Exception] | tuple[()] = (),
) -> Any:
    """What `build` gives; raises ModelError for whatever the tokenizers library says of a damaged
    file. passing: exceptions of `build`'s own."""
    try:
        return build()
    except passing:
        raise
    except BaseException as error:
        # The library raises plain Exceptions, and panics, which are no Exceptions, for data it did
        # not foresee.
        if isinstance(error, Exception) or panicked(error):
            raise ModelError(
                Problem(
                    str(where),
                    str(error).strip().split("\n")[0][:200],
                    expected,
                    "Is the download complete?",
                )
            ) from error
        raise
