"""SentencePiece's tokenizer.model: a protobuf message, read without the library that made it."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
UNIGRAM, BPE = 1, 2  # types of models


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says, with SentencePiece's defaults where it is silent."""

    pieces: tuple[Piece, ...]
    kind: int
    byte_fallback: bool
    bos_id: int
    eos_id: int
    pad_id: int
    space_suffix: bool
    charsmap: bytes
    dummy_prefix: bool
    collapse_spaces: bool
    escape_spaces: bool


def read_sentencepiece(data: bytes) -> SentencePieceModel:
    """The model in the bytes of a tokenizer.model. Raises ValueError, which says what is wrong.

    Field numbers: https://github.com/google/sentencepiece/blob/v0.2.0/src/sentencepiece_model.proto
    """
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] | None = None
    normalizer: dict[int, int | bytes] | None = None
    for number, value in _fields(data):
        if number in (1, 2, 3) and not isinstance(value, bytes):
            raise ValueError(f"field {number} is a number, not a message")
        if number == 1:
            piece = dict(_fields(_bytes(value)))
            score = struct.unpack("<f", _bytes(piece.get(2, bytes(4)), 4))[0]
            pieces.append(
                Piece(_bytes(piece.get(1, b"")).decode("utf-8"), score, _int(piece.get(3, NORMAL)))
            )
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    # They follow the pieces: a file without them was cut.
    if not pieces or trainer is None or normalizer is None:
        raise ValueError(
            "pieces, trainer or normalizer missing: cut off, or no SentencePiece model"
        )
    model = SentencePieceModel(
        tuple(pieces),
        kind=_int(trainer.get(3, UNIGRAM)),
        byte_fallback=bool(_int(trainer.get(35, 0))),
        bos_id=_int(trainer.get(41, 1)),
        eos_id=_int(trainer.get(42, 2)),
        pad_id=_int(trainer.get(43, -1)),
        space_suffix=bool(_int(trainer.get(24, 0))),
        charsmap=_bytes(normalizer.get(2, b"")),
        dummy_prefix=bool(_int(normalizer.get(3, 1))),
        collapse_spaces=bool(_int(normalizer.get(4, 1))),
        escape_spaces=bool(_int(normalizer.get(5, 1))),
    )
    check_sentencepiece(model)
    return model


def check_sentencepiece(model: SentencePieceModel) -> None:
    """Raises ValueError, which says what is wrong."""
    if model.kind not in (UNIGRAM, BPE):
        raise ValueError(f"model type {model.kind}: only BPE and unigram can be read")
    if model.space_suffix or not model.escape_spaces:
        raise ValueError("spaces as suffixes, or not escaped, cannot be read")
    unique = {piece.text for piece in model.pieces}
    if len(unique) < len(model.pieces) or "" in unique:
        raise ValueError("an empty piece, or one that is there twice")
    kinds = [piece.kind for piece in model.pieces]
    if kinds.count(UNKNOWN) != 1:
        raise ValueError(f"{kinds.count(UNKNOWN)} unknown pieces instead of one")
    if UNUSED in kinds or not set(kinds) <= set(range(1, 7)):
        raise ValueError(f"pieces of types {sorted(set(kinds))}: only 1, 2, 3, 4 and 6 can be read")
    if not all(math.isfinite(piece.score) for piece in model.pieces):
        raise ValueError("a score that is not finite")
    if model.byte_fallback and {piece.text for piece in model.pieces if piece.kind == BYTE} != {
        f"<0x{i:02X}>" for i in range(256)
    }:
        raise ValueError("byte fallback without a piece for each of the 256 bytes")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field number and value of a protobuf message: integers of varints, the bytes of anything
    else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise ValueError(f"field number 0 at byte {at}")
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(
                f"a field of {size} bytes at byte {at}, where {len(data) - at} are left"
            )
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("the file ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
    raise ValueError(f"a number of more than 10 bytes before byte {at}")


def _bytes(value: int | bytes, size: int | None = None) -> bytes:
    if not isinstance(value, bytes) or (size is not None and len(value) != size):
        raise ValueError("a field of another type than SentencePiece gives it")
    return value


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("a field of another type than SentencePiece gives it")
    return value
