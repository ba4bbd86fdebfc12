"""What the JSON files beside a vocabulary say of its tokens."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken

from quantflow.errors import ModelError, Problem
from quantflow.tokenizers.reading import Json, optional_json

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Declared:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say."""

    config: Json
    roles: dict[str, str] = field(default_factory=dict)
    specials: tuple[str, ...] = ()  # the roles' tokens and the additional ones
    placed: dict[int, AddedToken] = field(default_factory=dict)  # tokens with an id of their own
    add_bos: bool | None = None
    add_eos: bool | None = None


def read_declared(path: Path) -> Declared:
    problems: list[Problem] = []
    config = optional_json(path / "tokenizer_config.json")
    special_map = optional_json(path / "special_tokens_map.json")
    # As in transformers: the older file counts where the newer way to list added tokens is not
    # used.
    sources = [(special_map, "special_tokens_map.json"), (config, "tokenizer_config.json")]
    if "added_tokens_decoder" not in config:
        sources.reverse()
    roles: dict[str, str] = {}
    specials: list[str] = []
    for content, name in sources:
        for role in ROLES:
            value = content.get(role)
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str) and token:
                roles[role] = token
            elif token is not None:
                problems.append(Problem(f"{path / name} {role}", repr(value)[:80], "a token"))
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = content.get(key) or []
            values = list(values.values()) if isinstance(values, dict) else values
            tokens = (
                [v.get("content") if isinstance(v, dict) else v for v in values]
                if isinstance(values, list)
                else [values]
            )
            specials += [token for token in tokens if isinstance(token, str) and token]
            problems += [
                Problem(f"{path / name} {key}", repr(t)[:80], "tokens")
                for t in tokens
                if not isinstance(t, str) or not t
            ]
    specials = list(dict.fromkeys([*roles.values(), *specials]))

    placed: dict[int, AddedToken] = {}
    for token, index in optional_json(path / "added_tokens.json").items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0 or not token:
            problems.append(
                Problem(f"{path / 'added_tokens.json'} {token!r}", repr(index)[:80], "an id")
            )
            continue
        special = token in specials
        placed[index] = AddedToken(token, special=special, normalized=not special)
    decoder = config.get("added_tokens_decoder") or {}
    for key, entry in decoder.items() if isinstance(decoder, dict) else [("", decoder)]:
        token = entry.get("content") if isinstance(entry, dict) else None
        if not re.fullmatch(r"\d{1,9}", key) or not isinstance(token, str) or not token:
            problems.append(
                Problem(
                    f"{path / 'tokenizer_config.json'} added_tokens_decoder {key}",
                    repr(entry)[:80],
                    "an id, its token",
                )
            )
            continue
        special = bool(entry.get("special")) or token in specials
        flags = {flag: bool(entry.get(flag, False)) for flag in ("single_word", "lstrip", "rstrip")}
        # A special token is looked for in the text as it is written.
        placed[int(key)] = AddedToken(
            token,
            special=special,
            normalized=not special and bool(entry.get("normalized", True)),
            **flags,
        )
    contents = Counter(token.content for token in placed.values())
    for twice in sorted(content for content, count in contents.items() if count > 1):
        problems.append(Problem(f"{path} added tokens", f"{twice!r} has two ids", "one"))
    if problems:
        raise ModelError(problems)
    add_bos, add_eos = (
        config[key] if isinstance(config.get(key), bool) else None
        for key in ("add_bos_token", "add_eos_token")
    )
    return Declared(config, roles, tuple(specials), dict(sorted(placed.items())), add_bos, add_eos)


def vocabulary_of(path: Path, names: list[str], declared: Declared) -> dict[str, int]:
    """Token -> id of a vocabulary and the tokens added to it with an id of their own."""
    entries = [
        *enumerate(names),
        *((i, token.content) for i, token in declared.placed.items() if i >= len(names)),
    ]
    vocab: dict[str, int] = {}
    problems = []
    for i, name in entries:
        if vocab.setdefault(name, i) != i:
            problems.append(
                Problem(
                    f"{path} added token {name!r}",
                    f"has the id {i}, and is in the vocabulary as {vocab[name]}",
                    "one id",
                )
            )
    if problems:
        raise ModelError(problems)
    return vocab
