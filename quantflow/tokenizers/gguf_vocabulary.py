"""A tokenizer as GGUF's metadata has it, from a directory's tokenizer files.

llama.cpp splits text itself, by an algorithm (`gpt2`: byte-level BPE; `llama`: SentencePiece's BPE)
and, for the first, by one of the ways to cut it into words that it knows by name
(`gguf_splitters.py`). A tokenizer that does anything else is refused: it would run, and read
another text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import models

from quantflow.errors import FormatError, ModelError, Problem
from quantflow.tokenizers.chat_templates import chat_template
from quantflow.tokenizers.gguf_splitters import EXPECTED, SPLITTERS, missing_bytes, splitter_names
from quantflow.tokenizers.load import load_tokenizer, special_tokens
from quantflow.tokenizers.sentencepiece import SPACE
from quantflow.tokenizers.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)


def vocabulary_metadata(folder: Path, config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The `tokenizer.…` keys. folder: with tokenizer files; config: of the model; size: of its
    embedding, up to which unused tokens are added. Raises FormatError for a tokenizer that
    llama.cpp does not have."""
    # A tokenizer that llama.cpp has: plain BPE, over bytes or with a fallback to them.
    tokenizer = json.loads(load_tokenizer(folder).to_str())
    model = tokenizer["model"]
    vocabulary = model.get("vocab")
    odd = any(
        model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
    )
    if model.get("type") != "BPE" or not isinstance(vocabulary, dict) or odd:
        raise FormatError(
            Problem(
                "tokenizer",
                f"a model of type {model.get('type')}",
                "plain BPE, the only one that is translated to GGUF",
            )
        )
    added = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    by_id = {number: text for text, number in vocabulary.items()} | {
        number: token["content"] for number, token in added.items()
    }
    if max(by_id) >= size:
        raise ModelError(
            Problem(
                "tokenizer", f"a token {max(by_id)}", f"fewer than the {size} rows of the embedding"
            )
        )
    plain = bool(model.get("byte_fallback"))
    steps = [
        *_parts(tokenizer.get("normalizer"), "normalizers"),
        *_parts(tokenizer.get("pre_tokenizer"), "pretokenizers"),
    ]
    if not plain and not any(step.get("type") == "ByteLevel" for step in steps):
        found_, expected = (
            "BPE that is neither byte-level nor falls back to bytes",
            "one of the two: llama.cpp has no other BPE",
        )
        raise FormatError(
            Problem(
                "tokenizer",
                found_,
                expected,
                "Other formats keep the tokenizer's files as they are",
            )
        )
    # The vocabulary, padded to the rows of the embedding.
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    types = [_type(number, by_id, added, model.get("unk_token"), plain) for number in range(size)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    metadata: dict[str, Any] = {"tokenizer.ggml.model": "llama" if plain else "gpt2"}
    if plain:
        _check_merges(dict(zip(tokens, types, strict=True)), merges)
        metadata["tokenizer.ggml.pre"] = "default"
        metadata["tokenizer.ggml.scores"] = _scores(tokens, merges)
        metadata["tokenizer.ggml.add_space_prefix"] = _adds_space(tokenizer)
    else:
        metadata["tokenizer.ggml.pre"] = _splitter(tokenizer)
        metadata["tokenizer.ggml.merges"] = merges
    metadata["tokenizer.ggml.tokens"] = tokens
    metadata["tokenizer.ggml.token_type"] = types
    # Which token has which role, and what every text begins and ends with.
    numbers = {text: number for number, text in by_id.items()}
    roles = special_tokens(folder)
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        text = roles.get(f"{role}_token")
        number = config.get(f"{role}_token_id")
        number = (
            numbers.get(text)
            if text is not None
            else number[0]
            if isinstance(number, list) and number
            else number
        )
        if isinstance(number, int) and 0 <= number < size:
            metadata[f"tokenizer.ggml.{key}_token_id"] = number
    begin, end = (
        by_id.get(metadata.get(f"tokenizer.ggml.{role}_token_id", -1)) for role in ("bos", "eos")
    )
    begins, ends = _template_ends(tokenizer, begin, end)
    metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"] = (
        begins,
        ends,
    )
    # The chat templates.
    if template := chat_template(folder):
        metadata |= {
            f"tokenizer.chat_template{'' if n == 'default' else f'.{n}'}": text
            for n, text in sorted(template.templates.items())
        }
        if others := sorted(set(template.templates) - {"default"}):
            metadata["tokenizer.chat_templates"] = others
    return metadata


def _type(
    number: int,
    by_id: Mapping[int, str],
    added: Mapping[int, Any],
    unknown: str | None,
    plain: bool,
) -> int:
    if number not in by_id:
        return UNUSED
    if by_id[number] == unknown:
        return UNKNOWN
    if number in added:
        return CONTROL if added[number].get("special") else USER_DEFINED
    text = by_id[number]
    return (
        BYTE
        if plain and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        else NORMAL
    )


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """What SentencePiece merges by: an earlier merge has a higher score. Letters, which no merge
    makes, have the lowest."""
    rank = {
        "".join(merge.split(" ")): -float(place)
        for place, merge in reversed(list(enumerate(merges)))
    }
    return [rank.get(token, -float(len(merges) + 1)) for token in tokens]


def _parts(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The members of a sequence of normalizers or pre-tokenizers, or the one that there is."""
    if not step:
        return []
    return list(step[inner]) if step.get("type") == "Sequence" else [step]


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space goes before a text. Raises FormatError for steps that llama.cpp's
    SentencePiece does not do.

    One difference is let pass, as in llama.cpp's own converter: it adds a space behind special
    tokens within a text too, which `prepend_scheme: first` does not.
    """
    adds = False
    for step in [
        *_parts(tokenizer.get("normalizer"), "normalizers"),
        *_parts(tokenizer.get("pre_tokenizer"), "pretokenizers"),
    ]:
        kind, pattern = step.get("type"), step.get("pattern", {})
        # but before a symbol alone: `sentencepiece.py` says why
        begins = str(pattern.get("Regex", "")).startswith(r"\A(?!")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            adds = True
        elif (
            kind == "Replace"
            and step.get("content") == SPACE
            and (begins or pattern == {"String": " "})
        ):
            adds = adds or begins
        elif (
            kind == "Metaspace" and step.get("replacement") == SPACE and not step.get("split", True)
        ):
            adds = adds or step.get("prepend_scheme") in ("always", "first")
        else:
            expected = (
                "a space before the text and ▁ for every space: all that llama.cpp's SentencePiece"
                " does"
            )
            raise FormatError(
                Problem(
                    "tokenizer", f"the step {json.dumps(step, ensure_ascii=False)}"[:120], expected
                )
            )
    return adds


def _check_merges(types: Mapping[str, int], merges: list[str]) -> None:
    """llama.cpp's SentencePiece joins the pair whose result is best, whatever its halves. Raises
    FormatError where these merges do something else: lack a way to split a token, or make one at
    several places of their order."""
    listed, made = set(merges), [merge.replace(" ", "", 1) for merge in merges]
    normal = {text for text, kind in types.items() if kind == NORMAL}
    problem = (
        "merges that make a token at two places of their order"
        if len(list(groupby(made))) != len(set(made))
        else ""
    )
    for text in normal:
        splits = (
            f"{text[:cut]} {text[cut:]}"
            for cut in range(1, len(text))
            if text[:cut] in normal and text[cut:] in normal
        )
        if missing := next((split for split in splits if split not in listed), None):
            problem = f"no merge {missing!r}"
    if problem:
        raise FormatError(
            Problem(
                "tokenizer",
                problem,
                "the merges of a SentencePiece model, all that llama.cpp has beside byte-level BPE",
            )
        )


def _splitter(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way that a byte-level tokenizer cuts a text into words, and merges
    them."""
    if strange := [
        str(step.get("type"))
        for step in _parts(tokenizer.get("normalizer"), "normalizers")
        if step.get("type") != "NFC"
    ]:
        raise FormatError(Problem("tokenizer", f"the normalizer {strange[0]}", "none, or NFC"))
    steps = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if any(step.get("add_prefix_space") for step in steps):
        raise FormatError(
            Problem("tokenizer", "add_prefix_space", "byte-level splitting without it")
        )
    apart = missing_bytes(tokenizer["model"]["vocab"])
    # the reader's own, of what llama.cpp does by itself
    if apart and steps and steps[-1].get("pattern") == {"Regex": apart}:
        steps = steps[:-1]
    expressions = [_expression(step) for step in steps]
    names = (
        splitter_names(tuple(each for each in expressions if each))
        if None not in expressions
        else []
    )
    if not names or [step.get("type") for step in steps].index("ByteLevel") != len(steps) - 1:
        hint = (
            "llama.cpp would split another way: add its name to"
            " quantflow/tokenizers/gguf_splitters.py if it has the expression"
        )
        raise FormatError(
            Problem(
                "tokenizer",
                "a pre-tokenizer that llama.cpp has no known name for",
                f"that of {EXPECTED}",
                hint,
            )
        )
    whole = bool(tokenizer["model"].get("ignore_merges"))
    fitting = [name for name in names if SPLITTERS[name].whole_words == whole]
    if not fitting and not _merges_reach_all(tokenizer):
        problem = f"ignore_merges: {json.dumps(whole)} beside the pre-tokenizer of {names[0]}"
        raise FormatError(
            Problem(
                "tokenizer",
                problem,
                f"{json.dumps(not whole)}, which is all that llama.cpp has for it",
            )
        )
    normalised = bool(tokenizer.get("normalizer"))
    return min(fitting or names, key=lambda name: SPLITTERS[name].nfc != normalised)


def _expression(step: Mapping[str, Any]) -> str | None:
    """What a pre-tokenizer isolates, as a regular expression; empty for nothing, None for one that
    is not of this kind."""
    match step:
        case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": str(regex)}} if (
            not step.get("invert")
        ):
            return regex
        case {"type": "Digits"}:
            return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
        case {"type": "ByteLevel"}:
            return SPLITTERS["gpt-2"].expressions[0] if step.get("use_regex", True) else ""
    return None


def _merges_reach_all(tokenizer: Mapping[str, Any]) -> bool:
    """Whether merging makes every token of the vocabulary out of its own text, so that
    `ignore_merges` changes nothing."""
    model = tokenizer["model"]
    merges = [
        tuple(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]
    ]
    bpe = models.BPE(vocab=model["vocab"], merges=merges)
    added = {token["id"] for token in tokenizer.get("added_tokens", [])}
    return all(
        [token.id for token in bpe.tokenize(text)] == [number]
        for text, number in model["vocab"].items()
        if number not in added
    )


def _template_ends(
    tokenizer: Mapping[str, Any], begin: str | None, end: str | None
) -> tuple[bool, bool]:
    """Whether the post-processor puts BOS before a text, and EOS after it. Raises FormatError where
    it puts anything else."""
    processors = _parts(tokenizer.get("post_processor"), "processors")
    single: list[Any] = next(
        (p["single"] for p in processors if p.get("type") == "TemplateProcessing"),
        [{"Sequence": {}}],
    )
    names = [part["SpecialToken"]["id"] if "SpecialToken" in part else "" for part in single]
    at = names.index("")
    if names[:at] not in ([], [begin]) or names[at + 1 :] not in ([], [end]):
        raise FormatError(
            Problem(
                "tokenizer",
                f"{' '.join(filter(None, names))} around a text",
                "at most BOS before and EOS after it",
            )
        )
    return bool(names[:at]), bool(names[at + 1 :])
