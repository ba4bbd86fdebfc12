"""The words of the pages: whatever is said in English has its Chinese, and the dictionary has
nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "quantflow" / "serve" / "page"
LITERAL = r'"(?:[^"\\]|\\.)*"'
NAMES = {"QuantFlow", "Enter", "Shift", "Esc", "API", "openapi.json"}  # the same in every language
SCRIPTS = [path for path in sorted(PAGE.glob("*.js")) if path.name != "chinese.js"]


def dictionary(text: str) -> dict[str, str]:
    pairs = re.findall(rf"^  ({LITERAL}|\w+):\s+({LITERAL}),$", text, re.M)
    return {
        (json.loads(key) if key.startswith('"') else key): json.loads(value) for key, value in pairs
    }


SOURCE = (PAGE / "chinese.js").read_text(encoding="utf-8")
OURS, THEIRS = (dictionary(part) for part in SOURCE.split("// what openapi.json says"))


class Texts(HTMLParser):
    """What a person reads or hears of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.found.add(data.strip())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {
            value or "" for name, value in attrs if name in ("aria-label", "title", "placeholder")
        }


def said_in_html() -> set[str]:
    found = set[str]()
    for path in PAGE.glob("*.html"):
        found |= Texts(path.read_text(encoding="utf-8")).found
    return {text for text in found if re.search("[A-Za-z]", text)} - NAMES


def said_in(script: Path) -> Iterator[str]:
    """The texts that `say` is given as such, both of a choice."""
    for given in re.findall(
        rf"\bsay\(((?:{LITERAL}|[^(){{}}\"])*)", script.read_text(encoding="utf-8")
    ):
        yield from (json.loads(text) for text in re.findall(LITERAL, given))


def test_everything_has_its_chinese() -> None:
    said = said_in_html().union(*(said_in(script) for script in SCRIPTS))
    assert len(said) > 100 and said - set(OURS) - set(THEIRS) == set()


def test_nothing_in_the_dictionary_is_said_no_more() -> None:
    texts = "\n".join(script.read_text(encoding="utf-8") for script in SCRIPTS)
    literals = {json.loads(text) for text in re.findall(LITERAL, texts)} | said_in_html()
    # and places
    schema_types = {"string", "number", "integer", "boolean", "object", "array", "path", "query"}
    assert {key for key in OURS if not key.startswith("code ")} - literals - schema_types == set()
    server = "\n".join(path.read_text(encoding="utf-8") for path in PAGE.parent.glob("*.py"))
    assert [key for key in OURS if key.startswith("code ") and f'"{key[5:]}"' not in server] == []


@pytest.mark.parametrize("words", [OURS, THEIRS], ids=["ours", "theirs"])
def test_a_translation_keeps_what_is_filled_in_and_is_chinese(words: dict[str, str]) -> None:
    assert len(words) == len(set(words)) > 30
    for english, chinese in words.items():
        assert sorted(re.findall(r"{\w+}", english)) == sorted(re.findall(r"{\w+}", chinese)), (
            english
        )
        assert (
            chinese == english
            or re.search("[\u3000-\u9fff\uff00-\uffef]", chinese)
            or not re.search("[a-z]{2}", re.sub(r"{\w+}|token", "", chinese))
        )


def test_the_whole_dictionary_was_read() -> None:
    body = SOURCE[SOURCE.index("{") + 1 : SOURCE.rindex("}")]
    entries = len(re.findall(rf"^  (?:{LITERAL}|\w+):", body, re.M))
    assert entries == len(OURS) + len(THEIRS)
