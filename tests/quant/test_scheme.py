"""Schemes: their arithmetic, what people call them, and how files spell them."""

from __future__ import annotations

import json

import pytest

from quantflow.quant.numbers import NUMBERS
from quantflow.quant.scheme import PER_CHANNEL, Scheme


@pytest.mark.parametrize(
    ("bits", "levels", "midpoint"), [(2, 3, 2), (3, 7, 4), (4, 15, 8), (8, 255, 128)]
)
def test_levels(bits: int, levels: int, midpoint: int) -> None:
    scheme = Scheme(bits, 32, True)
    assert (scheme.levels, scheme.midpoint) == (levels, midpoint)


def test_groups() -> None:
    assert (Scheme(4, 32, False).group_of(96), Scheme(4, 32, False).groups(96)) == (32, 3)
    assert (
        Scheme(4, PER_CHANNEL, False).group_of(96),
        Scheme(4, PER_CHANNEL, False).groups(96),
    ) == (96, 1)


def test_names() -> None:
    assert str(Scheme(4, 128, False)) == "W4 g128 asymmetric"
    assert str(Scheme(8, PER_CHANNEL, True)) == "W8 channel symmetric"
    assert str(Scheme(4, 32, False, "minimum")) == "W4 g32 with minimums"
    assert (
        str(Scheme(4, 64, True, "nf4")) == "NF4 g64"
        and str(Scheme(4, 64, True, "nf4", True)) == "NF4 g64 double"
    )


def test_what_is_written_in_files_stays_what_it_was() -> None:
    """Stores and GGUF files that are there already hold these."""
    assert Scheme(4, 128, False).as_list() == [4, 128, False, "integer", False]
    assert Scheme(4, 64, True, "nf4", double=True).as_list() == [4, 64, True, "nf4", True]
    assert list(NUMBERS) == ["integer", "minimum", "nf4"]
    for scheme in (
        Scheme(8, PER_CHANNEL, True),
        Scheme(4, 32, False, "minimum"),
        Scheme(4, 64, True, "nf4", double=True),
    ):
        assert Scheme(*json.loads(json.dumps(scheme.as_list()))) == scheme


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (Scheme(4, 32, True), 8 * 48 + 8 * 3 * 2),  # codes, scales
        (Scheme(4, 32, False), 8 * 48 + 8 * 3 * 2 + 12),  # and 24 zero points of half a byte
        (Scheme(3, PER_CHANNEL, True), 8 * 36 + 8 * 2),
        (Scheme(4, 32, False, "minimum"), 8 * 48 + 8 * 3 * (2 + 2)),
        (Scheme(4, 32, True, "nf4"), 8 * 48 + 8 * 3 * 4),
        (Scheme(4, 32, True, "nf4", double=True), 8 * 48 + 8 * 3),
    ],
)
def test_stored_bytes_by_hand(scheme: Scheme, expected: int) -> None:
    assert scheme.stored_bytes((8, 96)) == expected
