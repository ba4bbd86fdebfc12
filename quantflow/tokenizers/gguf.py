"""A tokenizer from GGUF's metadata: the way back from `gguf_vocabulary.py`, and the only one for
files that others wrote."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from quantflow.errors import ModelError, Problem
from quantflow.tokenizers.byte_level import check_bytes
from quantflow.tokenizers.declared import Declared
from quantflow.tokenizers.gguf_splitters import EXPECTED, REFUSED, SPLITTERS, word_splitter
from quantflow.tokenizers.loaded import Loaded, add_template
from quantflow.tokenizers.reading import guarded
from quantflow.tokenizers.sentencepiece import sentencepiece_tokenizer
from quantflow.tokenizers.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
    check_sentencepiece,
)

_ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unknown": "unk",
    "padding": "pad",
    "seperator": "sep",
    "cls": "cls",
    "mask": "mask",
}  # as it is spelt
_HINT = "Put the model's own tokenizer.json and tokenizer_config.json beside the file"


def tokenizer_from_metadata(metadata: Mapping[str, Any], file: Path) -> Loaded:
    """The tokenizer of the `tokenizer.ggml.…` keys, which splits as llama.cpp does, and the tokens
    of the roles. file: where they stood.

    Raises ModelError for a kind that is not translated, and for keys that contradict each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("llama", "gpt2"):
        problem = "missing" if kind is None else f"{kind!r}"[:80]
        raise ModelError(Problem(f"{file} tokenizer.ggml.model", problem, "llama or gpt2", _HINT))
    tokens, types = _tokens(metadata, file)
    return (_sentencepiece if kind == "llama" else _byte_level)(metadata, file, tokens, types)


def _tokens(metadata: Mapping[str, Any], file: Path) -> tuple[list[str], list[int]]:
    """The tokens and their types, without those that only fill up the embedding."""
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list):
        raise ModelError(
            Problem(f"{file} tokenizer.ggml.tokens", f"{tokens!r}"[:80], "a list of tokens", _HINT)
        )
    types = array("i", [NORMAL] * len(tokens)) if types is None else types
    if (
        not isinstance(types, array)
        or len(types) != len(tokens)
        or not set(types) <= set(range(NORMAL, BYTE + 1))
    ):
        raise ModelError(
            Problem(
                f"{file} tokenizer.ggml.token_type",
                f"{types!r}"[:80],
                f"{len(tokens)} numbers from 1 to 6",
                _HINT,
            )
        )
    used = max((i + 1 for i, kind in enumerate(types) if kind != UNUSED), default=0)
    tokens = tokens[:used]
    wrong = next(
        (
            token
            for token in tokens
            if not token or any("\ud800" <= letter <= "\udfff" for letter in token)
        ),
        None,
    )
    if wrong is not None or len(set(tokens)) < used or not used:
        problem = (
            "no token"
            if not used
            else "two tokens that are the same"
            if wrong is None
            else f"the token {wrong!r}"[:80]
        )
        raise ModelError(
            Problem(f"{file} tokenizer.ggml.tokens", problem, "different tokens, in UTF-8", _HINT)
        )
    return tokens, list(types[:used])


def _number(metadata: Mapping[str, Any], key: str, default: int = -1) -> int:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    return value if type(value) is int else default


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    return value if isinstance(value, bool) else default


def _roles(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    numbers = {role: _number(metadata, f"{key}_token_id") for key, role in _ROLES.items()}
    return {
        f"{role}_token": tokens[number]
        for role, number in numbers.items()
        if 0 <= number < len(tokens)
    }


def _sentencepiece(
    metadata: Mapping[str, Any], file: Path, tokens: list[str], types: list[int]
) -> Loaded:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, array) or len(scores) < len(tokens):
        raise ModelError(
            Problem(
                f"{file} tokenizer.ggml.scores", f"{scores!r}"[:80], f"{len(tokens)} numbers", _HINT
            )
        )
    model = SentencePieceModel(
        tuple(Piece(*piece) for piece in zip(tokens, scores, types, strict=False)),
        kind=BPE,
        byte_fallback=BYTE in types,
        bos_id=_number(metadata, "bos_token_id", 1),
        eos_id=_number(metadata, "eos_token_id", 2),
        pad_id=_number(metadata, "padding_token_id"),
        space_suffix=False,
        charsmap=b"",
        dummy_prefix=_flag(metadata, "add_space_prefix", True),
        collapse_spaces=False,  # llama.cpp does so for other models alone
        escape_spaces=True,
    )
    try:
        check_sentencepiece(model)
    except ValueError as error:
        raise ModelError(
            Problem(f"{file} tokenizer.ggml", f"{error}", "a SentencePiece vocabulary", _HINT)
        ) from error
    declared = Declared(
        {},
        _roles(metadata, tokens),
        add_bos=_flag(metadata, "add_bos_token", True),
        add_eos=_flag(metadata, "add_eos_token", False),
    )
    return sentencepiece_tokenizer(file, file, model, declared)


def _byte_level(
    metadata: Mapping[str, Any], file: Path, tokens: list[str], types: list[int]
) -> Loaded:
    name = metadata.get("tokenizer.ggml.pre")
    splitter = SPLITTERS.get(name) if isinstance(name, str) else None
    if splitter is None:
        reason = REFUSED.get(name) if isinstance(name, str) else None
        problem = (
            "missing" if name is None else f"{name!r}"[:80] + (f", {reason}" if reason else "")
        )
        raise ModelError(Problem(f"{file} tokenizer.ggml.pre", problem, EXPECTED, _HINT))
    vocab = {token: number for number, token in enumerate(tokens)}
    check_bytes(f"{file} tokenizer.ggml.tokens", vocab)
    merges = metadata.get("tokenizer.ggml.merges")
    pairs = [tuple(merge.split(" ")) for merge in merges] if isinstance(merges, list) else []
    if not isinstance(merges, list) or any(len(pair) != 2 for pair in pairs):
        raise ModelError(
            Problem(
                f"{file} tokenizer.ggml.merges",
                "not there, or no pairs of tokens",
                "pairs of tokens",
                _HINT,
            )
        )
    tokenizer = guarded(
        file,
        "merges of its own tokens",
        lambda: Tokenizer(
            models.BPE(vocab=vocab, merges=pairs, ignore_merges=splitter.whole_words)
        ),
    )
    if splitter.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = word_splitter(splitter.expressions, vocab)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    roles = _roles(metadata, tokens)
    add_template(
        tokenizer,
        roles,
        _flag(metadata, "add_bos_token", splitter.begins),
        _flag(metadata, "add_eos_token", False),
    )
    return Loaded(tokenizer, roles, made=True)
