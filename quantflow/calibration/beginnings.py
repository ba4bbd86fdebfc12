"""The tokens that a long text begins with, without encoding all of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from quantflow.tokenizers.reading import SPLITS, guarded

CHARACTERS = 6  # of a text for a token that is wanted: more than a token has in most languages
SHORTEST = 2**15  # characters that are always encoded together
# characters, and runs of characters of one kind, that lie behind a token which nothing further on
# can change
MARGIN, RUNS = 1024, 8
_RUN = re.compile(r"\s+|\d+|[^\W\d]+|[^\w\s]+")


class Beginnings:
    """Encodes beginnings of texts, with the very tokens that the whole texts have there.

    A tokenizer splits a text from left to right: by what is added to its vocabulary, then into
    words. What it sees of the text behind a place is the rest of a run of spaces, digits or
    letters, so that a cut well behind the place does not move it. Within a word, its merges (BPE)
    or its best path (Unigram) may change however far before the cut; they do not reach across two
    characters that no token has beside each other.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(
        self, documents: Sequence[str], least: int, *, special: Sequence[bool]
    ) -> list[list[int]]:
        """The tokens of each text, or at least the first `least` of them. special: with the tokens
        that the tokenizer adds to a text. Raises TypeError for what is no Unicode text, ModelError
        where the tokenizer fails."""
        tokens: list[list[int]] = [[] for _ in documents]
        size, todo = max(SHORTEST, CHARACTERS * least), list(range(len(documents)))
        while todo:
            again = []
            for flag in (True, False):
                some = [i for i in todo if special[i] == flag]
                encodings = self._encoded([documents[i][:size] for i in some], flag) if some else []
                for i, encoding in zip(some, encodings, strict=True):
                    if len(documents[i]) <= size:
                        tokens[i] = encoding.ids
                    elif (settled := self._settled(encoding, documents[i][:size], least)) >= least:
                        tokens[i] = encoding.ids[:settled]
                    else:
                        again.append(i)
            todo, size = again, size * 4
        return tokens

    def _encoded(self, documents: list[str], special: bool) -> Any:
        # encode_batch, for one text too: encode holds the interpreter lock.
        return guarded(
            "tokenizer",
            SPLITS,
            lambda: self._tokenizer.encode_batch(documents, add_special_tokens=special),
            passing=TypeError,
        )

    def _settled(self, encoding: Any, text: str, least: int) -> int:
        """How many of the tokens stay as they are, whatever comes behind the text; less than
        `least` where so many do not."""
        tail = text[-4 * self._margin :]
        runs = [match.start() for match in _RUN.finditer(tail)]
        if len(runs) < RUNS:
            return 0
        limit = len(text) - len(tail) + min(runs[-RUNS], len(tail) - self._margin)
        offsets, words = encoding.offsets, encoding.word_ids
        last = next(
            (
                i
                for i in range(len(offsets) - 1, 0, -1)
                if words[i] is not None and offsets[i][0] <= limit
            ),
            0,
        )
        place = next((i for i in range(last, 0, -1) if words[i] != words[i - 1]), 0)
        if place < least and self._pairs is not None:
            tokens = encoding.tokens
            place = next(
                (
                    i
                    for i in range(last, place, -1)
                    if (tokens[i - 1][-1:], tokens[i][:1]) not in self._pairs
                ),
                place,
            )
        return place

    @cached_property
    def _margin(self) -> int:
        """Letters: more than any added token has."""
        return MARGIN + max(
            (len(token.content) for token in self._tokenizer.get_added_tokens_decoder().values()),
            default=0,
        )

    @cached_property
    def _pairs(self) -> frozenset[tuple[str, str]] | None:
        """Letters that stand beside each other in a token; None where that does not say where
        tokens begin."""
        model = self._tokenizer.model
        plain = not getattr(model, "continuing_subword_prefix", None) and not getattr(
            model, "end_of_word_suffix", None
        )
        if type(model).__name__ not in ("BPE", "Unigram") or not plain:
            return None
        return frozenset(pair for token in self._tokenizer.get_vocab() for pair in pairwise(token))
