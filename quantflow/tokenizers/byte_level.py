"""Vocabularies of bytes, each written as a printable character, as GPT-2 does: qwen.tiktoken (the
first Qwen), and vocab.json with merges.txt (GPT-2, OPT)."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection
from itertools import groupby
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from quantflow.checkpoints.directory import read_json
from quantflow.errors import ModelError, Problem
from quantflow.tokenizers.declared import read_declared, vocabulary_of
from quantflow.tokenizers.loaded import Loaded, add_template, add_tokens
from quantflow.tokenizers.merges import merges_of
from quantflow.tokenizers.reading import Json, file_bytes, file_text, guarded, optional_json

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
)


def byte_characters() -> list[str]:
    """The printable character that GPT-2's vocabulary has for each of the 256 bytes."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(256 + i) for i in range(256))
    return [chr(byte) if byte in visible else next(others) for byte in range(256)]


def check_bytes(where: Path | str, vocab: Collection[str]) -> None:
    """Raises ModelError for a byte-level vocabulary in which a letter, digit or sign of ASCII has
    no token.

    Bytes that no text of the training had may have none (of SmolLM2's, 21: control characters, and
    bytes that are in no character): the library leaves them out of a text, as it does in
    transformers and llama.cpp. No text can do without the others.
    """
    missing = [byte for byte, name in enumerate(byte_characters()) if name not in vocab]
    if not any(byte in missing for byte in range(ord("!"), 127)):
        return
    runs = [
        [byte for _, byte in run]
        for _, run in groupby(enumerate(missing), key=lambda item: item[1] - item[0])
    ]
    which = ", ".join(
        f"{run[0]:#04x}" + (f" to {run[-1]:#04x}" if len(run) > 1 else "") for run in runs
    )
    problem = f"{len(missing)} of the 256 bytes have no token: {which}"
    expected = "a byte-level vocabulary, with all 94 signs of ASCII (0x21 to 0x7e)"
    raise ModelError(
        Problem(str(where), problem, expected, "What has no token would be left out of every text")
    )


def set_qwen_splitting(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


def from_tiktoken(path: Path) -> Loaded:
    file = path / "qwen.tiktoken"
    ranks = _read_ranks(file)
    characters = byte_characters()

    def spelled(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    ordered = sorted(ranks, key=ranks.__getitem__)
    names = [spelled(token) for token in ordered] + list(QWEN_SPECIALS)
    specials = {
        len(ordered) + i: AddedToken(name, special=True, normalized=False)
        for i, name in enumerate(QWEN_SPECIALS)
    }
    # The special tokens' ids follow the last rank: after a cut they would all be others'.
    ends = optional_json(path / "generation_config.json").get("eos_token_id")
    strange = [
        i
        for i in (ends if isinstance(ends, list) else [ends])
        if isinstance(i, int) and i not in specials
    ]
    if strange:
        raise ModelError(
            Problem(
                str(file),
                f"{len(ordered)} tokens, so that id {strange[0]} is no special token",
                "the vocabulary whose end token generation_config.json gives",
                "Is the download complete?",
            )
        )
    declared = read_declared(path)
    vocab = vocabulary_of(path, names, declared)
    merges = [(spelled(left), spelled(right)) for left, right in merges_of(ranks)]
    tokenizer = guarded(
        # ignore_merges: tiktoken, too, looks a whole word up before it merges.
        file,
        "a consistent vocabulary",
        lambda: Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True)),
    )
    set_qwen_splitting(tokenizer)
    raw_prompts = optional_json(path / "generation_config.json").get("chat_format") == "raw"
    roles = {
        "eos_token": "<|endoftext|>" if raw_prompts else "<|im_end|>",
        "pad_token": "<|endoftext|>",
        **declared.roles,
    }
    add_tokens(tokenizer, {**specials, **declared.placed}, declared, roles)
    if declared.add_bos or declared.add_eos:
        add_template(tokenizer, roles, bool(declared.add_bos), bool(declared.add_eos))
    return Loaded(tokenizer, roles, made=True)


def _read_ranks(file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for i, line in enumerate(file_bytes(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            value = base64.b64decode(token, validate=True)
            number = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ModelError(
                Problem(
                    f"{file} line {i}",
                    f"not a token ({error})",
                    "a token in base64 and its rank",
                    "Is the download complete?",
                )
            ) from error
        if value in ranks:
            raise ModelError(Problem(f"{file} line {i}", f"token {value!r} stands there twice"))
        ranks[value] = number
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if sorted(ranks.values()) != list(range(len(ranks))) or missing:
        problem = f"{len(ranks)} tokens, {len(missing)} of the 256 single bytes missing"
        raise ModelError(
            Problem(
                str(file),
                problem,
                "every rank from 0 once, and every byte",
                "Is the download complete?",
            )
        )
    return ranks


def from_vocab(path: Path) -> Loaded:
    # The vocabulary and its merges.
    file = path / "vocab.json"
    vocab = read_json(file)
    bad = next(
        (t for t, i in vocab.items() if not isinstance(i, int) or isinstance(i, bool) or i < 0),
        None,
    )
    if bad is not None or len(set(vocab.values())) < len(vocab):
        problem = (
            f"token {bad!r} has the id {vocab[bad]!r}"
            if bad is not None
            else "two tokens have one id"
        )
        raise ModelError(Problem(str(file), problem, "an id for each token"))
    check_bytes(file, vocab)
    if not (path / "merges.txt").is_file():
        raise ModelError(
            Problem(
                str(path / "merges.txt"),
                "missing",
                "the merges that go with vocab.json",
                "Is the download complete?",
            )
        )
    merges = _read_merges(path / "merges.txt", vocab)

    # Which token has which role, where neither file says it.
    declared = read_declared(path)
    model_type = optional_json(path / "config.json").get("model_type")
    qwen = str(model_type).startswith(("qwen2", "qwen3")) or str(
        declared.config.get("tokenizer_class")
    ).startswith("Qwen2")
    end = "</s>" if model_type == "opt" else "<|endoftext|>"
    roles = {
        role: end
        for role in ("bos_token", "eos_token", "unk_token")
        if end in vocab and not (qwen and role == "bos_token")
    }
    roles = {**roles, **declared.roles}
    by_id = {i: token for token, i in vocab.items()}
    # The added tokens.
    clash = next(
        (i for i, token in declared.placed.items() if by_id.get(i, token.content) != token.content),
        None,
    )
    if clash is not None:
        where = f"{path} added token {declared.placed[clash].content!r}"
        raise ModelError(Problem(where, f"has id {clash}, which is {by_id[clash]!r} in vocab.json"))
    for i, token in declared.placed.items():
        vocab[token.content] = i
    # The model, and how it splits.
    tokenizer = guarded(
        path / "merges.txt",
        "merges of tokens in vocab.json",
        lambda: Tokenizer(models.BPE(vocab=vocab, merges=merges)),
    )
    if qwen:
        set_qwen_splitting(tokenizer)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=bool(declared.config.get("add_prefix_space", False))
        )
        tokenizer.decoder = decoders.ByteLevel()
    # What is never split, and what every text begins and ends with.
    names = [name for name in (*roles.values(), *declared.specials) if name in vocab]
    named = {vocab[name]: AddedToken(name, special=True, normalized=False) for name in names}
    add_tokens(tokenizer, {**named, **declared.placed}, declared, roles)
    # OPT was trained with </s> in front.
    add_bos = declared.add_bos if declared.add_bos is not None else model_type == "opt"
    if add_bos or declared.add_eos:
        add_template(tokenizer, roles, add_bos, bool(declared.add_eos))
    return Loaded(tokenizer, roles, made=True)


def _read_merges(file: Path, vocab: Json) -> list[tuple[str, str]]:
    merges = []
    for i, line in enumerate(file_text(file).split("\n"), start=1):
        line = line.rstrip("\r")
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or any(part not in vocab for part in (*parts, "".join(parts))):
            raise ModelError(
                Problem(
                    f"{file} line {i}",
                    repr(line),
                    "two tokens of vocab.json that make a third",
                    "Is the download complete?",
                )
            )
        merges.append((parts[0], parts[1]))
    # Every longer token but the special ones is the result of a merge; a file cut at a line's end
    # has lost some.
    made = {left + right for left, right in merges}
    orphans = [
        token
        for token in vocab
        if len(token) > 1
        and token not in made
        and not re.fullmatch(r"<.*>|\[.*\]|madeupword\d+", token)
    ]
    if len(orphans) > max(16, len(vocab) // 20):
        problem = f"no merge for {len(orphans)} of {len(vocab)} tokens"
        raise ModelError(
            Problem(str(file), problem, "the merges of vocab.json", "Is the download complete?")
        )
    return merges
