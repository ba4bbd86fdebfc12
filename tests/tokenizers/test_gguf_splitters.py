"""Every name that llama.cpp has for a pre-tokenizer, against llama.cpp's own tokens: those it gave
once, and today's where it is there."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from quantflow.errors import FormatError, ModelError
from quantflow.tokenizers.byte_level import byte_characters
from quantflow.tokenizers.export import export_tokenizer
from quantflow.tokenizers.gguf import tokenizer_from_metadata
from quantflow.tokenizers.gguf_splitters import REFUSED, SPLITTERS
from quantflow.tokenizers.gguf_vocabulary import vocabulary_metadata
from quantflow.tokenizers.load import load_tokenizer
from tests.helpers.llama_tokens import FILE, MISSING, TEXTS, llama_ids, metadata, random_texts

KNOWN = json.loads(FILE.read_text())


def tokenizer_of(found: dict[str, Any]) -> Tokenizer:
    """From metadata as they are written."""
    found = found | {"tokenizer.ggml.token_type": array("i", found["tokenizer.ggml.token_type"])}
    return tokenizer_from_metadata(found, Path("x.gguf")).tokenizer


def read(name: str) -> Tokenizer:
    """As QuantFlow reads the vocabulary under that name, but for NFC, which llama.cpp leaves
    out."""
    tokenizer = tokenizer_of(metadata(name, KNOWN["tokens"], KNOWN["merges"]))
    assert isinstance(tokenizer.normalizer, normalizers.NFC) == SPLITTERS[name].nfc
    tokenizer.normalizer = None
    return tokenizer


@pytest.mark.parametrize("name", SPLITTERS)
def test_the_tokens_are_llama_cpps(name: str) -> None:
    tokenizer = read(name)
    for row in KNOWN["texts"]:
        expected = next(ids for ids, names in row["ids"].items() if name in names.split(" "))
        assert " ".join(map(str, tokenizer.encode(row["text"]).ids)) == expected, row["text"]


@pytest.mark.parametrize("name", SPLITTERS)
def test_the_tokens_are_those_of_the_llama_cpp_here(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    tokenizer, texts = read(name), [*TEXTS, *random_texts(60, seed=len(name))]
    theirs = llama_ids(name, KNOWN["tokens"], KNOWN["merges"], texts, tmp_path)
    for text, ids in zip(texts, theirs, strict=True):
        assert tokenizer.encode(text).ids == ids, text


def test_the_texts_tell_the_splitters_apart() -> None:
    """Or their agreement would say little."""
    groups: dict[tuple[str, ...], set[Any]] = {}
    for name, splitter in SPLITTERS.items():
        ids = tuple(
            next(ids for ids, names in row["ids"].items() if name in names.split(" "))
            for row in KNOWN["texts"]
        )
        groups.setdefault(ids, set()).add(
            (splitter.expressions, splitter.whole_words, splitter.begins)
        )
    assert all(len(group) == 1 for group in groups.values())


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_are_not_read_are_refused(name: str) -> None:
    with pytest.raises(
        ModelError, match=f"tokenizer.ggml.pre: '{name}', .*; expected one of 84 names .*smollm"
    ):
        tokenizer_of(metadata(name, KNOWN["tokens"], KNOWN["merges"]))


# --- the way there: what the tokenizer.json files of these models say

SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CASES = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
MIXED = [
    r"[^\r\n\p{L}\p{N}]?" + CASES[0] + first + CASES[1] + second for first, second in ("*+", "+*")
]
LLAMA3 = (
    SHORT
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
    " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def split(*expressions: str) -> list[PreTokenizer]:
    return [Split(Regex(each), "isolated") for each in expressions]


BYTES, WORDS = ByteLevel(add_prefix_space=False, use_regex=False), ByteLevel(add_prefix_space=False)
PIPELINES: dict[str, tuple[list[PreTokenizer], bool]] = {  # with ignore_merges
    "gpt-2": ([WORDS], False),
    "smollm": ([Digits(individual_digits=True), WORDS], False),
    "llama-bpe": ([*split(LLAMA3), BYTES], True),
    "smaug-bpe": ([*split(LLAMA3), BYTES], False),
    "qwen2": ([*split(LLAMA3.replace("{1,3}", "")), BYTES], False),
    "tekken": (
        [
            *split(
                "|".join([*MIXED, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"])
            ),
            BYTES,
        ],
        True,
    ),
    "gpt-4o": (
        [
            *split(
                "|".join(
                    [
                        *(each + SHORT + "?" for each in MIXED),
                        r"\p{N}{1,3}",
                        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
                    ]
                )
            ),
            BYTES,
        ],
        False,
    ),
    "deepseek-v3": ([*split(r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK3), BYTES], False),
    "deepseek-coder": (
        [
            *split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+"),
            Digits(individual_digits=True),
            BYTES,
        ],
        False,
    ),
    "hunyuan": (
        [
            *split(
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}|"
                r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
            ),
            BYTES,
        ],
        False,
    ),
    "superbpe": ([*split(r"\p{N}+", r"(?=(\d{3})+(?!\d))"), BYTES], False),
}
DEPART = ("tekken", "gpt-4o", "deepseek-coder")  # outside ASCII; gguf_splitters.py says how


def folder_of(
    folder: Path, steps: list[PreTokenizer], whole: bool, *, nfc: bool = False, missing: bool = True
) -> Path:
    letters = [] if missing else [byte_characters()[byte] for byte in MISSING]
    vocab = {token: number for number, token in enumerate([*KNOWN["tokens"], *letters])}
    merges = [tuple(merge.split(" ")) for merge in KNOWN["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
    tokenizer.pre_tokenizer = Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<s>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "<s>"})
    )
    return folder


@pytest.mark.parametrize("name", PIPELINES)
def test_a_tokenizer_json_gets_llama_cpps_name(name: str, tmp_path: Path) -> None:
    steps, whole = PIPELINES[name]
    folder = folder_of(tmp_path / "source", steps, whole, nfc=SPLITTERS[name].nfc, missing=False)
    ours, found = load_tokenizer(folder), vocabulary_metadata(folder, {}, 1000)
    assert found["tokenizer.ggml.pre"] == name
    back = tokenizer_of(found)
    for text in (*TEXTS, *random_texts()):
        if name not in DEPART or text.isascii():
            assert back.encode(text).ids == ours.encode(text).ids, text


def test_a_word_that_no_merge_makes(tmp_path: Path) -> None:
    """Only some names look words up whole. Where that makes no difference, the name does not
    matter."""
    steps, _ = PIPELINES["gpt-2"]
    with pytest.raises(
        FormatError, match="ignore_merges: true beside the pre-tokenizer of gpt-2; expected false"
    ):
        vocabulary_metadata(folder_of(tmp_path / "a", steps, True), {}, 1000)
    folder = folder_of(tmp_path / "b", steps, True)
    changed = json.loads((folder / "tokenizer.json").read_text())
    del changed["model"]["vocab"]["Ġquick"]
    (folder / "tokenizer.json").write_text(json.dumps(changed))
    assert vocabulary_metadata(folder, {}, 1000)["tokenizer.ggml.pre"] == "gpt-2"


# --- bytes without a token


def test_bytes_without_a_token_are_left_out(tmp_path: Path) -> None:
    """As the tokenizers library, transformers and llama.cpp do. What stands on both sides of one is
    not merged: that is llama.cpp."""
    from transformers import AutoTokenizer

    name = "smollm"
    read_back = tokenizer_of(metadata(name, KNOWN["tokens"], KNOWN["merges"]))
    (tmp_path / "in").mkdir()
    read_back.save(str(tmp_path / "in" / "tokenizer.json"))
    export_tokenizer(tmp_path / "in", tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    gaps = str.maketrans("", "", "\0\x04\x1d\x7f")
    for text in TEXTS:
        ids = read_back.encode(text).ids
        assert read_back.decode(ids) == text.translate(gaps)
        assert theirs.encode(text) == ids
    assert (
        read_back.encode("th\x7fe").ids
        == [*read_back.encode("th").ids, *read_back.encode("e").ids]
        != read_back.encode("the").ids
    )


def test_a_vocabulary_without_ascii_is_refused() -> None:
    """It would make [2] of "hello world qz"."""
    with pytest.raises(
        ModelError,
        match=(
            r"tokens: 254 of the 256 bytes have no token: 0x00 to 0x70, 0x72 to 0x79, 0x7b to"
            r" 0xff; "
        ),
    ):
        tokenizer_of(metadata("gpt-2", ["q", "z", "qz", "<s>"], ["q z"]))


def test_they_are_written_too(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "source", PIPELINES["smollm"][0], False)
    found = vocabulary_metadata(folder, {}, 1000)
    read_back = tokenizer_of(found)
    ours = load_tokenizer(folder)
    for text in TEXTS:
        # what stands around a byte in the midst of a word the library merges
        if "\x7f" not in text:
            assert read_back.encode(text).ids == ours.encode(text).ids
    (tmp_path / "again").mkdir()
    read_back.save(str(tmp_path / "again" / "tokenizer.json"))
    (tmp_path / "again" / "tokenizer_config.json").write_bytes(
        (folder / "tokenizer_config.json").read_bytes()
    )
    assert vocabulary_metadata(tmp_path / "again", {}, 1000) == found
