r"""How llama.cpp cuts a text into words before byte-level BPE: its names of `tokenizer.ggml.pre`,
and what each of them does.

The facts are those of llama.cpp as it lies in llama-cpp-python 0.3.36;
tests/tokenizers/test_gguf_splitters.py holds every name against its tokens. What stands here is
what llama.cpp *does*, since that is what a file's user sees, also where it departs from the
tokenizer.json of the models that the name was made for:

- `tekken`, `gpt-4o`: letters outside ASCII are both large and small, so `éÉ` is one word, and a
  combining mark ends a word.
- `kimi-k2`, `tiny_aya`, `youtu`: letters have no case at all. For the first, too, a combining mark
  ends a word.
- `afmoe`, `tiny_aya`: what stands before a run of digits goes into one piece with the first of
  them, which the next expression cuts again. Spaces before a number are cut otherwise than in the
  models' own.
- `afmoe`: the letters of East Asia begin at U+8C48, where U+F900 was meant.
- `deepseek-llm`, `deepseek-coder`: white space is no letter and no punctuation, though U+2000 to
  U+200A and U+3000 lie within their expressions' ranges. The digits of a number are one word for
  the first.
- A contraction consists of ASCII: `'ſ` is none.

One thing is the models' own: `qwen2`, `qwen35` and their further names normalise to NFC, as these
were trained; llama.cpp leaves it out.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from quantflow.tokenizers.byte_level import byte_characters


@dataclass(frozen=True)
class Splitter:
    """expressions: each cuts every piece that the one before it left into its matches and what lies
    between them. whole_words: a word that is a token is not merged. begins: BOS goes before a text
    where the file does not say. nfc: the text is normalised to NFC."""

    expressions: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False
    nfc: bool = False


_SHORT = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+"
_ENDS = r"[\r\n]"
_LETTER = r"\p{L}"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_ONE, _THREE = r"\p{N}", r"\p{N}{1,3}"
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"  # and Chinese
_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff&&\\S]+"  # and more
_HAN = (
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002ebef"
    "\uf900-\ufaff\U0002f800-\U0002fa1f"
)
_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f"
    "\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|" + _KANA
)
_CASED = (  # letters of the alphabets that have two cases
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_SENTENCES = r" ?[^(\s|.,!?…。，、।۔،)]+"
# Digits in threes from the right; the first of them bring along what stands before them.
_FROM_RIGHT = r"\P{N}*+(?:\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|\z)"
_HALVES = "|".join(rf"\s{{{2**power}}}(?!\S)" for power in range(9, 1, -1))
_LINES = r"[^\n]+|\n+"

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+|{_OTHERS}|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SHORT}|{_LETTERS}|{_THREE}|{_OTHERS}[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_SHORT}|{_LETTERS}|{_ONE}|{_OTHERS}[\r\n]*|{_SPACES}"
_WORDS = rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
_DEEPSEEK3 = (_THREE, _KANA, rf"{_WORDS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}")


def _mixed(letter: str, ending: str = "") -> str:
    """Letters that are not small, then letters that are not large; one of the two may be
    missing."""
    large, small, before = (
        f"(?:(?={letter})[^a-z])",
        f"(?:(?={letter})[^A-Z])",
        r"[^\r\n\p{L}\p{N}]?",
    )
    return f"{before}{large}*{small}+{ending}|{before}{large}+{small}*{ending}"


def _gpt4o(letter: str) -> str:
    return rf"{_mixed(letter, f'(?:{_SHORT})?')}|{_THREE}|{_OTHERS}[\r\n/]*|{_SPACES}"


# The first of each line's names is the one that is written.
_NAMES = {
    Splitter((_GPT2,)): (
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4"
        " modern-bert jina-es jina-de jina-v1-en roberta-bpe"
    ),
    Splitter(
        (_LLAMA3,), whole_words=True, begins=True
    ): "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    Splitter((_LLAMA3,)): "smaug-bpe dbrx chatglm-bpe",
    Splitter((_LLAMA3,), whole_words=True): "glm4 glm5",
    Splitter((_QWEN2,), nfc=True): "qwen2 deepseek-r1-qwen f2llmv2",
    Splitter(
        (_QWEN2,)
    ): "hunyuan stablelm2 solar-open grok-2 megrez kormo bailingmoe bailingmoe2 llada-moe",
    Splitter(
        (rf"{_SHORT}|{_MARKED}|{_ONE}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",), nfc=True
    ): "qwen35",
    Splitter(
        (_ONE, _GPT2)
    ): "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    Splitter(
        (rf"{_mixed(_LETTER)}|{_ONE}|{_OTHERS}[\r\n/]*|{_SPACES}",), whole_words=True, begins=True
    ): "tekken",
    Splitter((_gpt4o(_LETTER),)): "gpt-4o llama4 kanana2 talkie minimax-m2",
    Splitter((_gpt4o(r"[\p{L}\p{M}]"),), whole_words=True): "granite-embed-multi-97m",
    Splitter(_DEEPSEEK3): "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    Splitter(
        (_THREE, _KANA, rf"{_WORDS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+", _ONE)
    ): "spark2_5",
    Splitter((_ENDS, r"\s?\p{L}+", r"\s?\p{P}+", _HANGUL, _ONE)): "deepseek-coder",
    Splitter(
        (
            _ENDS,
            rf"\s?[{_CASED}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002]+",
            r"\s+\z",
            _HANGUL,
            r"\p{N}+",
        )
    ): "deepseek-llm",
    Splitter(
        (
            rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+(?:{_SHORT})?|{_THREE}|{_OTHERS}[\r\n]*|{_SPACES}",
        )
    ): "kimi-k2",
    Splitter(
        (_YOUTU, rf"{_MARKED}(?:{_SHORT})?|{_ONE}|{_OTHERS}[\r\n/]*|{_SPACES}"), whole_words=True
    ): "youtu",
    Splitter(
        (_FROM_RIGHT, rf"{_MARKED}(?:{_SHORT})?|{_THREE}|{_OTHERS}[\r\n/]*|{_SPACES}")
    ): "tiny_aya cohere2moe",
    Splitter((_FROM_RIGHT, _ASIAN, _DEEPSEEK3[-1])): "afmoe",
    Splitter((r"\p{N}+", "(?=(?:[0-9]{3})+(?![0-9]))")): "superbpe",
    Splitter((rf"{_SHORT}|{_LETTERS}|{_ONE}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)): "seed-coder",
    Splitter((rf"{_LETTERS}|{_ONE}|{_OTHERS}[\r\n]*|{_SPACES}",)): "ufakzeka",
    Splitter((_LINES, _QWEN2)): "laguna",
    Splitter(
        (
            (
                rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?:"
                rf" \p{{L}}\p{{M}}*)*)+|{_ONE}|{_OTHERS}[\r\n/]?|{_SPACES}"
            ),
        )
    ): "exaone-moe",
    Splitter(
        (_THREE, rf"{_SHORT}|{_LETTERS}|\p{{N}}+|{_OTHERS}[\r\n]*|{_SPACES}"), whole_words=True
    ): "minicpm5",
    Splitter(
        (rf"{_SHORT}|{_LETTERS}|{_THREE}|{_OTHERS}[\r\n]*|\s*[\r\n]+|{_HALVES}|\s{{1,2}}(?!\S)|\s",)
    ): "jais-2",
    Splitter((_SENTENCES,)): "bloom poro-chat gpt3-finnish",
    Splitter((_SENTENCES, _ONE)): "viking",
    Splitter((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9]{3}")): "falcon",
    Splitter(
        (
            "<sentinel:[0-9]+>",
            "IMGIMG[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            _ONE,
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        begins=True,
    ): "chameleon",
    Splitter((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9]{3}")): "default",
}
SPLITTERS = {name: splitter for splitter, names in _NAMES.items() for name in names.split()}
EXPECTED = (
    f"one of {len(SPLITTERS)} names of llama.cpp's, such as gpt-2, llama-bpe, qwen2, smollm or"
    " tekken"
)
# Its names that are not read, and why
REFUSED = dict.fromkeys(
    ("gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace"),
    "BPE of letters in place of bytes",
) | dict.fromkeys(
    ("jina-v2-es", "jina-v2-de", "jina-v2-code"),
    "an encoder whose <mask> swallows the spaces before it",
)


# How tokenizer.json files spell the same things, after which theirs are ours. The last ones are
# what `tekken` and `gpt-4o` depart from: llama.cpp's own converter gives these models the names,
# too.
_LARGE, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPELLINGS = {
    "\r": r"\r",
    "\n": r"\n",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|": f"{_SHORT}|",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)": f"(?:{_SHORT})",
    "'(?i:[sdmt]|ll|ve|re)|": f"{_SHORT}|",
    r"|\s*[\r\n]|": r"|\s*[\r\n]+|",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+": _HANGUL,
    "?+": "?",
    "++": "+",
    r"\p{N}{1}": r"\p{N}",
    r"(?=(\d{3})+(?!\d))": "(?=(?:[0-9]{3})+(?![0-9]))",
    f"{_LARGE}*{_SMALL}+": "(?:(?=\\p{L})[^a-z])*(?:(?=\\p{L})[^A-Z])+",
    f"{_LARGE}+{_SMALL}*": "(?:(?=\\p{L})[^a-z])+(?:(?=\\p{L})[^A-Z])*",
}


def splitter_names(expressions: tuple[str, ...]) -> list[str]:
    """llama.cpp's names, one of each `Splitter`, of the splitters that cut at these expressions of
    a tokenizer.json."""
    spelled = []
    for each in expressions:
        for theirs, ours in _SPELLINGS.items():
            each = each.replace(theirs, ours)
        spelled.append(each)
    return [
        names.split()[0]
        for splitter, names in _NAMES.items()
        if splitter.expressions == tuple(spelled)
    ]


def word_splitter(
    expressions: tuple[str, ...], vocabulary: Collection[str]
) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of byte-level BPE that cuts at these expressions, one after the other."""
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(each), "isolated") for each in expressions
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    if apart := missing_bytes(vocabulary):
        steps.append(pre_tokenizers.Split(Regex(apart), "isolated"))
    return pre_tokenizers.Sequence(steps)


def missing_bytes(vocabulary: Collection[str]) -> str:
    """An expression for the bytes, written in GPT-2's letters, that no token stands for; empty
    where there are none.

    llama.cpp and the tokenizers library leave them out of a text. The library then merges what
    stood on both sides of one, llama.cpp does not: what this matches is to stand apart before there
    is anything to merge.
    """
    missing = [letter for letter in byte_characters() if letter not in vocabulary]
    return f"[{re.escape(''.join(missing))}]" if missing else ""
