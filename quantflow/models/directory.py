"""A checkpoint as Hugging Face lays it out: `config.json`, and safetensors files with or without an index."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantflow.errors import ModelError, Problem
from quantflow.models.tensor_file import TensorFile, TensorInfo
from quantflow.placeholder import HEAD_BYTES, placeholder

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
_MOST_BYTES = 2**28  # of a file other than weights
_LONGEST_PLACE = 1024  # bytes
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # of a pair, or half of one


def read_file(path: Path) -> bytes:
    """The bytes of a file of a model directory, the weights apart. Raises ModelError for what cannot be read, is larger than any such file,
    is no regular file, is a link that leads out of the directory, or has a `placeholder` in its place."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(Problem(str(path), "no regular file", "a file of the model"))
        if status.st_size > _MOST_BYTES:
            raise ModelError(Problem(str(path), f"{status.st_size} bytes", f"at most {_MOST_BYTES}"))
        if _leads_out(path):
            raise ModelError(_stranger(path))
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(Problem(str(path), error.strerror or str(error), "a readable file")) from error
    if data and (problem := placeholder(path, data[:HEAD_BYTES])):  # an empty file may be meant: those who need more say so
        raise ModelError(problem)
    return data


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory. Raises ModelError, for half a surrogate pair too."""
    data = read_file(path)
    if problem := placeholder(path, data[:HEAD_BYTES]):
        raise ModelError(problem)
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8 or JSON, or a number of thousands of digits
        raise ModelError(Problem(str(path), f"not JSON ({error})", "a JSON object")) from error
    if not isinstance(value, dict):
        raise ModelError(Problem(str(path), f"JSON of type {type(value).__name__}", "a JSON object"))
    if _ESCAPED_SURROGATE.search(data) and (halves := list(half_letters(value))):
        raise ModelError([Problem(f"{path}{place}", json.dumps(text)[:80], "text that UTF-8 can hold") for place, text in halves[:20]])
    return value


def half_letters(value: Any) -> Iterator[tuple[str, str]]:
    """Place and text of what in a JSON value has half a surrogate pair in it, which JSON can spell and no file or screen can hold."""
    left = [("", value)]
    while left:
        place, value = left.pop()
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            yield place, value
        elif isinstance(value, dict):
            left += [(place, key) for key in value]
            left += [(f"{place} {key}".encode("utf-8", "backslashreplace").decode()[:200], own) for key, own in value.items()]
        elif isinstance(value, list):
            left += [(place, own) for own in value]


def is_place(name: Any) -> bool:
    """Whether a text that stood in a file can name a place in the same directory: a relative path that the system takes and that stays."""
    if not isinstance(name, str) or "\0" in name or len(name.encode("utf-8", "surrogatepass")) > _LONGEST_PLACE:
        return False
    parts = Path(name).parts
    return not Path(name).is_absolute() and all(part != ".." and len(part.encode("utf-8", "surrogatepass")) < 256 for part in parts)


def _leads_out(path: Path) -> bool:
    """Whether a file is a link to another place: a model that somebody sent may not name files of the reader's. The hub's cache is such
    a place on purpose, where a snapshot's files are links to `blobs` beside it."""
    inside = path.parent.resolve()
    return path.is_symlink() and path.resolve().parent not in (inside, inside.parent.parent / "blobs")


def _stranger(path: Path) -> Problem:
    found = "a symbolic link that leads out of the directory"
    return Problem(str(path), found, "a file of the model", "Copy it, or link the whole directory")


class Directory:
    """A model directory. The constructor reads config.json and, unless `config_only`, the headers of the weight files."""

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path, *, config_only: bool = False) -> None:
        self.config = read_json(path / "config.json")
        self.tokenizer = path
        self._places = {} if config_only else _locate(path)
        self.tensors: Mapping[str, TensorInfo] = {name: file.tensors[name] for name, file in self._places.items()}
        self.files = sorted({file.path for file in self._places.values()})

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        return self._places[name].read(name, index)

    def kv_parameters(self) -> dict[str, Tensor]:
        return {}


def _locate(path: Path) -> dict[str, TensorFile]:
    """The file of every tensor: by the index, where there is one."""
    index = path / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ModelError(Problem(str(index), "no weight_map from tensor names to files", "a safetensors index"))
        unsafe = sorted({v for v in weight_map.values() if os.path.basename(v) != v or not v.endswith(".safetensors") or not is_place(v)})
        if unsafe:
            raise ModelError(
                [
                    Problem(str(index), f"weight file {v!r}"[:200], "the name of a .safetensors file in the same directory")
                    for v in unsafe[:20]
                ]
            )
        absent = sorted({v for v in weight_map.values() if not (path / v).is_file()})
        if absent:
            raise ModelError([Problem(str(path / v), "missing shard", hint=f"{INDEX} names it: download it") for v in absent[:20]])
        names: Iterable[str] = sorted(set(weight_map.values()))
    else:
        names = sorted(p.name for p in path.glob("*.safetensors"))
        weight_map = {}
        if not names:
            pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
            hint = "Pickled weights run code when loaded: convert them to safetensors first" if pickles else "Is the download complete?"
            raise ModelError(Problem(str(path), f"no .safetensors file{' but ' + pickles[0] if pickles else ''}", hint=hint))
    if strangers := [path / name for name in names if _leads_out(path / name)]:
        raise ModelError([_stranger(stranger) for stranger in strangers])
    files = {name: TensorFile(path / name) for name in names}
    places: dict[str, TensorFile] = {}
    problems = []
    for file_name, file in files.items():
        for tensor in file.tensors:
            if weight_map and weight_map.get(tensor) != file_name:
                continue
            if tensor in places:
                problems.append(Problem(str(path / file_name), f"tensor {tensor} stands in two files", hint=f"Remove one, or add {INDEX}"))
            places[tensor] = file
    problems += [
        Problem(str(path / f), f"tensor {t} is missing", hint=f"{INDEX} says it is there")
        for t, f in weight_map.items()
        if t not in files[f].tensors
    ]
    if problems:
        raise ModelError(problems)
    return places
