"""What llama.cpp makes of awkward texts, by every name of `tokenizer.ggml.pre`: `python -m
tests.helpers.llama_tokens` writes it down.

It needs llama-cpp-python. The vocabulary has a token for all but a few bytes, and merges that go
across what splitters cut at, so that each cut shows in the tokens.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

FILE = Path(__file__).parents[1] / "tokenizers" / "vectors" / "llama_tokens.json"
# bytes without a token; 0x7F stands in many texts, and within words
MISSING = [0x00, 0x04, 0x1D, 0x7F, 0xC0, 0xF5]

TEXTS = [
    "",
    (
        "Hello world! It's John's, we'll see; they've been. I'M SURE YOU'RE HE'LL 'Twas rock 'n'"
        " roll don'T"
    ),
    "'ſ 'S 's's 'LL'Ve it'sit 'r 'v 'l 're've 'mx",
    "    four spaces,  two, one , \t tabs\t\there \t",
    "trailing   ",
    "   ",
    "\n",
    "\r\n\r\nlines\r\nmore\n\n\n  indented\n\t\ttabbed \n \n  \r end\r",
    "a\n\n\n\nb \n c\n",
    "1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 x86 a1b22c333d4444 0x1F 2024-01-02T03:04",
    "12345\n678 ٣٤٥٦ ½²³ Ⅷ ⑳ 1e10 100% 5$ $6",
    "the   7 and  77   777    7777 cats",
    (
        '!!! ??? ... --- === `code` ~x~ a^b <tag> [x] {y} |z| \\n "q" #1 @me &amp; _u_ *b* (p) +c'
        " /d /e/f 1/2"
    ),
    "!a ?B .com ,x (y )z 'w \"v/w/ a/\n// \r\n/* x */",
    "camelCase HelloWorld XMLHttpRequest iPhone ÉCOLE École éÉ ÀÉÎ ßẞ ǅ ΑΒΓ αβγ АБВ абв İı",
    "naïve café cafe\u0301 e\u0301e\u0301 n\u0303 \u0301x \u0301\u0302 Z\u0350a\u0351l\u0352go",
    "हिन्दी में लिखा বাংলা ภาษาไทย ខ្មែរ မြန်မာ தமிழ் తెలుగు ລາວ",
    "العربية مَرْحَبًا، كيف؟ ۔ עברית שָׁלוֹם",
    (
        "中文漢字。你好，世界！「引用」 日本語ひらがなカタカナ 한국어 한글 ㄱㄴㄷ ㄅㄆㄇ 㐀䶵 豈"
        " 𠀀𪛖𫝀 ｱｲｳ ＡＢＣ１２３"
    ),
    "中文abc中文ABC's中文123中文 中 文\n中",
    "ꀀꀁ ꔀ ꙁ ꜣ ꠀ ꡀ ꯀ \ue000\ue001 \uf8ff",
    "😀 👨\u200d👩\u200d👧 🏳️\u200d🌈 🇫🇷 👍🏽 ☺️ ☃ ♥ → ∑ √ ± × ÷ © ™ € £ ¥",
    "nbsp\u00a0here\u00a0\u00a0two em\u2003sp\u2009thin line\u2028sep par\u2029sep nel\u0085x",
    "ideographic\u3000space\u3000\u3000two zw\u200bx \ufeffbom",
    "nul\0mid \0\0 ctl\x01\x02\x1d\x1e\x1f \x7f $\x04$ a$b $$ 4$ \x0b\x0c x",
    "del a\x7fb \x7f\x7f th\x7fe 4\x7f4 \x7f1 '\x7fs .\x7f. 中\x7f文\n\x7f\n",
    "Ünïcödé ﬁ ﬀ Å K Ω ώ ὼώ ᾶ Ꭰꭰ 𐐀𐐨 𞤀 ʕʖ ǀ ª º ⁿ ₂",
    "IMGIMGABCZ <sentinel:12> <sentinel:x> IMGIMGABCDEZ IMGIMGZ",
    "# Title\n\n- item 1\n- item 2\n\n```python\ndef f(x):\n    return x + 1  # done\n```\n",
    "http://example.com/a?b=c&d=1,2;3 foo@bar.baz C:\\dir\\file.txt ~/x -v --long=1 $HOME",
    "he said: 'It''s' \"it’s\" ‘quote’ “two” … — – ‚low‛ don’t",
    " " * 70 + "x" + " " * 17 + "\n" + "\t" * 9 + "y" + " " * 600,
    "Nu 9 là\u0300 9000 10000 . 1 000 000 ، ١٢٣ ।  ॥ ।। x",
    "The quick fox is quick",
    "unassigned \u0378\u0379 \U000e0001 \U0003fffe private \U0010fffd",
]


def random_texts(count: int = 24, seed: int = 16) -> list[str]:
    """Pieces of all kinds, one after the other without order."""
    generator = random.Random(seed)
    pieces = " |  |   |\n|\r\n|\t|a|B|é|É|中|あ|한|ह|\u0301|1|22|333|4444".split("|")
    pieces += "'s|'LL|'|!|...|/|$|\0|_|😀".split("|")
    pieces += "\u3000|\u2003|\u00a0|\u2028|the|ABC|xYz|ſ|٣|-".split("|")
    return ["".join(generator.choices(pieces, k=generator.randint(4, 14))) for _ in range(count)]


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level vocabulary, the same each time."""
    from quantflow.tokenizers.byte_level import byte_characters

    characters = byte_characters()
    missing = {characters[byte] for byte in MISSING}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=characters, show_progress=False, max_token_length=6
    )
    tokenizer.train_from_iterator(
        [" ".join(text.split("\n")[0][:40] for text in TEXTS), *TEXTS, *random_texts(200, seed=7)],
        trainer,
    )
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token in model["vocab"] if not missing & set(token)]
    merges = [" ".join(pair) for pair in model["merges"] if not missing & set("".join(pair))]
    return [*tokens, "Ġquick", "<s>"], merges  # one that no merge makes, which whole words show


def metadata(name: str, tokens: Sequence[str], merges: Sequence[str]) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }


def llama_ids(
    name: str, tokens: Sequence[str], merges: Sequence[str], samples: Sequence[str], folder: Path
) -> list[list[int]]:
    """llama.cpp's tokens of each text, with what it puts around one by default."""
    import gguf
    import llama_cpp

    writer = gguf.GGUFWriter(folder / "vocabulary.gguf", "llama")
    add = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in metadata(name, tokens, merges).items():
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    llama = llama_cpp.Llama(str(folder / "vocabulary.gguf"), vocab_only=True, verbose=False)
    ids = [llama.tokenize(text.encode(), add_bos=True, special=True) for text in samples]
    llama.close()
    return ids


def main() -> None:
    import llama_cpp

    from quantflow.tokenizers.gguf_splitters import SPLITTERS

    tokens, merges = vocabulary()
    samples = [*TEXTS, *random_texts()]
    rows: list[dict[str, list[str]]] = [{} for _ in samples]
    with tempfile.TemporaryDirectory() as folder:
        for name in SPLITTERS:
            for row, ids in zip(
                rows, llama_ids(name, tokens, merges, samples, Path(folder)), strict=True
            ):
                row.setdefault(" ".join(map(str, ids)), []).append(name)
    known = [
        {"text": text, "ids": {ids: " ".join(names) for ids, names in row.items()}}
        for text, row in zip(samples, rows, strict=True)
    ]
    made = (
        f"llama.cpp in llama-cpp-python {llama_cpp.__version__}, by python -m"
        " tests.helpers.llama_tokens"
    )
    content = {"made": made, "tokens": tokens, "merges": merges, "texts": known}
    FILE.write_text(json.dumps(content, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
