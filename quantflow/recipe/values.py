"""What one value of a recipe may be, and a mapping of values."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Protocol

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
)

from quantflow.bundled import BUNDLED, BUNDLED_NEW

DATA_NAMES = ("c4", "c4-new", "ptb", "ptb-new", "wikitext2", "pileval", BUNDLED, BUNDLED_NEW)
AUTO = 0  # in a typed recipe, what `auto` becomes; a plan puts the model's number in its place

_SIZE_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20,
    "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE_PATTERN = r"^[0-9]{1,15}(\.[0-9]{1,15})? ?([KMGTkmgt][Ii]?)?[Bb]$"
_MIN_SHARD_BYTES = 1024  # a bare 5 was meant as "5GB"
_MIN_GROUP_SIZE = 4
_MIN_LENGTH = 16  # tokens a window
_GROUP_SIZES = f"-1 (one group a row) or an integer of at least {_MIN_GROUP_SIZE}"

WeightBits = Literal[2, 3, 4, 5, 6, 7, 8]


def parse_bytes(value: Any) -> int:
    """Bytes in an integer or a text such as `5GB` or `512 MiB` (GB is 10^9, GiB 2^30). ValueError
    for anything else."""
    if isinstance(value, str) and re.fullmatch(_SIZE_PATTERN, value):
        number, unit = re.split(r" ?(?=[A-Za-z])", value, maxsplit=1)
        value = int(float(number) * _SIZE_UNITS[unit.upper()])
    if isinstance(value, bool) or not isinstance(value, int) or value < _MIN_SHARD_BYTES:
        raise ValueError(
            f'a size such as "5GB" or "512MiB", or an integer of at least {_MIN_SHARD_BYTES} bytes'
        )
    return value


def _check_group_size(value: int) -> int:
    if value != -1 and value < _MIN_GROUP_SIZE:
        raise ValueError(_GROUP_SIZES)
    return value


GroupSize = Annotated[
    int,
    AfterValidator(_check_group_size),
    WithJsonSchema({"anyOf": [{"const": -1}, {"type": "integer", "minimum": _MIN_GROUP_SIZE}]}),
]


def _or_auto(what: str) -> tuple[BeforeValidator, PlainSerializer]:
    """`auto` beside integers that are not 0; `what` says which."""

    def read(value: Any) -> Any:
        if value == "auto":
            return AUTO
        if (value == AUTO and not isinstance(value, bool)) or (
            isinstance(value, str) and not re.fullmatch(r"[-+0-9.e ]+", value)
        ):
            raise ValueError(f"auto, {what}")
        return value

    return BeforeValidator(read), PlainSerializer(lambda value: "auto" if value == AUTO else value)


def _check_length(value: int) -> int:
    if value != AUTO and value < _MIN_LENGTH:
        raise ValueError(f"auto, or an integer greater than or equal to {_MIN_LENGTH}")
    return value


AS_WRITTEN: Any = {"default": "auto"}
Symmetric = Annotated[
    bool | None, BeforeValidator(lambda value: None if value == "auto" else value),
    PlainSerializer(lambda value: "auto" if value is None else value),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "boolean"}, {"type": "null"}]}),
]  # fmt: skip
Length = Annotated[
    int,
    AfterValidator(_check_length),
    *_or_auto(f"or an integer greater than or equal to {_MIN_LENGTH}"),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": _MIN_LENGTH}]}),
]
AutoGroupSize = Annotated[
    int,
    AfterValidator(lambda value: value if value == AUTO else _check_group_size(value)),
    *_or_auto(_GROUP_SIZES),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": "auto"},
                {"const": -1},
                {"type": "integer", "minimum": _MIN_GROUP_SIZE},
            ]
        }
    ),
]
ByteSize = Annotated[
    int,
    BeforeValidator(parse_bytes),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": _MIN_SHARD_BYTES},
                {"type": "string", "pattern": _SIZE_PATTERN},
            ]
        }
    ),
]


NonEmpty = Annotated[str, Field(min_length=1)]


DATA = (
    f"A data set's name ({', '.join(DATA_NAMES)}) or the path of a local file: text, JSON lines,"
    " JSON, CSV or Parquet."
)
FIELD = (
    "The field of a row, or the column, that holds the text or the dialogue, where it is not one of"
    " the usual."
)


class Section(BaseModel):
    """A mapping of the recipe. An unknown key is an error, and so is `"4"` for 4; an integer serves
    where a float is asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class NamesText(Protocol):
    """A section that names a text: a data set and where a copy of it lies, or a local file."""

    @property
    def data(self) -> str: ...

    @property
    def file(self) -> str | None: ...

    @property
    def field(self) -> str | None: ...

    @property
    def skip(self) -> int: ...

    @property
    def count(self) -> int:
        """Windows."""

    @property
    def tokens(self) -> int:
        """Of a window."""
