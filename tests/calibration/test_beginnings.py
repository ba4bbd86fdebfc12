"""Beginnings of long texts: the very tokens of the whole, and not more work than they need."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from quantflow import bundled
from quantflow.calibration import beginnings
from quantflow.calibration.beginnings import Beginnings
from quantflow.tokenizers.byte_level import QWEN_PATTERN
from quantflow.tokenizers.load import load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "models"
DEMO = bundled.folder() / "calib_data" / "demo_model"
# Digits in threes from the right, which looks as far as a number goes; and letters with their
# marks.
RIGHT_ALIGNED = (
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<s>", "</s>", "<|endoftext|>"]
WORDS = [
    "the",
    "cat sat",
    "a",
    "ab",
    "aaaa",
    "naïve",
    "春天",
    "的",
    "🦊",
    "👩‍👩‍👧",
    "e\u0301\u0323",
    "1",
    "1234567",
    "'s",
    "don't",
    "_",
    "((",
    "\u3000",
    ".",
    "</",
    "<|endof",
    "text|>",
    "\r\n",
    "\n",
    "\t",
    "\u2028",
    "<0x41>",
    "##",
    "ﬁ",
    "①",
    *SPECIAL,
]


def corpus() -> list[str]:
    generator = random.Random(0)
    texts = [
        "".join(
            generator.choice(WORDS) + " " * generator.choice([0, 1, 1, 1, 3]) for _ in range(300)
        )
        for _ in range(20)
    ]
    return [
        re.sub("|".join(map(re.escape, SPECIAL)), "", text)
        for text in [*texts, "a" * 64, " " * 64, "ab" * 32, "12345678" * 4]
    ]


def trained(model: Any, trainer: Any, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(
        [token for token in SPECIAL if tokenizer.token_to_id(token) is None]
    )
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B", special_tokens=ids
    )
    return tokenizer


def byte_level(*splits: str) -> Tokenizer:
    inner = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    return trained(models.BPE(), trainer, pre_tokenizer=pre_tokenizers.Sequence([*inner, last]))


def sentencepiece(model: str) -> Tokenizer:
    """As Llama 2's: no words, so that a merge may reach over the whole text."""
    normal = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if model == "BPE":
        trainer: Any = trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<unk>"], show_progress=False
        )
        words = pre_tokenizers.Metaspace()  # to learn with; not kept
        tokenizer = trained(
            models.BPE(unk_token="<unk>", fuse_unk=True),
            trainer,
            normalizer=None,
            pre_tokenizer=words,
        )
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normal
        return tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer = trained(
        models.Unigram(),
        trainer,
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
    )
    if model == "Unigram without words":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normal])
    return tokenizer


def over_spaces() -> Tokenizer:
    """Tokens that go on over spaces: nothing tells where one begins but special tokens and letters
    it has not seen together."""
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    return trained(models.BPE(unk_token="<unk>"), trainer, normalizer=normalizers.Replace(" ", "▁"))


def word_piece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]"], show_progress=False
    )
    bert = {
        "normalizer": normalizers.BertNormalizer(),
        "pre_tokenizer": pre_tokenizers.BertPreTokenizer(),
    }
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, **bert)  # type: ignore[call-arg]


def eager() -> Tokenizer:
    """With added tokens that take the spaces around them, and one that must be a word."""
    tokenizer = byte_level()
    tokenizer.add_tokens(
        [
            AddedToken("👩‍👩‍👧", lstrip=True, rstrip=True),
            AddedToken("cat", single_word=True, normalized=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": byte_level,
    "Qwen": lambda: byte_level(QWEN_PATTERN),
    "right-aligned": lambda: byte_level(RIGHT_ALIGNED),
    "eager": eager,
    "SentencePiece BPE": lambda: sentencepiece("BPE"),
    "Unigram": lambda: sentencepiece("Unigram"),
    "Unigram without words": lambda: sentencepiece("Unigram without words"),
    "over spaces": over_spaces,
    "WordPiece": word_piece,
    "demo": lambda: load_tokenizer(DEMO),
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKERS[request.param]()


pieces = st.tuples(
    st.sampled_from(WORDS),
    st.sampled_from(["", " ", " ", "  ", "\n"]),
    st.sampled_from([1, 1, 1, 2, 3, 50, 700]),
)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(pieces, min_size=5, max_size=60),
    st.integers(1, 40),
    st.integers(1, 900),
    st.booleans(),
    st.integers(150, 700),
)
def test_beginnings_are_the_whole_texts(
    tokenizer: Tokenizer,
    parts: list[tuple[str, str, int]],
    times: int,
    least: int,
    special: bool,
    shortest: int,
) -> None:
    text = "".join((word + space) * count for word, space, count in parts) * times
    text = text[:40_000]
    whole = tokenizer.encode(text, add_special_tokens=special).ids
    with pytest.MonkeyPatch.context() as patch:
        # Cut wherever it may be, as close behind as letters of a kind allow.
        patch.setattr(beginnings, "SHORTEST", shortest)
        patch.setattr(beginnings, "CHARACTERS", 1)
        patch.setattr(beginnings, "MARGIN", 40)
        (found,) = Beginnings(tokenizer).encode([text], least, special=[special])
    assert len(found) >= min(least, len(whole)) and found == whole[: len(found)]


def test_texts_of_several_lengths_together(tokenizer: Tokenizer) -> None:
    generator = random.Random(1)
    texts = ["".join(generator.choices(WORDS, k=k)) for k in (0, 1, 30_000, 10, 20_000)]
    flags = [True, False, False, True, True]
    found = Beginnings(tokenizer).encode(texts, 40, special=flags)
    for text, flag, ids in zip(texts, flags, found, strict=True):
        whole = tokenizer.encode(text, add_special_tokens=flag).ids
        assert ids == whole[: len(ids)] and len(ids) >= min(40, len(whole))


class Counting:
    """A tokenizer that counts the letters it is given."""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner, self.letters = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        self.letters += sum(map(len, texts))
        return self._inner.encode_batch(texts, **options)


# Without words, a place is sure where no token has two letters beside each other.
@pytest.mark.parametrize("name", [name for name in MAKERS if name != "over spaces"])
@pytest.mark.parametrize("kind", ["prose", "lines of Chinese", "with special tokens"])
def test_no_more_than_a_part_is_encoded(name: str, kind: str) -> None:
    unit = {
        "prose": "the cat sat, don't. ",
        "lines of Chinese": "春天的的春天\n 的春\n",
        "with special tokens": "the cat</s>sat 1234 ",
    }[kind]
    counting = Counting(MAKERS[name]())
    (found,) = Beginnings(counting).encode([unit * (3_000_000 // len(unit))], 1000, special=[True])
    assert len(found) >= 1000 and counting.letters <= 200_000


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the project's shared models are not here")
@pytest.mark.parametrize("model", ["docs-llama-16m", "babyllama-1m", "stories260k"])
def test_of_real_models(model: str) -> None:
    tokenizer = load_tokenizer(SHARED / model)
    text = (
        (SHARED / "docs-llama-16m" / "calib.txt")
        .read_text()[:600_000]
        .replace("<|endoftext|>", " <|endoftext|> </s>")
    )
    whole = tokenizer.encode(text).ids
    for least in (1, 5000, 12_345):
        counting = Counting(tokenizer)
        (found,) = Beginnings(counting).encode([text], least, special=[True])
        assert len(found) >= least and found == whole[: len(found)] and counting.letters < 300_000
