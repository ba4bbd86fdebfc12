"""Changes of an input that keep what it is made of: JSON stays JSON, a length still says how long
something is.

Plain flips of bytes seldom come past a parser's first check. Each function here takes the bytes of
one file, changes a part of what they mean and writes them again; where they cannot be taken apart,
`plain` changes the bytes. donors: other files of the kind, whose parts may be put in. Every choice
comes from `rng`.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

Plain = Callable[[bytes, Random], bytes]
Mutator = Callable[[bytes, Random, Sequence[bytes], Plain], bytes]

INTEGERS = (
    0, 1, -1, 2, 3, 7, 31, 32, 127, 128, 255, 256, 65535, 2**16, 2**31 - 1, 2**31, 2**32 - 1,
    2**32, 2**53 + 1, 2**62, 2**63, 2**64,
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, *INTEGERS, -(2**31), 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, 1e-320, 1e308,
    math.nan, math.inf, -math.inf, "", "a", " ", "0", "1", "-1", "1e999", "true", "null", "\0",
    "\n", "\ud800", "é", "\u2028", "▁", "😀", "x" * 300, "../x", "/etc/passwd", "a b", "(a+)+$",
    "(", "[", "{}", "{i}", "$A", "re:.*", "-:.*", [], {}, [[]], [{}], {"": None}, [0], [0, 0],
    ["a"], {"a": 1}, {"content": "a"},
)  # fmt: skip
LETTERS = (
    "",
    "0",
    "9",
    "-",
    "a",
    "Z",
    " ",
    "\t",
    "\n",
    "\r",
    "\0",
    "\x1b",
    "\x85",
    "\u2028",
    "\ufeff",
    "\ud7ff",
    "é",
    "▁",
    "😀",
    ":",
    "=",
    "#",
    "%",
    "&",
    "*",
    "!",
    "|",
    ">",
    "'",
    '"',
    "\\",
    "[",
    "]",
    "{",
    "}",
    ",",
    "<",
    "?",
    ".",
    "@",
    "`",
    "~",
)


def flip(data: bytes, rng: Random) -> bytes:
    """Some bytes changed, cut out, doubled or put in."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(found) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 64))
        match rng.randrange(5):
            case 0:
                found[at : at + size] = bytes(
                    rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
                    for _ in found[at : at + size]
                )
            case 1:
                del found[at : at + size]
            case 2:
                found[at:at] = found[at : at + size]
            case 3:
                found[at:at] = rng.randbytes(size)
            case 4:
                form = rng.choice(("<I", "<Q", "<H", ">I"))
                value = rng.choice(INTEGERS) % 2 ** (8 * struct.calcsize(form))
                found[at : at + struct.calcsize(form)] = struct.pack(form, value)
    return bytes(found)


# --- JSON


def _walk(value: Any, rng: Random) -> tuple[Any, Any]:
    """A container and a key of it, anywhere in `value`; (None, None) where there is no container
    that holds something."""
    holder, key = None, None
    while isinstance(value, (dict, list)) and value and (holder is None or rng.random() < 0.75):
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        holder, value = value, value[key]
    return holder, key


def _text(text: str, rng: Random) -> str:
    at = rng.randrange(len(text) + 1)
    match rng.randrange(5):
        case 0:
            return text[:at] + rng.choice(LETTERS) + text[at:]
        case 1:
            return text[:at] + text[at + rng.choice((1, 2, 8)) :]
        case 2:
            return text[:at] + rng.choice(LETTERS) + text[at + 1 :]
        case 3:
            return text[:at] + text + text[at:]
        case _:
            return text.swapcase()


def _number(value: float, rng: Random) -> Any:
    changes: tuple[Callable[[Any], Any], ...] = (
        lambda v: v + 1, lambda v: v - 1, lambda v: v * 2, lambda v: -v, lambda v: v / 2, str,
        lambda v: [v], lambda v: v * 10**9,
    )  # fmt: skip
    try:
        return rng.choice(changes)(value)
    except (OverflowError, ValueError):
        return 0


def change_value(value: Any, rng: Random, donors: Sequence[Any] = ()) -> Any:
    """A value as JSON has it, of which one part has become another; `value` itself is changed."""
    holder, key = _walk(value, rng)
    if holder is None:
        return rng.choice(ODD)
    old = holder[key]
    match rng.randrange(9):
        case 0:
            holder[key] = deepcopy(rng.choice(ODD))
        case 1:
            del holder[key]
        case 2 if isinstance(holder, dict):  # under another name
            names = [*holder, *(d for d in donors if isinstance(d, str)), "", "0", "a"]
            del holder[key]
            holder[rng.choice(names)] = old
        case 2:
            holder.insert(key, deepcopy(old))
        case 3:  # a part of the same document, or of another
            other, name = _walk(rng.choice([value, *donors]), rng)
            if other is not None:
                part = deepcopy(other[name])
                holder[
                    name
                    if isinstance(holder, dict) and isinstance(other, dict) and rng.random() < 0.7
                    else key
                ] = part
        case 4 if isinstance(old, str):
            holder[key] = _text(old, rng)
        case 5 if isinstance(old, (int, float)) and not isinstance(old, bool):
            holder[key] = _number(old, rng)
        case 6:
            holder[key] = rng.choice(([old], {"a": old}, [old, old], str(old)[:200], bool(old)))
        case 7 if isinstance(old, dict) and old:
            left = rng.choice(list(old))
            holder[key] = {left: old[left]}
        case 7 if isinstance(old, list):
            rng.shuffle(old)
        case _:
            holder[key] = (
                rng.choice(INTEGERS) if isinstance(old, int) else deepcopy(rng.choice(ODD))
            )
    return value


def _loads(data: bytes) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _dumps(value: Any, rng: Random) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # thousands of digits
        return b"[" * 20_000


def _changed(value: Any, rng: Random, donors: Sequence[Any] = ()) -> Any:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = change_value(value, rng, donors)
    return value


def json_file(data: bytes, rng: Random, donors: Sequence[bytes], plain: Plain) -> bytes:
    value = _loads(data)
    if value is None or rng.random() < 0.1:
        return plain(data, rng)
    return _dumps(_changed(value, rng, [_loads(rng.choice(donors))] if donors else []), rng)


# --- lines of text


def _word_changed(line: str, rng: Random, other: str) -> str:
    """A line with one of its words replaced: by a number near it, an odd value, or a word of the
    other line."""
    words = re.split(r"([\s:=,]+)", line)  # every second one lies between two words
    at = rng.randrange(0, len(words), 2)
    try:
        near = _number(
            int(words[at]) if words[at].lstrip("-").isdecimal() else float(words[at]), rng
        )
    except (ValueError, OverflowError):
        near = words[at] * 2
    odd = rng.choice(ODD)
    choices = (
        "" if isinstance(near, list) else str(near),
        str(odd)[:400] if odd != 10**400 else "9" * 400,
        rng.choice(re.split(r"[\s:=,]+", other)),
    )
    words[at] = rng.choice((*choices, *choices, ""))
    return "".join(words)


def lines(data: bytes, rng: Random, donors: Sequence[bytes], plain: Plain) -> bytes:
    """Text whose lines and words are moved, doubled, left out and replaced; a line that is JSON is
    changed as JSON."""
    if rng.random() < 0.1:
        return plain(data, rng)
    text = data.decode("utf-8", "surrogateescape")
    end = rng.choice(("\n", "\n", "\n", "\n", "\r\n", "\r", "\x85", "\u2028"))
    found = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(found))
        strange = (
            rng.choice(donors).decode("utf-8", "replace").split("\n")
            if donors and rng.random() < 0.3
            else found
        )
        other = rng.choice(strange)
        match rng.randrange(10):
            case 0 if len(found) > 1:
                del found[at]
            case 1:
                found.insert(at, other)
            case 2:
                found[at] = other
            case 3 | 4 if (value := _loads(found[at].encode("utf-8", "replace"))) is not None:
                found[at] = _dumps(
                    _changed(value, rng, [_loads(other.encode("utf-8", "replace"))]), rng
                ).decode("utf-8", "replace")
            case 3 | 4 | 5 | 6:
                found[at] = _word_changed(found[at], rng, other)
            case 7:
                found[at] = " " * rng.choice((1, 2, 4, 8)) + found[at]
            case 8:
                found = found[: at + 1]
            case _:
                found[at] = _text(found[at], rng)
    return _bytes(end.join(found))


def _bytes(text: str) -> bytes:
    """Half a surrogate pair that stands for a byte as that byte, any other as UTF-8 would have
    it."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def yaml_file(data: bytes, rng: Random, donors: Sequence[bytes], plain: Plain) -> bytes:
    """As text, or as what it says, written anew."""
    import yaml

    if rng.random() < 0.5:
        return lines(data, rng, donors, plain)
    try:
        value, other = yaml.safe_load(data), yaml.safe_load(rng.choice(donors)) if donors else None
        return yaml.safe_dump(
            _changed(value, rng, [other]), sort_keys=False, allow_unicode=True
        ).encode("utf-8", "replace")
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return lines(data, rng, donors, plain)


def _packed_lines(unpack: Callable[[bytes], bytes], pack: Callable[[bytes], bytes]) -> Mutator:
    """Of compressed lines: what is inside, packed again, or sometimes the bytes as they are."""

    def change(data: bytes, rng: Random, donors: Sequence[bytes], plain: Plain) -> bytes:
        try:
            inner = unpack(data)
        except (OSError, EOFError, zlib.error, lzma.LZMAError):
            return plain(data, rng)
        return plain(data, rng) if rng.random() < 0.3 else pack(lines(inner, rng, (), plain))

    return change


def flipped(data: bytes, rng: Random, donors: Sequence[bytes], plain: Plain) -> bytes:
    return plain(data, rng)


# --- safetensors


def safetensors(data: bytes, rng: Random, donors: Sequence[bytes], plain: Plain) -> bytes:
    """The header changed as JSON, its length set right; sometimes the bytes behind it."""
    length = int.from_bytes(data[:8], "little")
    value = _loads(data[8 : 8 + length]) if length < len(data) else None
    if not isinstance(value, dict) or rng.random() < 0.1:
        return plain(data, rng)
    body = data[8 + length :]
    if rng.random() < 0.15:
        body = plain(body, rng)
    else:
        other = rng.choice(donors) if donors else data
        value = _changed(value, rng, [_loads(other[8 : 8 + int.from_bytes(other[:8], "little")])])
    raw = _dumps(value, rng)
    raw += b" " * (-len(raw) % 8)
    said = len(raw) if rng.random() < 0.97 else rng.choice(INTEGERS) % 2**64
    return said.to_bytes(8, "little") + raw + body


# --- protocol buffers, as deep as SentencePiece's message goes


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


_Field = tuple[int, int, Any]  # number, wire type, an integer or bytes


def _fields(data: bytes) -> list[_Field]:
    """Raises IndexError or ValueError for what is no message."""
    found: list[_Field] = []
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            value, at = _read_varint(data, at)
            found.append((key >> 3, 0, value))
            continue
        if key & 7 == 2:
            size, at = _read_varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError(key)
        found.append((key >> 3, key & 7, data[at : at + size]))
        at += size
    return found


def _message(fields: Sequence[_Field]) -> bytes:
    out = bytearray()
    for number, wire, value in fields:
        out += _varint(number << 3 | wire)
        out += (
            _varint(value)
            if isinstance(value, int)
            else (_varint(len(value)) if wire == 2 else b"") + value
        )
    return bytes(out)


def _change_field(found: _Field, rng: Random, plain: Plain) -> _Field:
    number, wire, value = found
    if rng.random() < 0.1:
        return rng.choice((1, 2, 3, 4, 5, 24, 35, 41, 42, 43, number + 1)), wire, value
    if isinstance(value, int):
        return number, 0, rng.choice((*INTEGERS[:-1], value + 1, value ^ 1, 2**64 - 1, 4, 5, 6))
    if wire == 2 and rng.random() < 0.5:
        return number, wire, _text(value.decode("utf-8", "replace"), rng).encode("utf-8", "replace")
    if wire == 5:
        return (
            number,
            wire,
            struct.pack(
                "<f", rng.choice((0.0, -1.0, 1e30, -1e30, math.nan, math.inf, rng.random()))
            ),
        )
    return number, wire, plain(value, rng)


def protobuf(data: bytes, rng: Random, donors: Sequence[bytes], plain: Plain) -> bytes:
    if rng.random() < 0.1:
        return plain(data, rng)
    try:
        fields = _fields(data)
        others = _fields(rng.choice(donors)) if donors else fields
        for _ in range(rng.choice((1, 1, 2, 4))):
            if not fields:
                break
            # pieces are many, trainer and normaliser one
            late = [i for i, f in enumerate(fields) if f[0] != 1]
            at = rng.choice(late) if late and rng.random() < 0.4 else rng.randrange(len(fields))
            match rng.randrange(7):
                case 0:
                    del fields[at]
                case 1:
                    fields.insert(rng.randrange(len(fields) + 1), fields[at])
                case 2:
                    fields.insert(at, rng.choice(others))
                case _:
                    number, wire, value = fields[at]
                    inner = _fields(value) if wire == 2 else []
                    if inner and rng.random() < 0.9:
                        place = rng.randrange(len(inner))
                        if rng.random() < 0.2:
                            inner.insert(
                                place,
                                inner[place]
                                if rng.random() < 0.5
                                else (rng.choice((1, 2, 3, 4, 5, 24, 35, 43)), 0, 1),
                            )
                        elif rng.random() < 0.2:
                            del inner[place]
                        else:
                            inner[place] = _change_field(inner[place], rng, plain)
                        fields[at] = number, wire, _message(inner)
                    else:
                        fields[at] = _change_field(fields[at], rng, plain)
        return _message(fields)
    except (IndexError, ValueError):
        return plain(data, rng)


# --- GGUF

_SIZES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class _Pair:
    key: bytes
    kind: int
    values: list[Any]  # one, or an array's
    item: int | None = None  # the type of an array's values


@dataclass(frozen=True)
class _Tensor:
    name: bytes
    shape: list[int]
    kind: int
    offset: int


@dataclass
class _Gguf:
    version: int = 3
    pairs: list[_Pair] = field(default_factory=list)
    tensors: list[_Tensor] = field(default_factory=list)
    body: bytes = b""


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError(count)
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> bytes:
        return self.take(self.number("Q"))

    def values(self, kind: int, count: int) -> list[Any]:
        if count > len(self.data):
            raise ValueError(count)
        return [self.text() if kind == 8 else self.number(_SIZES[kind]) for _ in range(count)]


def _read_gguf(data: bytes) -> _Gguf:
    """Raises ValueError, LookupError or struct.error for what is no such file."""
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF":
        raise ValueError("magic")
    found = _Gguf(cursor.number("I"))
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    if tensors + pairs > len(data):
        raise ValueError("counts")
    for _ in range(pairs):
        key, kind = cursor.text(), cursor.number("I")
        item = cursor.number("I") if kind == 9 else None
        values = cursor.values(kind, 1) if item is None else cursor.values(item, cursor.number("Q"))
        found.pairs.append(_Pair(key, kind, values, item))
    for _ in range(tensors):
        name, dims = cursor.text(), cursor.number("I")
        if dims > 8:
            raise ValueError(dims)
        found.tensors.append(
            _Tensor(
                name,
                [cursor.number("Q") for _ in range(dims)],
                cursor.number("I"),
                cursor.number("Q"),
            )
        )
    cursor.at = min(len(data), cursor.at + -cursor.at % 32)
    found.body = data[cursor.at :]
    return found


def _packed(kind: int, value: Any) -> bytes:
    if kind == 8:
        raw = value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
        return struct.pack("<Q", len(raw)) + raw
    form = _SIZES.get(kind, "I")
    try:
        number: Any = float(value) if form in "fd" else int(value)
        if form not in "fd":
            size = 8 * struct.calcsize(form)
            number %= 2**size
            number -= 2**size if form.islower() and number >= 2 ** (size - 1) else 0
        return struct.pack("<" + form, number)
    except (ValueError, OverflowError, TypeError, struct.error):
        return bytes(struct.calcsize("<" + form))


def _write_gguf(found: _Gguf, slips: int = 0) -> bytes:
    """slips: added to the number of pairs, so that it is wrong."""
    out = bytearray(
        b"GGUF"
        + struct.pack("<IQQ", found.version, len(found.tensors), (len(found.pairs) + slips) % 2**64)
    )
    for pair in found.pairs:
        out += _packed(8, pair.key) + struct.pack("<I", pair.kind)
        if pair.item is not None:
            out += struct.pack("<IQ", pair.item, len(pair.values))
        out += b"".join(
            _packed(pair.kind if pair.item is None else pair.item, value) for value in pair.values
        )
    for tensor in found.tensors:
        shape = [size % 2**64 for size in tensor.shape]
        out += _packed(8, tensor.name) + struct.pack(
            f"<I{len(shape)}QIQ", len(shape), *shape, tensor.kind % 2**32, tensor.offset % 2**64
        )
    return bytes(out) + bytes(-len(out) % 32) + found.body


def _change_metadatum(value: Any, rng: Random, plain: Plain) -> Any:
    if isinstance(value, bytes):
        if rng.random() < 0.7 and (inner := _loads(value)) is not None:  # our own keys hold JSON
            return _dumps(_changed(inner, rng), rng)
        if rng.random() < 0.2:
            return plain(value, rng)
        return _text(value.decode("utf-8", "replace"), rng).encode("utf-8", "replace")
    if rng.random() < 0.5:
        return rng.choice((*INTEGERS, 0.0, math.nan, math.inf, -1.5, 1e30))
    return _number(value, rng) if isinstance(value, (int, float)) else rng.choice(INTEGERS)


def _change_pair(pair: _Pair, rng: Random, plain: Plain) -> _Pair:
    values = list(pair.values)
    choice = rng.random()
    if choice < 0.08:
        return replace(
            pair,
            kind=rng.choice((0, 4, 5, 6, 7, 8, 10, 12, 13)),
            item=None,
            values=values[:1] or [0],
        )
    if choice < 0.12:
        return replace(
            pair,
            kind=9,
            item=rng.choice((0, 4, 5, 6, 7, 8, 9, 12)),
            values=[] if rng.random() < 0.3 else values,
        )
    if choice < 0.2:
        return replace(
            pair, key=_text(pair.key.decode("utf-8", "replace"), rng).encode("utf-8", "replace")
        )
    if pair.item is None or not values:
        return replace(pair, values=[_change_metadatum(value, rng, plain) for value in values])
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(values)) if values else 0
        match rng.randrange(5):
            case 0 if values:
                del values[at]
            case 1 if values:
                values.insert(at, values[at])
            case 2:
                values = values[:at]
            case _ if values:
                values[at] = (
                    _change_metadatum(values[at], rng, plain)
                    if rng.random() < 0.7
                    else rng.choice(values)
                )
    return replace(pair, values=values)


def _change_tensor(tensor: _Tensor, rng: Random) -> _Tensor:
    shape = list(tensor.shape)
    at = rng.randrange(len(shape)) if shape else 0
    match rng.randrange(6):
        case 0 if shape:
            shape[at] = rng.choice((*INTEGERS, shape[at] * 2, shape[at] + 1, shape[at] // 2))
        case 1:
            shape.insert(at, rng.choice((0, 1, 2)))
        case 2 if shape:
            del shape[at]
        case 3:
            return replace(
                tensor, kind=rng.choice((0, 1, 2, 3, 6, 7, 8, 10, 12, 13, 14, 30, 2**31))
            )
        case 4:
            return replace(
                tensor, offset=rng.choice((*INTEGERS, tensor.offset + 32, tensor.offset - 32))
            )
        case _:
            return replace(
                tensor,
                name=_text(tensor.name.decode("utf-8", "replace"), rng).encode("utf-8", "replace"),
            )
    return replace(tensor, shape=shape)


def gguf(data: bytes, rng: Random, donors: Sequence[bytes], plain: Plain) -> bytes:
    if rng.random() < 0.1:
        return plain(data, rng)
    try:
        found = _read_gguf(data)
    except (ValueError, LookupError, struct.error):
        return plain(data, rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        pairs, tensors = found.pairs, found.tensors
        match rng.randrange(10):
            case 0 if pairs:
                del pairs[rng.randrange(len(pairs))]
            case 1 if tensors:
                del tensors[rng.randrange(len(tensors))]
            case 2 if donors:
                try:
                    other = _read_gguf(rng.choice(donors))
                except (ValueError, LookupError, struct.error):
                    continue
                pair = rng.choice(other.pairs) if other.pairs else None
                found.pairs = [p for p in pairs if pair is None or p.key != pair.key] + (
                    [pair] if pair else []
                )
            case 3 if pairs:
                pairs.append(rng.choice(pairs))
            case 4 if tensors:
                tensors.append(rng.choice(tensors))
            case 5 if tensors:
                at = rng.randrange(len(tensors))
                tensors[at] = _change_tensor(tensors[at], rng)
            case 6:
                found.body = plain(found.body, rng)
            case _ if pairs:
                at = rng.randrange(len(pairs))
                pairs[at] = _change_pair(pairs[at], rng, plain)
    if rng.random() < 0.02:
        found.version = rng.choice((0, 1, 2, 4, 2**24))
    return _write_gguf(found, rng.choice((1, -1, 2**40)) if rng.random() < 0.02 else 0)


# --- by name

_BY_SUFFIX: dict[str, Mutator] = {
    ".json": json_file,
    ".yaml": yaml_file,
    ".safetensors": safetensors,
    ".model": protobuf,
    ".gguf": gguf,
    ".gz": _packed_lines(gzip.decompress, lambda data: gzip.compress(data, mtime=0)),
    ".xz": _packed_lines(lzma.decompress, lzma.compress),
    ".zst": flipped,
    ".parquet": flipped,
    ".arrow": flipped,
}


def of_file(name: str) -> Mutator:
    """How a file of that name is changed: as lines of text, where its suffix says nothing else."""
    return _BY_SUFFIX.get(name[name.rindex(".") :], lines)


# --- several files in one input

_MARK = re.compile(rb"^%% (.+)\n", re.MULTILINE)


def joined(files: dict[str, bytes]) -> bytes:
    """Files as one input, which can be read and edited: each behind a line with its name."""
    return b"".join(
        b"%% " + name.encode() + b"\n" + content + b"\n" for name, content in files.items()
    )


def split(data: bytes, names: Sequence[str]) -> dict[str, bytes]:
    """The files of an input, those in `names` alone; the last of two of one name."""
    parts = _MARK.split(data)[1:]
    found = {
        name.decode("utf-8", "replace"): content.removesuffix(b"\n")
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    }
    return {name: content for name, content in found.items() if name in names}


def mutated(
    data: bytes, rng: Random, names: Sequence[str], donors: Sequence[bytes], plain: Plain = flip
) -> bytes:
    """`data` changed in one of its files; one file alone is the input itself."""
    if len(names) == 1:
        return of_file(names[0])(data, rng, donors, plain)
    files = split(data, names)
    others = split(rng.choice(donors), names) if donors else {}
    if not files:
        return plain(data, rng)
    choice = rng.random()
    name = rng.choice(list(files))
    if choice < 0.03 and len(files) > 1:
        del files[name]
    elif choice < 0.1 and others:
        name = rng.choice(list(others))
        files[name] = others[name]
    elif choice < 0.12:
        return plain(data, rng)
    else:
        files[name] = of_file(name)(
            files[name], rng, [others[name]] if name in others else [], plain
        )
    return joined(files)
