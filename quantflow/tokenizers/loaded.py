"""A tokenizer as it was read, and the tokens that are added to its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, processors

from quantflow.errors import ModelError, Problem
from quantflow.tokenizers.declared import Declared


@dataclass(frozen=True)
class Loaded:
    """A tokenizer as it was read."""

    tokenizer: Tokenizer
    # bos_token -> "<s>", as far as the vocabulary's own file and the JSON files beside it say
    roles: dict[str, str]
    made: bool  # not read from a tokenizer.json


def add_tokens(
    tokenizer: Tokenizer,
    added: Mapping[int, AddedToken],
    declared: Declared,
    roles: Mapping[str, str],
) -> None:
    """Makes tokens of the vocabulary special; those without an id come behind it, as in
    transformers."""
    tokenizer.add_tokens([token for _, token in sorted(added.items())])
    present = tokenizer.get_vocab()
    new = [
        name for name in dict.fromkeys([*roles.values(), *declared.specials]) if name not in present
    ]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in new])


def add_template(
    tokenizer: Tokenizer, roles: Mapping[str, str], add_bos: bool, add_eos: bool
) -> None:
    bos = roles.get("bos_token") if add_bos else None
    eos = roles.get("eos_token") if add_eos else None
    single = [f"{bos}:0"] * bool(bos) + ["$A:0"] + [f"{eos}:0"] * bool(eos)
    pair = single + [f"{bos}:1"] * bool(bos) + ["$B:1"] + [f"{eos}:1"] * bool(eos)
    if strange := [
        token for token in (bos, eos) if token and (":" in token or token.startswith("$"))
    ]:
        # which say to the library what else goes around a text
        expected = "one without a colon, and without a dollar sign in front"
        raise ModelError(
            Problem("tokenizer", f"{strange[0]!r}"[:80] + " as the token around a text", expected)
        )
    if bos or eos:
        tokens = [
            (token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token
        ]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=tokens
        )
