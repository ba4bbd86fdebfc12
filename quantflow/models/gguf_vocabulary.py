"""A tokenizer as GGUF's metadata has it, from a directory's tokenizer files.

llama.cpp splits text itself, by an algorithm (`gpt2`: byte-level BPE; `llama`: SentencePiece's BPE) and, for the first, by one of the
regular expressions that it knows by name. A tokenizer that does anything else is refused: it would run, and read another text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantflow.errors import FormatError, ModelError, Problem
from quantflow.models.tokenizer import chat_template, load_tokenizer, special_tokens

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPLITTERS = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2", _GPT2: "gpt-2"}


def vocabulary_metadata(folder: Path, config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The `tokenizer.…` keys. folder: with tokenizer files; config: of the model; size: of its embedding, up to which unused tokens are
    added. Raises FormatError for a tokenizer that llama.cpp does not have."""
    tokenizer = json.loads(load_tokenizer(folder).to_str())
    model = tokenizer["model"]
    vocabulary = model.get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocabulary, dict):
        raise FormatError(Problem("tokenizer", f"a model of type {model.get('type')}", "BPE, the only one that is translated to GGUF"))
    added = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    by_id = {number: text for text, number in vocabulary.items()} | {number: token["content"] for number, token in added.items()}
    if max(by_id) >= size:
        raise ModelError(Problem("tokenizer", f"a token {max(by_id)}", f"fewer than the {size} rows of the embedding"))
    plain = bool(model.get("byte_fallback"))
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    types = [_type(number, by_id, added, model.get("unk_token"), plain) for number in range(size)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    found: dict[str, Any] = {"tokenizer.ggml.model": "llama" if plain else "gpt2"}
    if plain:
        found["tokenizer.ggml.pre"] = "default"
        found["tokenizer.ggml.scores"] = _scores(tokens, merges)
        found["tokenizer.ggml.add_space_prefix"] = _adds_space(tokenizer)
    else:
        found["tokenizer.ggml.pre"] = _splitter(tokenizer)
        found["tokenizer.ggml.merges"] = merges
    found["tokenizer.ggml.tokens"] = tokens
    found["tokenizer.ggml.token_type"] = types
    numbers = {text: number for number, text in by_id.items()}
    roles = special_tokens(folder)
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        text = roles.get(f"{role}_token")
        number = config.get(f"{role}_token_id")
        number = numbers.get(text) if text is not None else number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < size:
            found[f"tokenizer.ggml.{key}_token_id"] = number
    begins, ends = _template_ends(tokenizer)
    found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"] = begins, ends
    if template := chat_template(folder):
        found["tokenizer.chat_template"] = template
    return found


def _type(number: int, by_id: Mapping[int, str], added: Mapping[int, Any], unknown: str | None, plain: bool) -> int:
    if number not in by_id:
        return UNUSED
    if by_id[number] == unknown:
        return UNKNOWN
    if number in added:
        return CONTROL if added[number].get("special") else USER_DEFINED
    text = by_id[number]
    return BYTE if plain and len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """What SentencePiece merges by: an earlier merge has a higher score. Letters, which no merge makes, have the lowest."""
    rank = {"".join(merge.split(" ")): -float(place) for place, merge in reversed(list(enumerate(merges)))}
    return [rank.get(token, -float(len(merges) + 1)) for token in tokens]


def _parts(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The members of a sequence of normalizers or pre-tokenizers, or the one that there is."""
    if not step:
        return []
    return list(step[inner]) if step.get("type") == "Sequence" else [step]


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    steps = [*_parts(tokenizer.get("normalizer"), "normalizers"), *_parts(tokenizer.get("pre_tokenizer"), "pretokenizers")]
    known = {"Prepend", "Replace", "Metaspace"}
    if strange := [str(step.get("type")) for step in steps if step.get("type") not in known]:
        expected = f"only {', '.join(sorted(known))}, which llama.cpp's SentencePiece does"
        raise FormatError(Problem("tokenizer", f"the step {strange[0]}", expected))
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("always", "first") for step in steps)


def _splitter(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the regular expression that a byte-level tokenizer splits at."""
    if strange := [str(step.get("type")) for step in _parts(tokenizer.get("normalizer"), "normalizers") if step.get("type") != "NFC"]:
        raise FormatError(Problem("tokenizer", f"the normalizer {strange[0]}", "none, or NFC"))
    found = None
    for step in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "ByteLevel":
            if step.get("add_prefix_space"):
                raise FormatError(Problem("tokenizer", "add_prefix_space", "byte-level splitting without it"))
            if step.get("use_regex", True):
                found = "gpt-2"
        elif step.get("type") == "Split":
            found = _SPLITTERS.get(str(step.get("pattern", {}).get("Regex")))
        else:
            found = None
            break
    if found is None:
        known = ", ".join(_SPLITTERS.values())
        hint = "llama.cpp would split another way: add its name to quantflow/models/gguf_vocabulary.py if it has the expression"
        raise FormatError(Problem("tokenizer", "a pre-tokenizer that llama.cpp has no known name for", f"that of {known}", hint))
    return found


def _template_ends(tokenizer: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the post-processor puts BOS before a text, and EOS after it."""
    processors = _parts(tokenizer.get("post_processor"), "processors")
    single: list[Any] = next((p["single"] for p in processors if p.get("type") == "TemplateProcessing"), [])
    names = ["special" if "SpecialToken" in part else "text" for part in single]
    return names[:1] == ["special"], names[-1:] == ["special"] and len(names) > 1
