"""SentencePiece's tokenizer.model (Llama 2, Vicuna, InternLM, Mistral) as what tokenizer.json would
have held."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from quantflow.errors import ModelError, Problem
from quantflow.tokenizers.declared import Declared, read_declared, vocabulary_of
from quantflow.tokenizers.loaded import Loaded, add_template, add_tokens
from quantflow.tokenizers.merges import merges_of
from quantflow.tokenizers.reading import file_bytes, guarded
from quantflow.tokenizers.sentencepiece_model import (
    BPE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    read_sentencepiece,
)

SPACE = "\u2581"  # ▁, SentencePiece's letter for a space


def is_tiktoken(data: bytes) -> bool:
    """Whether a file that begins so holds tiktoken's ranks."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data) is not None


def from_sentencepiece(path: Path) -> Loaded:
    file = path / "tokenizer.model"
    data = file_bytes(file)
    try:
        model = read_sentencepiece(data)
    except ValueError as error:  # UnicodeDecodeError is one
        hint = "Is the download complete?"
        if is_tiktoken(data):
            hint = "It is a tiktoken file, as Llama 3 has: such a model needs its tokenizer.json"
        raise ModelError(
            Problem(str(file), f"not a SentencePiece model ({error})", hint=hint)
        ) from error
    return sentencepiece_tokenizer(path, file, model, read_declared(path))


def sentencepiece_tokenizer(
    path: Path, file: Path, model: SentencePieceModel, declared: Declared
) -> Loaded:
    """The tokenizer of a SentencePiece model that stood in `file`, with what else was declared in
    `path`. Raises ModelError."""
    names = [piece.text for piece in model.pieces]
    kinds = [piece.kind for piece in model.pieces]
    for i in declared.placed:
        # A placeholder such as [UNUSED_TOKEN_145] that the configuration gives another name.
        if i < len(names) and names[i] != declared.placed[i].content:
            names[i] = declared.placed[i].content
    vocab = vocabulary_of(path, names, declared)

    # The added tokens: control tokens, the user's own, and what else is declared.
    added = {
        i: AddedToken(names[i], special=True, normalized=False)
        for i, kind in enumerate(kinds)
        if kind in (UNKNOWN, CONTROL)
    }
    # SentencePiece finds these in the normalised text, and lets nothing cross them.
    added |= {
        i: AddedToken(names[i], special=False, normalized=True)
        for i, kind in enumerate(kinds)
        if kind == USER_DEFINED
    }
    added |= {
        vocab[name]: AddedToken(name, special=True, normalized=False)
        for name in declared.specials
        if name in vocab
    }
    added |= declared.placed
    unknown = kinds.index(UNKNOWN)

    # The model: BPE, whose merges follow from the scores, or Unigram.
    if model.kind == BPE:
        scores = {
            piece.text: piece.score
            for i, piece in enumerate(model.pieces)
            if kinds[i] == NORMAL and i not in added
        }
        tokenizer = guarded(
            file,
            "a consistent vocabulary",
            lambda: Tokenizer(
                models.BPE(
                    vocab=vocab,
                    merges=merges_of({name: -score for name, score in scores.items()}),
                    unk_token=names[unknown],
                    fuse_unk=True,
                    byte_fallback=model.byte_fallback,
                )
            ),
        )
    else:
        entries = [(name, piece.score) for name, piece in zip(names, model.pieces, strict=True)]
        extra = sorted((i, name) for name, i in vocab.items() if i >= len(names))
        if [i for i, _ in extra] != list(range(len(names), len(vocab))):
            problem, expected = (
                f"ids {[i for i, _ in extra]}",
                f"ids that go on from {len(names)} without a gap",
            )
            raise ModelError(Problem(f"{path} added tokens", problem, expected))
        entries += [(name, 0.0) for _, name in extra]
        tokenizer = guarded(
            file,
            "a consistent vocabulary",
            lambda: Tokenizer(
                models.Unigram(entries, unk_id=unknown, byte_fallback=model.byte_fallback)
            ),
        )

        if model.byte_fallback:
            # Or <0x41> as somebody wrote it would be found in the vocabulary, and become an A.
            tokenizer.pre_tokenizer = pre_tokenizers.Split(
                Regex("<(?=0x[0-9A-F]{2}>)"), behavior="merged_with_previous"
            )
    # Text into pieces, and pieces into text.
    symbols = [token.content for token in added.values() if token.normalized]
    tokenizer.normalizer = guarded(
        file, "a character map that can be read", lambda: _space_normalizer(model, symbols)
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(steps)

    # Which token has which role, and what every text begins and ends with.
    roles = {"unk_token": names[unknown]}
    for role, i in (
        ("bos_token", model.bos_id),
        ("eos_token", model.eos_id),
        ("pad_token", model.pad_id),
    ):
        if 0 <= i < len(names) and kinds[i] == CONTROL:
            roles[role] = names[i]
    roles = {**roles, **declared.roles}
    add_tokens(tokenizer, added, declared, roles)
    add_template(
        tokenizer,
        roles,
        declared.add_bos if declared.add_bos is not None else True,
        bool(declared.add_eos),
    )
    return Loaded(tokenizer, roles, made=True)


def _space_normalizer(model: SentencePieceModel, symbols: list[str]) -> Any:
    """SentencePiece's normaliser. symbols: added tokens that are looked for in normalised text."""
    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.collapse_spaces:
        # Spaces alone: SentencePiece leaves tabs and newlines, where the character map has not made
        # them spaces.
        steps += [
            normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if model.dummy_prefix and symbols:
        # The library normalises the symbols too before it looks for them, and ▁<eoh> would never be
        # found. So a text that is a symbol and nothing else gets no ▁, which SentencePiece would
        # give it: the one difference.
        names = "|".join(re.escape(symbol) for symbol in sorted(symbols))
        steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{names})\z)"), SPACE))
    elif model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)
