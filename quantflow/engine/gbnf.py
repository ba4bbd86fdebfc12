"""Grammars as llama.cpp and XGrammar write them (GBNF, `root ::= …`), in llguidance's dialect of
Lark."""

from __future__ import annotations

import re

# What stands between quotes or brackets, a comment, space with the alternative after it: in this
# order, at each place of a grammar. None is given back once it has begun, so that a text takes the
# time of its length.
PARTS = re.compile(r'"(?:\\.|[^"\\])*+"?|\[(?:\\.|[^\]\\])*+\]?|#[^\r\n]*+|\s++\|?')
ESCAPES = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


def lark_of(text: str) -> str:
    """Takes time in the square of its length. Raises ValueError for what is no such grammar,
    RecursionError for one nested too deep."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(PARTS.sub(_plain, text))
    except (RecursionError, ValueError):
        raise
    except Exception as error:  # it raises nothing more telling
        raise ValueError(str(error)) from error


def _plain(match: re.Match[str]) -> str:
    """A part as the converter reads it: a letter in place of its number, since Lark has other ways
    to write that."""
    part = match.group()
    if part.startswith("#"):
        return ""
    if part[0] in '"[':
        return ESCAPES.sub(_letter, part)
    return " |" if part[-1] == "|" and ("\n" in part or "\r" in part) else part


def _letter(match: re.Match[str]) -> str:
    digits = next((group for group in match.groups() if group), None)
    if digits is None:
        return match.group()
    number = int(digits, 16)
    if number > 0x10FFFF:
        raise ValueError(f"no letter has the number {digits}")
    return chr(number) if number >= 0x80 else f"\\x{number:02x}"
