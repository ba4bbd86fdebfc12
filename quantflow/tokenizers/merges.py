"""Merges of a vocabulary that has ranks or scores, and no list of merges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

_Token = TypeVar("_Token", str, bytes)


def merges_of(order: Mapping[_Token, float]) -> list[tuple[_Token, _Token]]:
    """Every pair of tokens that makes a token, best first. order: the smaller, the earlier a token
    is merged.

    SentencePiece and tiktoken join the adjacent pair whose *result* is best, whatever its halves; a
    list of merges says the same only with each way to split a token in it.
    """
    pairs = []
    # or a token of a million letters would be cut a million times
    lengths = sorted({len(token) for token in order})
    for token, rank in order.items():
        for cut in lengths:
            if cut >= len(token):
                break
            left, right = token[:cut], token[cut:]
            if left in order and right in order:
                pairs.append((rank, -cut, left, right))
    pairs.sort()
    return [(left, right) for _, _, left, right in pairs]
