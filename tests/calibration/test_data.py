"""Calibration text: every kind of file, windows cut as `divergence.py` cuts them, and what is said
where the text is too short."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pyarrow.ipc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from quantflow import bundled
from quantflow.calibration.data import HUB, cut_windows, documents
from quantflow.errors import DataError
from tests.helpers.tiny import write_text, write_tokenizer

SHARED = Path(__file__).parents[3] / "shared"
DOCUMENTS = ["First.\nStill the first.", "Zweites — ß", "第三", "a  b"]


class Letters:
    """A tokenizer whose ids are code points, after BOS 1; it counts what it is given."""

    def __init__(self) -> None:
        self.texts = 0

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[Any]:
        self.texts += len(texts)
        return [
            type("Encoding", (), {"ids": [1] * add_special_tokens + [*map(ord, text)]})
            for text in texts
        ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "a.txt",
            (
                "First.\nStill the first.\n<|endoftext|>Zweites — ß<|endoftext|>\n"
                " \n<|endoftext|>第三\n<|endoftext|>\na  b\n"
            ),
        ),
        ("a.jsonl", "\n".join([json.dumps({"id": 1, "text": d}) for d in DOCUMENTS]) + "\n\n"),
        ("a.jsonl", "\r\n".join([json.dumps({"text": d}, ensure_ascii=False) for d in DOCUMENTS])),
        ("b.jsonl", "\n".join([json.dumps(f" {d}\n") for d in DOCUMENTS])),
        (
            "c.jsonl",
            "\n".join(
                json.dumps({k: d, "n": 3})
                for k, d in zip(
                    ("content", "sentence", "document", "prompt"), DOCUMENTS, strict=True
                )
            ),
        ),
        (
            "a.json",
            json.dumps(
                [
                    {"text": DOCUMENTS[0]},
                    DOCUMENTS[1],
                    {"text": "  "},
                    {"content": DOCUMENTS[2]},
                    DOCUMENTS[3],
                ],
                indent=2,
            ),
        ),
        # lines, as c4 has it
        ("c4.json", "\n".join(json.dumps({"text": d, "url": "http://x"}) for d in DOCUMENTS)),
    ],
)
def test_every_kind_of_file(tmp_path: Path, name: str, content: str) -> None:
    plain, packed = tmp_path / name, tmp_path / f"{name}.gz"
    plain.write_bytes(content.encode())
    packed.write_bytes(gzip.compress(content.encode()))
    for path in (plain, packed):
        assert list(documents(str(path))) == DOCUMENTS
        # the file in the place of a known name
        assert list(documents("c4", str(path))) == DOCUMENTS
        assert list(documents("no such name", str(path))) == DOCUMENTS


JSON_LINES = "".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in DOCUMENTS).encode()
CSV = 'id,text\n1,"First.\nStill the first."\n2,Zweites — ß\n3,第三\n4," a  b"\n5,\n'


def zstandard(data: bytes) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ndjson", JSON_LINES),
        ("A.JSONL", JSON_LINES),
        ("a.JSON", JSON_LINES),
        ("a.JsonL.GZ", gzip.compress(JSON_LINES)),
        ("a.jsonl.zst", zstandard(JSON_LINES)),
        ("a.json.zst", zstandard(JSON_LINES[:40]) + zstandard(JSON_LINES[40:])),  # as appended to
        ("a.jsonl.bz2", bz2.compress(JSON_LINES)),
        ("a.jsonl.xz", lzma.compress(JSON_LINES)),
        ("a.00000-of-01024.json.gz", gzip.compress(JSON_LINES)),  # c4
        ("a.csv", CSV.encode()),
        ("a.csv", b"\xef\xbb\xbf" + CSV.replace("\n4", "\r\n4").encode()),
        ("a.CSV.gz", gzip.compress(CSV.encode())),
        (
            "a.tsv",
            'text\tid\n"First.\nStill the first."\t1\nZweites — ß\t2\n第三\t3\na  b\t4\n'.encode(),
        ),
        ("a.md", "<|endoftext|>".join(DOCUMENTS).encode()),
        ("a.text", "<|endoftext|>".join(DOCUMENTS).encode()),
        ("a", "<|endoftext|>".join(DOCUMENTS).encode()),
        ("wiki.train.tokens", "<|endoftext|>".join(DOCUMENTS).encode()),
    ],
)
def test_names_and_packings(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert list(documents(str(path))) == DOCUMENTS


def test_tables_that_other_software_writes(tmp_path: Path) -> None:
    """As `datasets` saves them: Parquet, Arrow in a folder, JSON lines, CSV."""
    from datasets import Dataset

    turns = [
        [{"role": "user", "content": d}, {"role": "assistant", "content": "Yes."}]
        for d in DOCUMENTS
    ]
    table = Dataset.from_dict({"id": list(range(4)), "text": DOCUMENTS})
    talks = Dataset.from_dict({"id": list(range(4)), "messages": turns, "n": [None, 1, 2, 3]})
    table.to_parquet(tmp_path / "a.parquet")
    talks.to_parquet(tmp_path / "b.parquet")
    table.to_json(tmp_path / "a.jsonl")
    table.to_csv(tmp_path / "a.csv")
    talks.save_to_disk(tmp_path / "c")
    arrow = next((tmp_path / "c").glob("*.arrow"))
    for name in ("a.parquet", "a.jsonl", "a.csv"):
        assert list(documents(str(tmp_path / name))) == DOCUMENTS
    for path in (tmp_path / "b.parquet", arrow):
        assert list(documents(str(path))) == [f"{d}\nYes." for d in DOCUMENTS]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
def test_lines_end_at_line_feeds_alone(tmp_path: Path, name: str) -> None:
    """JSON allows U+2028, U+2029 and U+0085 in strings."""
    texts = ["one\u2028two\u0085three", "a\u2029b\x1cc\x0bd"]
    path = tmp_path / name
    path.write_bytes(
        "\r\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts).encode()
    )
    assert list(documents(str(path))) == texts


def test_a_text_is_split_wherever_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    text = "ab<|endoftext|>c<|endof<|endoftext|><|endoftext|>text|>\r\nd<|endoftext|"
    path.write_bytes(text.encode())
    expected = [
        part.strip() for part in text.replace("\r\n", "\n").split("<|endoftext|>") if part.strip()
    ]
    for size in (*range(1, 40), 1000):
        monkeypatch.setattr("quantflow.calibration.rows.READ", size)
        assert list(documents(str(path))) == expected


def test_lines_are_read_as_they_are_needed(tmp_path: Path) -> None:
    path = tmp_path / "c4.json"
    path.write_bytes(b'{"text": "a"}\n' * 3 + b"not JSON\n" * 1000)
    found = documents(str(path))
    assert [next(found) for _ in range(3)] == ["a"] * 3
    with pytest.raises(DataError, match=r"c4\.json:4"):
        next(found)


def test_texts_that_look_like_something_else(tmp_path: Path) -> None:
    """HTML and XML are texts; so is JSON among other documents, and a brace or a bracket."""
    for text in (
        "<!DOCTYPE html><p>A page</p>",
        '<?xml version="1.0"?><a/>',
        "<html>",
        "{braces}",
        "[1] A note",
        "{",
        '["a"]',
    ):
        (tmp_path / "a.txt").write_text(text)
        assert list(documents(str(tmp_path / "a.txt"))) == [text]
    (tmp_path / "a.txt").write_text('{"text": "hello"}<|endoftext|>b')
    assert list(documents(str(tmp_path / "a.txt"))) == ['{"text": "hello"}', "b"]


def test_cells_that_are_missing(tmp_path: Path) -> None:
    """A row with fewer cells has no text; columns without a name, as a comma at the end makes them,
    are nobody's."""
    path = tmp_path / "a.csv"
    path.write_text("id,text,,\n1,a,,\n2\n3,b\n")
    assert list(documents(str(path))) == ["a", "b"]


def test_blanks_around_a_tables_names(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id, "Text" , n\n1, "a, ""b""\nc", 2\n\n2, d,\n')
    assert list(documents(str(path))) == ['a, "b"\nc', "d"]
    path.write_text("id,text, text\n1,a,b\n")
    with pytest.raises(DataError, match="more than one column text"):
        list(documents(str(path)))


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_quote_that_does_not_end(tmp_path: Path, name: str, end: str) -> None:
    """It would make one document of all that follows."""
    path, line_break = tmp_path / name, end or "\n"
    lines = ["id,text,more", '1,"a', 'b",c', "", '2,"d', 'e","f', "3,g,h", "4,i,j"]
    path.write_bytes(
        (line_break.join(lines) + end).replace(",", "\t" if name == "a.tsv" else ",").encode()
    )
    with pytest.raises(DataError, match=rf'{name}:6: a cell whose quote \("\) does not end'):
        list(documents(str(path)))
    path.write_bytes(f'"text{line_break}a{line_break}b{end}'.encode())
    with pytest.raises(DataError, match=rf"{name}:1: a cell whose quote"):
        list(documents(str(path)))


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl.gz"])
def test_an_encoding_is_named_by_its_mark(tmp_path: Path, name: str, encoding: str) -> None:
    data = '{"text": "a"}\n'.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(
        DataError,
        match=(
            rf"{encoding}, by its byte order mark; expected UTF-8. `iconv -f {encoding} -t UTF-8"
            r" OLD > NEW`"
        ),
    ):
        list(documents(str(tmp_path / name)))


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(
        DataError, match=r"a\.txt: a pipe; expected a file of text.*write it into a file first"
    ):
        list(documents(str(tmp_path / "a.txt")))
    with pytest.raises(DataError, match="/dev/null: a device"):
        list(documents("/dev/null"))
    with pytest.raises(DataError, match=f"{tmp_path}: a directory"):
        list(documents(str(tmp_path)))


def test_columns_of_one_name_in_other_tables(tmp_path: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="more than one column text"):
        list(documents(str(tmp_path / "a.parquet")))


def test_a_cell_of_any_length(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text\n{'word ' * 100_000}\n")
    assert len(next(documents(str(path)))) == 499_999


def test_the_bundled_text() -> None:
    calibration, evaluation = list(documents("demo")), list(documents("demo-new"))
    # as calib_data/README.md says
    assert (
        len(calibration) == 47 and len(evaluation) == 56 and not set(calibration) & set(evaluation)
    )
    assert bundled.text("c4") is None


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', ":2"),
        ("a.jsonl", b'{"text": "a"}\n\n{"id": 3}\n', ":3"),
        ("a.jsonl", b"[1, 2]\n", ":1"),
        ("a.json", b'[{"text": "a"}, {"n": 1}]', "item 2"),
        ("a.json", b'[{"text": "a"}', "not JSON"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "not JSON"),
        (
            "a.txt",
            b"abc \xff def",
            "`iconv -f ENCODING -t UTF-8 OLD > NEW` writes it so; ENCODING is LATIN1",
        ),
        ("a.jsonl", b'{"text": "\xe4"}', "UTF-8"),
        ("a.txt.gz", b"not gzip at all", "gzip"),
        ("a.txt.gz", b"\x00\x01not gzip", "gzip"),
        (
            "a.json",
            b'{\n  "text": "a"\n}\n',
            "over several lines; expected a list of objects, or one object a line",
        ),
        ("a.json", b'{"data": [\n  {"text": "a"}\n]}\n', "over several lines"),
        ("a.json", b'\n{"text" "a"}\n', ":2: not JSON"),
        ("a.csv", b"a text\nwithout a header\n", "the fields a text (text)"),
        ("a.csv", b"text,id\na,1\nb,2,3\n", ":3: more cells than the 2 columns"),
        ("a.csv", b"id,text\n1\n", ":2: an object with the fields id (text), text (null)"),
        ("a.parquet", b"PAR1\0\0\0PAR1", "not Parquet"),
        ("a.arrow", b"ARROW1\0\0" + bytes([1]) * 64, "not Arrow"),
        ("a.jsonl.zst", zstandard(JSON_LINES * 100)[:-9], "runcated"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 99, ""),
        ("a.parquet.gz", b"", "a name that ends with .parquet.gz; expected .txt, .text"),
        ("a.yaml", b"text: a", "a name that ends with .yaml; expected .txt, .text"),
        ("a.docx", b"PK", ".docx"),
        ("train", b'{"text": "a"}\n', "Call it .jsonl"),
        (
            "a.txt",
            b'{"text": "hello"}\n{"text": "b"}\n',
            "JSON in a file whose name does not say so; expected a text. Call it .jsonl",
        ),
        ("a.md", b'\n[\n  {\n    "text": "hello"}]', "JSON in a file whose name does not say so"),
        (
            "a.raw.gz",
            gzip.compress(b'[{"text": "hello"}]'),
            "JSON in a file whose name does not say so",
        ),
        (
            "a.csv",
            b"text,id,text\na,1,b\n",
            "more than one column text; expected a name of its own for each column",
        ),
        ("a.tsv", b"id\ttext\tid\n1\ta\t2\n", "more than one column id"),
        ("a.csv", b"<!doctype html><html>", "a web page"),
        ("a.jsonl", b"<html>", "a web page"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 12\n",
            "a Git LFS pointer",
        ),
        ("a.parquet", b"<!doctype html><html>", "a web page"),
        ("a.txt.gz", gzip.compress(b"some text " * 1000, mtime=0)[:-20], "end-of-stream"),
        ("a.txt.gz", gzip.compress(bytes(range(250)) * 40, mtime=0)[:30] + b"\xff" * 60, ""),
    ],
)
def test_broken_files_are_refused_with_their_place(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(documents(str(path)))
    assert str(path) in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("data", ["c5", "./absent.txt", "/no/such/folder/a.jsonl", ""])
def test_unknown_names_list_the_known_ones(data: str) -> None:
    with pytest.raises(DataError) as caught:
        list(documents(data))
    assert "c4-new" in str(caught.value) and "wikitext2" in str(caught.value)


@pytest.mark.parametrize("name", sorted(HUB))
def test_a_hub_that_cannot_be_reached(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nat all")

    fake = ModuleType("datasets")
    fake.load_dataset = unreachable  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(DataError) as caught:
        list(documents(name))
    text = str(caught.value)
    assert (
        name in text
        and "Couldn't reach the Hub" in text
        and "at all" not in text
        and f"{name}.jsonl" in text
    )
    # Without the package, the same way out.
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=rf"not installed.*{name}\.jsonl"):
        list(documents(name))


def test_the_hubs_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def load_dataset(*args: object, **kwargs: object) -> list[dict[str, str | None]]:
        asked.append((args, kwargs))
        return [{"sentence": "a"}, {"sentence": None}, {"sentence": "b"}]

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert list(documents("ptb")) == ["a", "b"]  # and not the word None
    assert asked == [(("ptb-text-only/ptb_text_only", "penn_treebank"), {"split": "train"})]


# Windows.


def test_windows_by_hand() -> None:
    texts = ["ab", "cde", "f", "ghijkl", "m"]
    # 1 a b 1 c d e 1 f 1 g h i j k l 1 m
    windows = cut_windows(Letters(), texts, count=3, length=4)
    expected = [[1, *map(ord, "ab"), 1], [*map(ord, "cde"), 1], [ord("f"), 1, *map(ord, "gh")]]
    assert windows.tokens == expected
    assert windows.documents == {hashlib.sha256(t.encode()).hexdigest() for t in texts[:4]}
    assert cut_windows(Letters(), texts, count=1, length=4, skip=3).tokens == [
        [1, *map(ord, "ghi")]
    ]
    # The last window may take the last token.
    assert len(cut_windows(Letters(), texts, count=9, length=2).tokens) == 9
    assert cut_windows(Letters(), texts, count=1, length=18).tokens[0][-1] == ord("m")


def test_one_document_gives_several_windows_and_only_what_is_needed_is_read() -> None:
    windows = cut_windows(Letters(), ["abcdefghij", "never"], count=2, length=4)
    assert windows.tokens == [[1, *map(ord, "abc")], [*map(ord, "defg")]]
    assert windows.documents == {hashlib.sha256(b"abcdefghij").hexdigest()}
    tokenizer = Letters()
    cut_windows(tokenizer, (str(i) for i in range(10**9)), count=4, length=16)
    assert tokenizer.texts < 1000


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text("abc", max_size=9), max_size=150),
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(0, 5),
)
def test_windows_are_the_text_cut(texts: list[str], count: int, length: int, skip: int) -> None:
    ids = [i for text in texts[skip:] for i in (1, *map(ord, text))]
    if len(ids) < count * length:
        with pytest.raises(DataError):
            cut_windows(Letters(), texts, count=count, length=length, skip=skip)
        return
    windows = cut_windows(Letters(), texts, count=count, length=length, skip=skip)
    assert windows.tokens == [ids[i * length : (i + 1) * length] for i in range(count)]


def test_too_short_says_all_the_numbers() -> None:
    with pytest.raises(DataError) as caught:
        cut_windows(Letters(), ["ab", "cde", "f"], count=3, length=4, skip=1, source="calib.txt")
    text = str(caught.value)
    # Two documents after one is skipped, with 4 + 2 tokens: one window of the three.
    for part in (
        "calib.txt",
        "2 documents with 6 tokens (after skipping 1): 1 windows",
        "3 windows of 4 tokens",
    ):
        assert part in text
    for texts, skip in (([], 0), (["ab"], 5)):
        with pytest.raises(DataError, match="0 documents with 0 tokens"):
            cut_windows(Letters(), texts, count=1, length=1, skip=skip)


def test_the_digest_is_that_of_the_tokens() -> None:
    a, b, c = (
        cut_windows(Letters(), texts, count=2, length=3)
        for texts in (["ab", "cd"], ["ab", "cd", "more"], ["ab", "ce"])
    )
    assert a.digest == b.digest != c.digest
    assert (
        cut_windows(Letters(), ["abcde"], count=1, length=6).digest
        != cut_windows(Letters(), ["abcde"], count=2, length=3).digest
    )


def test_text_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "half a pair: \\ud83d"}\n' * 20)
    with pytest.raises(DataError, match="Unicode"):
        cut_windows(
            Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
            documents(str(path)),
            count=1,
            length=16,
            source=str(path),
        )


def test_windows_of_a_real_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    path = write_text(tmp_path / "a.txt")
    ids = [
        i
        for d in path.read_text().split("<|endoftext|>")[3:]
        for i in [0, *tokenizer.encode(d.strip(), add_special_tokens=False).ids]
    ]
    windows = cut_windows(tokenizer, documents(str(path)), count=5, length=24, skip=3)
    assert windows.tokens == [ids[i * 24 : (i + 1) * 24] for i in range(5)]


@pytest.mark.shared
@pytest.mark.skipif(
    not (SHARED / "tools" / "divergence.py").is_file(),
    reason="the project's shared tools and models are not here",
)
@pytest.mark.filterwarnings("ignore")  # the tool leaves its files open
@pytest.mark.parametrize(
    ("model", "text", "count", "length", "skip"),
    [
        ("babyllama-1m", "text/tinystories.txt", 8, 256, 700),
        ("babyllama-1m", "text/tinystories.txt", 16, 100, 0),
        ("docs-llama-16m", "models/docs-llama-16m/eval.txt", 8, 512, 0),
    ],
)
def test_windows_are_those_of_the_independent_tool(
    model: str, text: str, count: int, length: int, skip: int
) -> None:
    from transformers import AutoTokenizer

    spec = importlib.util.spec_from_file_location(
        "divergence_tool", SHARED / "tools" / "divergence.py"
    )
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    folder = SHARED / "models" / model
    expected = tool.windows(
        AutoTokenizer.from_pretrained(folder), SHARED / text, count, length, skip
    )
    found = cut_windows(
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        documents(str(SHARED / text)),
        count=count,
        length=length,
        skip=skip,
    )
    assert found.tokens == expected and len(expected) == count


def test_a_line_that_swells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes of a compressed file can be gigabytes of one line, which nobody wrote. A list
    may be a long line."""
    monkeypatch.setattr("quantflow.calibration.rows.LONGEST_LINE", 2**12)
    for kind, content in (
        ("jsonl", '{"text": "%s"}'),
        ("csv", 'text\n"%s"\n'),
        ("ndjson", '"%s"'),
        ("json", '{"text": "%s"}'),
    ):
        path = tmp_path / f"long.{kind}.gz"
        for letters, long in ((2**11, False), (2**20, True)):
            path.write_bytes(gzip.compress((content % ("a" * letters)).encode()))
            if long:
                with pytest.raises(
                    DataError, match=rf"{path.name}:\d: a line of 4096 characters or more"
                ):
                    list(documents(str(path)))
            else:
                assert list(documents(str(path))) == ["a" * letters]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(["a" * 2**13]))
    assert list(documents(str(path))) == ["a" * 2**13]
    monkeypatch.setattr("quantflow.calibration.rows.LONGEST_LIST", 2**12)
    with pytest.raises(DataError, match="a list of more than 4096 characters"):
        list(documents(str(path)))
    path.write_text(json.dumps(["a" * 2**13], indent=1))
    with pytest.raises(DataError, match="a list of more than 4096 characters"):
        list(documents(str(path)))


@pytest.mark.parametrize("size", [7, 2**20])
def test_a_document_that_swells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("quantflow.calibration.rows.LONGEST_TEXT", 2**12)
    monkeypatch.setattr("quantflow.calibration.rows.READ", size)
    path = tmp_path / "long.txt.gz"
    path.write_bytes(gzip.compress("<|endoftext|>".join(["a" * 2**11] * 9).encode()))
    assert list(documents(str(path))) == ["a" * 2**11] * 9
    path.write_bytes(gzip.compress(b"b<|endoftext|>" + b"a" * 2**14))
    with pytest.raises(
        DataError,
        match=(
            r"long\.txt\.gz document 2: a document of more than 4096 characters; expected documents"
            r" with"
        ),
    ):
        list(documents(str(path)))
    path = tmp_path / "cell.csv"  # of short lines
    path.write_text('text\n"' + "a\n" * 2**12 + '"\n')
    with pytest.raises(DataError, match="field larger than field limit"):
        list(documents(str(path)))


def test_offsets_beyond_an_arrow_files_text(tmp_path: Path) -> None:
    """The library believes them: reading such a row ended the process."""
    texts = ["one", "three", "seventeen"]
    table, sink = pyarrow.table({"text": texts}), io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    path, data = tmp_path / "texts.arrow", sink.getvalue()
    path.write_bytes(data)
    assert list(documents(str(path))) == texts
    offsets = struct.pack("<4i", 0, 3, 8, 17)
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, struct.pack("<4i", 0, 3, 2**31 - 1, 17)))
    with pytest.raises(DataError, match=r"texts\.arrow: not Arrow"):
        list(documents(str(path)))
