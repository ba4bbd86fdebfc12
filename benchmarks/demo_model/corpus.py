"""Turn the HTML documentation of Python, PostgreSQL and SQLite into the demo model's text.

    apt-get install python3.11-doc postgresql-doc-15 sqlite3-doc
    python benchmarks/demo_model/corpus.py --docs /usr/share/doc --output build/corpus

Writes `train.txt`, `calib.txt` and `eval.txt`: documents separated by `<|endoftext|>`. A document
belongs to one of the three by the hash of its name, so the split does not depend on the order of
the files and the three are disjoint.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

SEPARATOR = "\n<|endoftext|>\n"
SOURCES = {"python": "python3.11/html", "postgresql": "postgresql-doc-15/html", "sqlite": "sqlite3"}
SKIPPED_TAGS = {"script", "style", "head", "nav", "footer", "svg", "form"}
SKIPPED_CLASSES = (
    "sphinxsidebar", "related", "navheader", "navfooter", "headerlink", "toc", "fancy-toc",
    "nosearch", "footer",
)  # fmt: skip
BLOCK_TAGS = {
    "p", "div", "li", "dt", "dd", "tr", "h1", "h2", "h3", "h4", "h5", "pre", "table", "ul", "ol",
    "dl", "br", "blockquote",
}  # fmt: skip
VOID_TAGS = {"br", "img", "hr", "meta", "link", "input", "col", "wbr", "area", "base"}
# Indexes, change logs and machine-made tables teach a small model nothing but themselves.
SKIPPED_FILES = re.compile(
    r"(genindex|changelog|py-modindex|bookindex|search|keyword_index|sqlite_doc|toc|chronology|glossary-all|release-\d)"
)


class _Text(HTMLParser):
    """Text of an HTML page: block structure as line breaks, `<pre>` kept as it is, navigation left
    out."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.stack: list[bool] = []  # one entry an open tag: is its content skipped?
        self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCK_TAGS:
            self.parts.append("\n")
        if tag in VOID_TAGS:
            return
        classes = (dict(attrs).get("class") or "").split()
        skipped = (
            bool(self.stack and self.stack[-1])
            or tag in SKIPPED_TAGS
            or any(c in SKIPPED_CLASSES for c in classes)
        )
        self.stack.append(skipped)
        self.pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID_TAGS:
            return
        self.pre -= tag == "pre" and self.pre > 0
        if self.stack:
            self.stack.pop()
        if tag in BLOCK_TAGS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1]:
            return
        self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def page_text(html: str) -> str:
    parser = _Text()
    # Only <p>, <li>, … may be left open in these pages; a page whose tags do not balance still
    # yields its text.
    parser.feed(re.sub(r"</?(p|li|dt|dd|tr|td|th)\b", lambda m: m[0], html))
    text = "".join(parser.parts).replace("¶", "").replace("\r", "")
    lines = [line.rstrip() for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def split_of(name: str) -> str:
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "calib" if bucket < 3 else "eval" if bucket < 6 else "train"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, default=Path("/usr/share/doc"))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    splits: dict[str, list[str]] = {"train": [], "calib": [], "eval": []}
    seen: set[str] = set()
    for source, folder in SOURCES.items():
        root = args.docs / folder
        for path in sorted(root.rglob("*.html")):
            name = f"{source}/{path.relative_to(root)}"
            if SKIPPED_FILES.search(name):
                continue
            text = page_text(path.read_text(encoding="utf-8", errors="replace"))
            digest = hashlib.sha256(text.encode()).hexdigest()
            if len(text) < 400 or digest in seen:
                continue
            seen.add(digest)
            splits[split_of(name)].append(text)
    args.output.mkdir(parents=True, exist_ok=True)
    for split, documents in splits.items():
        body = SEPARATOR.join(documents) + SEPARATOR
        (args.output / f"{split}.txt").write_text(body, encoding="utf-8")
        print(f"{split}: {len(documents)} documents, {len(body.encode())} bytes")


if __name__ == "__main__":
    main()
