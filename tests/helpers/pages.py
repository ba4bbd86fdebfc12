"""What the documentation shows: its pages, and the commands, snippets and links on them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]

OURS = ("quantflow", "make", "curl", "python")
"""Programs whose commands on a page are run by the tests."""
FOREIGN = ("lmdeploy", "pip", "docker", "vllm", "git", "apt-get")
"""Programs that belong to others, or change the machine: their commands are shown and not run."""
SHELLS = ("", "sh", "bash", "console")
"""Languages of fences that may hold commands."""

_FENCE = re.compile(r"^```([a-z]*)\n(.*?)^```$", re.M | re.S)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def pages() -> list[Path]:
    """What lies in the repository's root and everything under docs/ that is English: what a
    translation shows, its English page shows too."""
    files = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in files if page not in translations()]


@cache
def translations() -> dict[Path, Path]:
    """Chinese page -> the English one: README.zh-CN.md -> README.md, docs/zh-CN/x.md ->
    docs/x.md."""
    docs = ROOT / "docs"
    return {ROOT / "README.zh-CN.md": ROOT / "README.md"} | {
        page: docs / page.relative_to(docs / "zh-CN")
        for page in sorted((docs / "zh-CN").rglob("*.md"))
    }


def every_page() -> list[Path]:
    """In both languages."""
    return [*pages(), *translations()]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block: the page, the line of its first line, its language ("" without one)."""

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a fenced block. text: without its comment and without what stands in brackets,
    which may be left out; whole: with it."""

    page: str
    line: int
    text: str
    whole: str

    @property
    def program(self) -> str:
        return self.text.split()[0]

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.text}"


def blocks() -> Iterator[Block]:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            yield Block(name_of(page), text.count("\n", 0, match.start(2)) + 1, match[1], match[2])


def commands() -> list[Command]:
    """Every command of a program of `OURS` or `FOREIGN`, in the order of the pages. Lines of other
    words are output."""
    result = []
    for block in blocks():
        if block.language not in SHELLS:
            continue
        lines = block.text.splitlines()
        at = 0
        while at < len(lines):
            first, text = at, lines[at].removeprefix("$ ")
            while text.endswith("\\") and at + 1 < len(lines):
                at += 1
                text = text[:-1] + lines[at].strip()
            at += 1
            words = text.split()
            if not text.startswith(" ") and words and words[0] in (*OURS, *FOREIGN):
                whole = _uncommented(text)
                # JSON has brackets of its own
                bare = re.sub(r"\s*\[[^\]]*\]", "", whole) if "'" not in whole else whole
                result.append(Command(block.page, block.line + first, bare, whole))
    return result


def _uncommented(text: str) -> str:
    """Without a comment behind two spaces or more."""
    return re.split(r"\s{2,}#", text)[0].rstrip()


def run_python(block: Block) -> dict[str, Any]:
    """Runs a snippet; the names that it leaves."""
    module = ModuleType("shown")  # where dataclasses look for the module that they are in
    sys.modules["shown"] = module
    exec(compile(block.text, f"{block.page}:{block.line}", "exec"), module.__dict__)
    return module.__dict__


def inline_commands(program: str = "quantflow") -> list[tuple[str, str]]:
    """(page, command) of every command of a program between backticks outside fenced blocks."""
    return [(name, span) for name, span in _spans() if span.startswith(f"{program} ")]


def inline_settings() -> list[tuple[str, str]]:
    """(page, YAML) of every span that looks like a section or a stage with settings in braces, such
    as `weights: {bits: 4}`."""
    return [
        (name, span)
        for name, span in _spans()
        if re.fullmatch(r"[a-z_0-9]+: \{.*\}", span) and "…" not in span
    ]


def _spans() -> Iterator[tuple[str, str]]:
    for page in pages():
        prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
        yield from ((name_of(page), match[1]) for match in _SPAN.finditer(prose))


def quoted_messages() -> list[tuple[str, str]]:
    """(page, message) of every blockquote that is one span: a message of QuantFlow's, `…` for what
    differs."""
    messages = []
    for page in pages():
        messages += [
            (name_of(page), text)
            for text in re.findall(r"^> `(.+)`$", page.read_text(encoding="utf-8"), re.M)
        ]
    return messages


def links() -> Iterator[tuple[Path, str]]:
    """(page, target) of every link that is not to another site, in both languages."""
    for page in every_page():
        for target in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
            if not re.match(r"[a-z]+:", target):
                yield page, target


def anchors(page: Path) -> list[str]:
    """What `#…` may say of a page: its headings in their order, as GitHub spells them."""
    result = []
    for heading in re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.M):
        result.append(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return result
