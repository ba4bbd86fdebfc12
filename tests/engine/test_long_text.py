"""Long texts in a process of their own: the same tokens and letters as in this one, and an end to
what takes too much."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from quantflow.engine import long_text
from quantflow.engine.child import ChildUnwanted
from quantflow.engine.long_text import LongTexts
from quantflow.engine.text import Text
from quantflow.errors import RequestError
from quantflow.tokenizers.byte_level import byte_characters

DEMO = Path(__file__).parents[2] / "calib_data" / "demo_model"
TEXTS = ["The table", "", "诗 and 🦊\n\t</s>", " " * 3000, "x" * 20_000]


def test_what_comes_back_is_what_this_process_makes() -> None:
    text = Text(DEMO)
    texts = LongTexts(text.tokenizer, text.templates)
    for special in (True, False):
        expected = [text.encode(given, special=special) for given in TEXTS]
        found = texts.encode(TEXTS, special=special)
        assert found.ids == expected and found.counts == [*map(len, expected)]
    said = text.render([{"role": "user", "content": "a</s>"}], literal=True)
    assert texts.encode([said], special=False, literal=True).ids == [
        text.encode(said, special=False, literal=True)
    ]
    tokens = [token for ids in expected for token in ids]
    assert (
        json.loads(texts.decode(tokens * 3)) == text.decode(tokens * 3)
        and texts.decode([]) == b'""'
    )


def test_of_too_many_tokens_only_their_number_comes_back() -> None:
    texts, many = LongTexts(Text(DEMO).tokenizer), len(Text(DEMO).encode(TEXTS[0]))
    assert texts.encode(TEXTS[:2], special=True, most=many).ids
    found = texts.encode(TEXTS[:2], special=True, most=many - 1)
    assert found.ids == [] and found.counts[0] == many


def test_several_at_once_are_not_mixed_up() -> None:
    texts = LongTexts(Text(DEMO).tokenizer)
    with ThreadPoolExecutor(4) as pool:
        for length, found in enumerate(
            pool.map(lambda n: texts.encode(["x" * n], special=False), range(12))
        ):
            assert texts.decode(found.ids[0]).decode() == f'"{"x" * length}"'


def test_a_process_ends_with_the_memory_of_a_large_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(long_text, "MOST_KEPT", 2000)
    texts = LongTexts(Text(DEMO).tokenizer)
    for letters, stays in ((1000, True), (3000, False), (1000, True)):
        assert texts.encode(["x" * letters], special=False).counts
        child = texts._idle.get()
        texts._idle.put(child)
        assert child.running == stays


def hungry() -> Tokenizer:
    """Each letter becomes 18, and each space is looked for again and again."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(byte_characters())}, []))
    tokenizer.normalizer = normalizers.NFKC()
    split = pre_tokenizers.Split(Regex(r"\s+(?!\S)|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def test_what_takes_too_long_is_ended_and_the_next_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(long_text, "MOST_SECONDS", 0.5)
    texts = LongTexts(hungry())
    with pytest.raises(
        RequestError,
        match=r"1000000 characters, which take the tokenizer more than 0.5 s or .* MiB",
    ):
        texts.encode(["\ufdfa" * 1_000_000], special=True)
    assert texts.encode(["a b"], special=True).ids == [hungry().encode("a b").ids]


def test_what_nobody_waits_for_is_ended() -> None:
    texts, unwanted = LongTexts(hungry()), threading.Event()
    assert texts.encode(["a b"], special=True).ids
    child = texts._idle.get()
    texts._idle.put(child)

    def ask() -> None:
        long_text.UNWANTED.set(unwanted)
        texts.encode(["\ufdfa" * 1_000_000], special=True)

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        time.sleep(0.3)
        assert not asked.done()
        unwanted.set()
        with pytest.raises(ChildUnwanted):
            asked.result(60)
    assert not child.running
    assert texts.encode(["a b"], special=True).ids == [hungry().encode("a b").ids]


def test_what_needs_too_much_memory_or_makes_the_library_fail_is_refused() -> None:
    gone, line = (
        b'{"texts": ["x"], "special": true, "literal": false, "most": null}',
        b'{"tokens": [1]}',
    )

    class Broken:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def encode(self, *arguments: object, **options: object) -> None:
            raise self.error

        decode = encode

    class PanicException(BaseException):
        """As the tokenizers library's, which is no Exception."""

    for error, said in (
        (MemoryError(), b"MiB"),
        (PanicException("index out of bounds\nin it"), b"index out of bounds)"),
        (ValueError(), b"ValueError"),
    ):
        for asked in (gone, line):
            found = long_text.answer(Broken(error), None, asked)  # type: ignore[arg-type]
            assert found.startswith(b"!") and said in found


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(RequestError, match="no valid Unicode"):
        LongTexts(hungry()).encode(["x\ud800"], special=True)
