"""The Chinese pages say what the English ones say: section by section the same headings, tables,
commands, links and figures.

Words cannot be compared. Instead each Chinese section carries the digest of the English one that it
was made from: where that is changed afterwards, the test fails until somebody has read the change
and said it in Chinese."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest

from tests.helpers.pages import name_of, translations
from tests.helpers.translation import (
    LANGUAGES,
    MARKDOWN,
    differences,
    digest,
    figures,
    names,
    sections,
    stamp,
)

PAIRS = [(english, chinese) for chinese, english in translations().items()]
SECTIONS = [
    pytest.param(wanted, here, (english, chinese), id=f"{name_of(chinese)}-{i}")
    for english, chinese in PAIRS
    for i, (wanted, here) in enumerate(
        zip_longest(
            *(sections(page.read_text(encoding="utf-8")) for page in (english, chinese)),
            fillvalue="",
        )
    )
]
each_page = pytest.mark.parametrize(
    ("english", "chinese"), PAIRS, ids=[name_of(chinese) for _, chinese in PAIRS]
)
each_section = pytest.mark.parametrize(("english", "chinese", "places"), SECTIONS)


@each_section
def test_a_section_is_in_step(english: str, chinese: str, places: tuple[Path, Path]) -> None:
    found = [*differences(english, chinese, places)]
    assert not found, f"{name_of(places[1])} is not {name_of(places[0])} in Chinese:\n" + "\n".join(
        found
    )
    assert stamp(chinese) == digest(english), (
        f"{english.splitlines()[0]}: {name_of(places[0])} has changed since {name_of(places[1])}"
        " was made from it. Once they say the same again, the Chinese section carries <!-- en:"
        f" {digest(english)} -->"
    )


@each_page
def test_each_page_begins_with_a_link_to_the_other(english: Path, chinese: Path) -> None:
    there, back = os.path.relpath(chinese, english.parent), os.path.relpath(english, chinese.parent)
    lines = [
        [line for line in page.read_text(encoding="utf-8").splitlines() if line][1]
        for page in (english, chinese)
    ]
    assert lines == [f"English | [简体中文]({there})", f"[English]({back}) | 简体中文"]


@pytest.mark.parametrize("page", translations(), ids=name_of)
def test_it_is_set_as_chinese_is(page: Path) -> None:
    """Full-width marks beside Chinese characters; a space between these and Latin letters, digits
    and code; and paragraphs of one line, since a browser shows the end of a line as a space."""
    beside = (
        r"[\u4e00-\u9fff][,;:!?(]|[,;:!?)]"
        r" ?[\u4e00-\u9fff]|[\u4e00-\u9fff][A-Za-z0-9`]|[A-Za-z0-9`%][\u4e00-\u9fff]|\n"
    )
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        if token.type == "inline" and not LANGUAGES.fullmatch(token.content):
            prose = re.sub(r"\]\([^)]*\)|!?\[|\*", "", token.content)
            assert not [*re.finditer(f".{{0,12}}(?:{beside}).{{0,12}}", prose)], name_of(page)


def mutants(section: str) -> Iterator[tuple[str, str]]:
    """(what, the section with that changed), line by line."""
    lines = section.splitlines(keepends=True)
    fenced = False
    for i, line in enumerate(lines):
        fenced ^= line.startswith("```")
        changed = {
            "a digit": re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), line, count=1)
        }
        if fenced:
            changed |= (
                {"a line away": "", "a line more": f"{line}{line}"}
                if not line.startswith("```")
                else {"a language": "```ruby\n"}
            )
        elif not line.startswith("```") and not LANGUAGES.match(line):
            changed |= {
                "a code": re.sub(r"(`[^`]*)`", r"\1x`", line, count=1),
                "a link": re.sub(r"\]\(", "](docs/../other/", line, count=1),
                "bold": line.replace("**", ""),
                "a name": re.sub(r"\b(LMDeploy|vLLM|AWQ|KV|GPTQ)\b", "OtherTool", line, count=1),
            }
            if line.startswith("#"):
                changed["a level"] = f"#{line}"
            if line.startswith(("|", "- ", "#")):
                changed |= {"a row away": "", "a row more": f"{line}{line}"}
            if line.startswith("| "):
                changed["a cell"] = re.sub(r"\| [^|]* \|\n", "| 7 |\n", line)
        for what, to in changed.items():
            if to != line:
                yield f"{what}: {line}", "".join([*lines[:i], to, *lines[i + 1 :]])


@each_section
def test_what_is_changed_in_english_is_noticed(
    english: str, chinese: str, places: tuple[Path, Path]
) -> None:
    """Each figure, code, row, link and heading by what it is; any word by the digest."""
    unnoticed = [
        what for what, section in mutants(english) if not any(differences(section, chinese, places))
    ]
    assert not unnoticed
    assert digest(f"{english}not") != digest(english) == digest(english.replace(" ", "\n"))


def test_what_counts_as_a_figure_and_a_name() -> None:
    assert figures(
        "4-bit, 2 to 8 bits, 96% of 16,315 in 0.58 ms, 8.4 tokens/s, 908 MiB; torch 2.13.0,"
        " 2026-11-22"
    ) == [
        "4 bit",
        "2",
        "8 bit",
        "96 %",
        "16,315",
        "0.58 ms",
        "8.4 tokens/s",
        "908 MiB",
        "2.13.0",
        "2026",
        "11",
        "22",
    ]
    assert figures("4 位，2 至 8 位，16,315 行的 96%") == ["4 bit", "2", "8 bit", "16,315", "96 %"]
    assert names("The CPUs of vLLM's int8 KV cache, Q4_0 and a Llama") == {
        "CPU",
        "vLLM",
        "int8",
        "KV",
        "Q4_0",
    }


EN = (
    "## A row\n\nSee `run` with 4 bits.\n\n| x | y |\n|---|---|\n| 1 | two of them"
    " |\n\n```\nquantflow plan  # reads no weight\n```\n"
)
ZH = (
    "## 一行\n\n4 位，见 `run`。\n\n| x | y |\n|---|---|\n| 1 | 其中两个 |\n\n```\nquantflow plan "
    " # 不读权重\n```\n"
)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("`run`", "`runs`"),
        ("4 位", "8 位"),
        ("4 位", "4 M"),
        ("| 1 |", "| 一 |"),
        ("plan", "run"),
        ("  # 不读权重", ""),
        ("## ", "### "),
        ("4 位，见 `run`。", "See `run` with 4 bits."),
        ("| 1 | 其中两个 |\n", ""),
        ("```\nq", "```sh\nq"),
        ("不读权重", "reads none of it"),
    ],
)
def test_the_check_itself(there: str, here: str) -> None:
    place = Path("/README.md")
    assert not [*differences(EN, ZH, (place, place))]
    assert any(differences(EN, ZH.replace(there, here, 1), (place, place)))
