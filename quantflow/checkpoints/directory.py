"""A checkpoint as Hugging Face lays it out: `config.json`, and safetensors files with or without an
index."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantflow.checkpoints.tensor_file import TensorFile, TensorInfo, same_tensor
from quantflow.checkpoints.weight_files import INDEX, WEIGHTS, weight_files
from quantflow.errors import ModelError, Problem
from quantflow.placeholder import HEAD_BYTES, placeholder

if TYPE_CHECKING:
    from torch import Tensor

_MOST_BYTES = 2**28  # of a file other than weights
_LONGEST_PLACE = 1024  # bytes
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # of a pair, or half of one


def read_file(path: Path) -> bytes:
    """The bytes of a file of a model directory, the weights apart. Raises ModelError for what
    cannot be read, is larger than any such file, is no regular file, is a link that leads out of
    the directory, or has a `placeholder` in its place."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(Problem(str(path), "no regular file", "a file of the model"))
        if status.st_size > _MOST_BYTES:
            raise ModelError(
                Problem(str(path), f"{status.st_size} bytes", f"at most {_MOST_BYTES}")
            )
        if _leads_out(path):
            raise ModelError(_stranger(path))
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(
            Problem(str(path), error.strerror or str(error), "a readable file")
        ) from error
    # an empty file may be meant: those who need more say so
    if data and (problem := placeholder(path, data[:HEAD_BYTES])):
        raise ModelError(problem)
    return data


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory. Raises ModelError, for half a surrogate pair
    too."""
    data = read_file(path)
    if not data and (problem := placeholder(path, data)):
        raise ModelError(problem)
    try:
        value = json.loads(data.decode("utf-8"))
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: bad UTF-8 or JSON, or a number of thousands of digits
        raise ModelError(Problem(str(path), f"not JSON ({error})", "a JSON object")) from error
    if not isinstance(value, dict):
        raise ModelError(
            Problem(str(path), f"JSON of type {type(value).__name__}", "a JSON object")
        )
    if _ESCAPED_SURROGATE.search(data) and (halves := list(half_letters(value))):
        raise ModelError(
            [
                Problem(f"{path}{place}", json.dumps(text)[:80], "text that UTF-8 can hold")
                for place, text in halves[:20]
            ]
        )
    return value


def half_letters(value: Any) -> Iterator[tuple[str, str]]:
    """Place and text of what in a JSON value has half a surrogate pair in it, which JSON can spell
    and no file or screen can hold."""
    left = [("", value)]
    while left:
        place, value = left.pop()
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            yield place, value
        elif isinstance(value, dict):
            left += [(place, key) for key in value]
            left += [
                (f"{place} {key}".encode("utf-8", "backslashreplace").decode()[:200], own)
                for key, own in value.items()
            ]
        elif isinstance(value, list):
            left += [(place, own) for own in value]


def is_place(name: Any) -> bool:
    """Whether a text that stood in a file can name a place in the same directory: a relative path
    that the system takes and that stays."""
    if (
        not isinstance(name, str)
        or "\0" in name
        or len(name.encode("utf-8", "surrogatepass")) > _LONGEST_PLACE
    ):
        return False
    parts = Path(name).parts
    return not Path(name).is_absolute() and all(
        part != ".." and len(part.encode("utf-8", "surrogatepass")) < 256 for part in parts
    )


def _leads_out(path: Path) -> bool:
    """Whether a file is a link to another place: a model that somebody sent may not name files of
    the reader's. The hub's cache is such a place on purpose, where a snapshot's files are links to
    `blobs` beside it."""
    inside = path.parent.resolve()
    return path.is_symlink() and path.resolve().parent not in (
        inside,
        inside.parent.parent / "blobs",
    )


def _stranger(path: Path) -> Problem:
    problem = "a symbolic link that leads out of the directory"
    return Problem(
        str(path), problem, "a file of the model", "Copy it, or link the whole directory"
    )


class Directory:
    """A model directory. The constructor reads config.json and, unless `config_only`, the headers
    of the weight files.

    left_out_files: each file of weights that is not read -> why."""

    def __init__(self, path: Path, *, config_only: bool = False) -> None:
        if not os.path.lexists(path / "config.json"):
            raise ModelError(_no_config(path))
        self.config = read_json(path / "config.json")
        self.tokenizer = path
        self._places, self.left_out_files = ({}, {}) if config_only else _locate(path)
        self.notes = tuple(_said(self.left_out_files))
        self.tensors: Mapping[str, TensorInfo] = {
            name: file.tensors[name] for name, file in self._places.items()
        }
        # as called here -> as called in the file
        self._names = {name: name for name in self._places}
        self.files = sorted({file.path for file in self._places.values()})

    def renamed(self, names: Mapping[str, str]) -> Directory:
        """The same with other names for its tensors. names: of every tensor, the name it has -> the
        one it gets."""
        if all(name == other for name, other in names.items()):
            return self
        other = copy(self)
        other._names = {new: self._names[name] for name, new in names.items()}
        other.tensors = {new: self.tensors[name] for name, new in names.items()}
        return other

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        stored = self._names[name]
        return self._places[stored].read(stored, index)

    def kv_parameters(self) -> dict[str, Tensor]:
        return {}


def _no_config(path: Path) -> Problem:
    """Why there is no config.json, as far as what is there tells."""
    there = {p.name for p in path.iterdir()} if path.is_dir() else set()
    below = sorted(name for name in there if (path / name / "config.json").is_file())
    hint = "Is the download complete?"
    if "adapter_config.json" in there:
        hint = (
            "It is an adapter: merge it into its model, with merge_and_unload() of PEFT, and save"
            " that"
        )
    elif "params.json" in there:
        hint = (
            "It is the layout of the model's maker (params.json): download, or convert to, that of"
            " transformers"
        )
    elif below:
        hint = f"Give the directory inside: {path / below[0]}"
    return Problem(
        str(path / "config.json"), "No such file or directory", "a model directory", hint
    )


def _said(left_out: Mapping[str, str]) -> Iterator[str]:
    """A line for each reason why files are not read."""
    for why in dict.fromkeys(left_out.values()):
        names = [name for name in left_out if left_out[name] == why]
        yield (
            "not read:"
            f" {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            f" ({why})"
        )


def _locate(path: Path) -> tuple[dict[str, TensorFile], Mapping[str, str]]:
    """The file of every tensor; and every other file of weights, with why it is not read. Raises
    ModelError."""
    chosen = weight_files(path, _read_index(path / INDEX) if (path / INDEX).is_file() else {})
    if strangers := [path / name for name in chosen.names if _leads_out(path / name)]:
        raise ModelError([_stranger(stranger) for stranger in strangers])
    files = {name: TensorFile(path / name) for name in chosen.names}
    places = {
        tensor: files[name]
        for tensor, name in chosen.weight_map.items()
        if tensor in files[name].tensors
    }
    problems = [
        Problem(str(path / name), f"tensor {tensor} is missing", hint=f"{INDEX} says it is there")
        for tensor, name in chosen.weight_map.items()
        if tensor not in places
    ]
    for name, file in files.items():
        for tensor in file.tensors:
            # a shard may hold what the index forgot: every loader reads it
            other = places.setdefault(tensor, file)
            if other is file or (chosen.weight_map and _copied(tensor, file, other)):
                continue
            problem = f"tensor {tensor} stands in two files, also in {other.path.name}"
            hint = f"Remove one, or add {INDEX}"
            if chosen.weight_map:
                hint = "Loaders differ in which they take, whatever the index says: remove one"
            problems.append(Problem(str(path / name), problem, hint=hint))
    problems += _contradictions(path, chosen.copies, places)
    if problems:
        raise ModelError(problems)
    return places, chosen.left_out


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in weight_map.values())
    ):
        raise ModelError(
            Problem(str(index), "no weight_map from tensor names to files", "a safetensors index")
        )
    unsafe = sorted(
        {
            v
            for v in weight_map.values()
            if os.path.basename(v) != v or not v.endswith(".safetensors") or not is_place(v)
        }
    )
    if unsafe:
        expected = "the name of a .safetensors file in the same directory"
        raise ModelError(
            [Problem(str(index), f"weight file {v!r}"[:200], expected) for v in unsafe[:20]]
        )
    return weight_map


def _copied(name: str, one: TensorFile, other: TensorFile) -> bool:
    """Whether two files hold the same tensor under a name, in one dtype."""
    return one.tensors[name].dtype == other.tensors[name].dtype and same_tensor(
        one, name, other, name
    )


def _contradictions(
    path: Path, copies: Sequence[str], places: Mapping[str, TensorFile]
) -> list[Problem]:
    """A problem where shards that are not read hold another model than `places`: some loaders would
    take the one, some the other."""
    for name in copies:
        if _leads_out(path / name):
            continue
        try:
            file = TensorFile(path / name)
        except ModelError:  # what is left of a download is no model of its own
            continue
        wrong = next(
            (
                tensor
                for tensor in file.tensors
                if tensor not in places or not _copied(tensor, file, places[tensor])
            ),
            None,
        )
        if wrong is not None:
            problem = f"{WEIGHTS} and shards such as {name}, which differ in {wrong}"
            hint = (
                f"transformers opens {WEIGHTS}, and others the shards: move away those that are not"
                " meant"
            )
            return [Problem(str(path), problem, "one model", hint)]
    return []
