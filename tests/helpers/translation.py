"""What two pages must have in common for one to be the other's translation. Words are not compared:
everything else of a section is."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.helpers.pages import anchors, translations

MARKDOWN = MarkdownIt("commonmark").enable("table")
LANGUAGES = re.compile(r"English \| \[简体中文\]\(\S+\)|\[English\]\(\S+\) \| 简体中文")
"""The line below a page's title."""

_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_ENGLISH = re.compile(
    r"\b(?:the|of|and|or|is|are|to|an?|by|with|in|for|not|on|at|as|from|each)\b", re.A
)
_COMMENT = re.compile(r"(?:^|\s{2,})# (.*)$")
_WORD = re.compile(r"[A-Za-z](?:[\w.+-]*\w)?", re.A)
_FIGURE = re.compile(
    r"(?<![\w.])(?P<number>\d+(?:,\d{3})*(?:\.\d+)*)"
    r"(?: ?(?P<unit>%|ms\b|tokens/s|[KMGT]i?B\b|[sMB]\b)|(?P<bits>[- ]bits?\b|[- ]?位))?",
    re.A,
)


def sections(text: str) -> list[str]:
    """A page in parts that begin with a heading of the first or second level."""
    lines = text.splitlines(keepends=True)
    starts = [
        token.map[0]
        for token in MARKDOWN.parse(text)
        if token.type == "heading_open" and token.tag in ("h1", "h2") and token.map
    ]
    return [
        "".join(lines[start:end])
        for start, end in zip([0, *starts[1:]], [*starts[1:], None], strict=True)
    ]


def digest(section: str) -> str:
    """Of its words, however the lines are broken."""
    return hashlib.sha256(" ".join(section.split()).encode()).hexdigest()[:8]


def stamp(section: str) -> str:
    """The digest of the English section that a Chinese one was made from, which it carries in a
    comment; "" without one."""
    match = re.search(r"^<!-- en: ([0-9a-f]{8}) -->$", section, re.M)
    return match[1] if match else ""


def figures(text: str) -> list[str]:
    """Numbers, each with its unit: `8.4`, `96 %`, `4 bit`. The word for bits is translated; symbols
    such as MiB and tokens/s are not."""
    return [
        f"{m['number']} {m['unit'] or ('bit' if m['bits'] else '')}".rstrip()
        for m in _FIGURE.finditer(text)
    ]


def names(text: str) -> set[str]:
    """Words with a digit, or with a capital that is not the first letter: `int8`, `Q4_0`, `vLLM`,
    `KV`."""
    return {
        re.sub(r"(?<=[A-Z])s$", "", word)
        for word in _WORD.findall(text)
        if re.search(r"\d|(?<=.)[A-Z]", word)
    }


def differences(english: str, chinese: str, places: tuple[Path, Path]) -> Iterator[str]:
    """Why one section isn't the other's translation. places: the files that the two are of, for
    their links."""
    wanted, here = _parsed(english), _parsed(chinese)
    for pair in zip_longest(_shape(wanted), _shape(here)):
        if pair[0] != pair[1]:
            yield f"{pair[1]} where there is {pair[0]} in English"
            return
    for (tag, one), (_, other) in zip(_leaves(wanted), _leaves(here), strict=True):
        if one.type == "fence":
            reported = _differences_of_blocks(one.content, other.content, places)
        else:
            reported = _differences_of_text(one, other, places, ordered=tag in ("td", "th"))
        yield from (f"{other.content.strip()[:80]}\n    {difference}" for difference in reported)


@lru_cache(maxsize=8)
def _parsed(section: str) -> list[Token]:
    return MARKDOWN.parse(section)


def _shape(tokens: list[Token]) -> list[str]:
    """The blocks in their order: kinds, levels of headings, languages of fences."""
    return [
        f"{token.type} {token.tag} {token.info}".rstrip()
        for token in tokens
        if token.type not in ("inline", "html_block")
    ]


def _leaves(tokens: list[Token]) -> list[tuple[str, Token]]:
    """(tag around it, block) of what holds text, but for the line of languages."""
    leaves, tag = [], ""
    for token in tokens:
        if token.type == "fence" or (
            token.type == "inline" and not LANGUAGES.fullmatch(token.content)
        ):
            leaves.append((tag, token))
        tag = token.tag
    return leaves


def _differences_of_blocks(english: str, chinese: str, places: tuple[Path, Path]) -> Iterator[str]:
    """Byte for byte, but for the words of comments. What `$` marks as a command and its output has
    none."""
    output = re.search(r"^\$ ", english, re.M)
    for wanted, here in zip_longest(english.split("\n"), chinese.split("\n"), fillvalue=""):
        comments = [None if output else _COMMENT.search(line) for line in (wanted, here)]
        if comments[0] and comments[1]:
            one, other = (MARKDOWN.parseInline(comment[1])[0] for comment in comments if comment)
            yield from _differences_of_text(one, other, places, ordered=False)
            wanted, here = wanted[: comments[0].start()], here[: comments[1].start()]
        if wanted != here:
            yield f"{here}\n    in English {wanted}"


def _differences_of_text(
    english: Token, chinese: Token, places: tuple[Path, Path], ordered: bool
) -> Iterator[str]:
    """ordered: figures come in one order, as they do within a cell. Grammar may turn round those of
    a sentence."""
    gather: Any = list if ordered else Counter
    source, here = _prose(english), _prose(chinese)
    there = {source: page for page, source in translations().items()}
    for what, one, other in (
        ("code", Counter(_of(english, "code_inline")), Counter(_of(chinese, "code_inline"))),
        ("figures", gather(figures(source)), gather(figures(here))),
        (
            "links",
            *(
                Counter(_target(place, href, to) for href in _of(token, "link_open"))
                for token, place, to in ((english, places[0], there), (chinese, places[1], {}))
            ),
        ),
        (
            "images",
            *(
                [_target(place, source, {}) for source in _of(token, "image")]
                for token, place in zip((english, chinese), places, strict=True)
            ),
        ),
        ("bold", len(_of(english, "strong_open")), len(_of(chinese, "strong_open"))),
    ):
        if one != other:
            yield f"{what}: {_said(other, one)}, in English {_said(one, other)}"
    if lost := names(source) - names(here):
        yield f"{sorted(lost)} of the English text are not in it"
    if not _CHINESE.search(here):
        if _ENGLISH.search(source):
            yield "it is not translated"
        elif _folded(chinese.content) != _folded(english.content):
            yield f"in English {english.content}"


def _said(one: Any, other: Any) -> Any:
    """What one has more of than the other, where they are counted."""
    return [*(one - other).elements()] if isinstance(one, Counter) else one


def _within(token: Token) -> Iterator[Token]:
    for child in token.children or []:
        yield child
        yield from _within(child)


def _of(token: Token, kind: str) -> list[str]:
    """What the inline tokens of a kind say: code, where a link leads, where an image lies."""
    return [
        str(child.attrs.get("href") or child.attrs.get("src") or child.content)
        for child in _within(token)
        if child.type == kind
    ]


def _prose(token: Token) -> str:
    """Without its code."""
    return "".join(child.content if child.type == "text" else " " for child in _within(token))


def _folded(text: str) -> str:
    """With the marks of one language, and no spaces."""
    return re.sub(r"\s", "", text).translate(str.maketrans("，、；：（）", ",,;:()"))


def _target(place: Path, href: str, translated: dict[Path, Path]) -> str:
    """Where a link on a page leads, said in one way for both languages: for a page the one it is
    translated by, for its headings their places."""
    path, _, anchor = href.partition("#")
    if ":" in path:
        return href
    page = (place.parent / path).resolve() if path else place
    there = translated.get(page, page)
    if anchor and there in translations():
        anchor = str(anchors(page).index(anchor))
    return f"{there}#{anchor}"
