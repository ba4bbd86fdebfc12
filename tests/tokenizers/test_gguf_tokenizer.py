"""Tokenizers to GGUF's metadata and back: the same ids, and those of llama.cpp where it is
installed."""

from __future__ import annotations

import json
import random
import unicodedata
from array import array
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from quantflow.checkpoints.gguf.header import read_metadata
from quantflow.errors import FormatError, ModelError
from quantflow.tokenizers.chat_templates import chat_template
from quantflow.tokenizers.export import export_tokenizer
from quantflow.tokenizers.gguf import tokenizer_from_metadata
from quantflow.tokenizers.gguf_splitters import SPLITTERS, word_splitter
from quantflow.tokenizers.gguf_vocabulary import vocabulary_metadata
from quantflow.tokenizers.load import load_tokenizer, special_tokens
from tests.checkpoints.test_gguf_file import foreign
from tests.helpers.zoo import specimen, write
from tests.tokenizers.test_tokenizer import (
    AWKWARD,
    TEXT,
    directory,
    random_texts,
    train_sentencepiece,
)

gguf = pytest.importorskip("gguf")

DEMO = Path(__file__).parents[2] / "calib_data" / "demo_model"
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
TEXTS = [
    *AWKWARD,
    *random_texts(
        [
            "a",
            "ab",
            "ba",
            " ",
            "  ",
            "\n",
            "\t",
            "é",
            "😀",
            "春",
            "天",
            "the ",
            "<0x41>",
            "12",
            "1",
            "'s",
            "!?",
            "<|im_end|>",
        ]
    ),
    "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n",
    "  <|im_end|>  text<s> and </s>more <|extra|> <|extra|>",
]


def byte_level(folder: Path, splitter: str, *, bos: bool = True) -> Path:
    """A tokenizer as Llama 3, Qwen2 and GPT-2 have it, with tokens that are special and one that is
    not."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=splitter == "llama-bpe"))
    if splitter == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = word_splitter(
        SPLITTERS[splitter].expressions, pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=460, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<|extra|>", normalized=False)])
    if bos:
        number = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", number)]
        )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**roles, "chat_template": CHAT}))
    return folder


TEMPLATES = [
    {"name": name, "template": f"{name} {CHAT}"} for name in ("default", "tool_use", "rag")
]


def sentencepiece(folder: Path, config: dict[str, Any] | None = None, **options: Any) -> Path:
    return directory(
        folder,
        {"tokenizer.model": train_sentencepiece(**options), "tokenizer_config.json": config or {}},
    )


MAKERS = {
    "demo": lambda folder: DEMO,
    "gpt-2": lambda folder: byte_level(folder, "gpt-2"),
    "llama-bpe": lambda folder: byte_level(folder, "llama-bpe"),
    "qwen2": lambda folder: byte_level(folder, "qwen2", bos=False),
    "sentencepiece": sentencepiece,
    "no prefix": lambda folder: sentencepiece(folder, add_dummy_prefix=False),
    "symbols": lambda folder: sentencepiece(folder, user_defined_symbols="<eoh>,<|im_end|>"),
    "no bos": lambda folder: sentencepiece(
        folder, {"add_bos_token": False, "chat_template": CHAT}, control_symbols="<|im_start|>"
    ),
    "bos and eos": lambda folder: sentencepiece(
        folder, {"add_bos_token": True, "add_eos_token": True}
    ),
    "several templates": lambda folder: sentencepiece(folder, {"chat_template": TEMPLATES}),
}


def save(path: Path, metadata: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=MAKERS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """A name, a directory with a tokenizer, and a file with its metadata and some rows that no
    token has."""
    root = tmp_path_factory.mktemp("tokenizer")
    folder = MAKERS[request.param](root / "source")
    size = max(load_tokenizer(folder).get_vocab().values()) + 5
    return request.param, folder, save(root / "model.gguf", vocabulary_metadata(folder, {}, size))


def test_there_and_back(pair: tuple[str, Path, Path]) -> None:
    _, folder, file = pair
    ours, back = load_tokenizer(folder), load_tokenizer(file)
    assert back.get_vocab() == ours.get_vocab()
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special).ids
            assert back.encode(text, add_special_tokens=special).ids == ids, text
        assert back.decode(ids) == ours.decode(ids) and back.decode(ids, False) == ours.decode(
            ids, False
        )
    assert chat_template(file) == chat_template(folder)
    roles, theirs = special_tokens(file), special_tokens(folder)
    assert roles == {role: token for role, token in theirs.items() if token in ours.get_vocab()}


def test_llama_cpp_splits_alike(pair: tuple[str, Path, Path]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    name, folder, file = pair
    theirs = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    ours = load_tokenizer(folder)
    for text in TEXTS:
        if name == "symbols" and ("<|im_end|>" in text or "<eoh>" in text):
            # behind one, as behind any token found in the text, llama.cpp adds a space;
            # SentencePiece at the start alone
            continue
        if unicodedata.is_normalized("NFC", text):  # llama.cpp leaves NFC out
            assert theirs.tokenize(text.encode(), special=True) == ours.encode(text).ids, text


def test_several_templates_as_llama_cpp_names_them(tmp_path: Path) -> None:
    found = vocabulary_metadata(
        sentencepiece(tmp_path / "source", {"chat_template": TEMPLATES}), {}, 500
    )
    key = "tokenizer.chat_template"
    named = {
        f"{key}{'' if t['name'] == 'default' else '.' + t['name']}": t["template"]
        for t in TEMPLATES
    }
    assert {k: v for k, v in found.items() if k.startswith(key)} == {
        **named,
        f"{key}s": ["rag", "tool_use"],
    }


def test_a_file_alone_becomes_a_directory(tmp_path: Path) -> None:
    source = byte_level(tmp_path / "source", "qwen2", bos=False)
    file = save(tmp_path / "model.gguf", vocabulary_metadata(source, {}, 500))
    written = export_tokenizer(file, tmp_path / "out")
    assert written == [
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    ours = load_tokenizer(source)
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text).ids
    assert (
        theirs.eos_token == "<|im_end|>"
        and theirs.pad_token == "</s>"
        and theirs.chat_template == CHAT
    )
    assert export_tokenizer(file, tmp_path / "again") == written
    assert all(
        (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
        for name in written
    )


def test_export_of_a_file_of_others(tmp_path: Path) -> None:
    """Their tokenizer comes with them, and one that lies beside the file goes before it."""
    from quantflow.formats.reader import Weights
    from quantflow.pipeline.export import export

    source = write(tmp_path / "source", specimen("mistral"))
    vocabulary = vocabulary_metadata(source, {}, 320)
    vocabulary = {
        key: value
        for key, value in vocabulary.items()
        if not key.endswith(("bos_token_id", "eos_token_id"))
    }

    def change(writer: Any) -> None:
        for key, value in vocabulary.items():
            {bool: writer.add_bool, str: writer.add_string, list: writer.add_array}[type(value)](
                key, value
            )

    (tmp_path / "alone").mkdir()
    file, tensors = foreign(tmp_path / "alone" / "model.gguf", "mistral", change=change)
    export(file, "huggingface", tmp_path / "out")
    ours, theirs = load_tokenizer(source), load_tokenizer(tmp_path / "out")
    assert all(ours.encode(text).ids == theirs.encode(text).ids for text in TEXTS)
    assert special_tokens(tmp_path / "out") == {"bos_token": "<s>", "eos_token": "</s>"}
    assert set(Weights(tmp_path / "out").checkpoint.source_names) == set(tensors)
    assert Weights(file.parent).checkpoint.tokenizer_path == file
    (file.parent / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    assert Weights(file).checkpoint.tokenizer_path == file.parent


@pytest.mark.parametrize("name", ["gpt-2", "sentencepiece"])
def test_metadata_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    folder = MAKERS[name](tmp_path / "source")
    good = vocabulary_metadata(folder, {}, 600)
    tokens = good["tokenizer.ggml.tokens"]
    cases: dict[str, tuple[Any, str]] = {
        "model": ("bert", r"model: 'bert'; expected llama or gpt2"),
        "tokens": ([*tokens[:5], *tokens[:-5]], "two tokens that are the same"),
        "token_type": ([1] * 7, "600 numbers from 1 to 6"),
    }
    if name == "gpt-2":
        cases |= {
            "pre": (
                "sarvam-moe",
                r"pre: 'sarvam-moe', BPE of letters in place of bytes; expected one of 84 names",
            ),
            "merges": (["a b c"], "no pairs of tokens"),
        }
    else:
        cases["scores"] = ([0.5], "scores.*numbers")
    for key, (value, said) in cases.items():
        file = save(tmp_path / "x.gguf", good | {f"tokenizer.ggml.{key}": value})
        with pytest.raises(ModelError, match=said) as refused:
            load_tokenizer(file)
        assert "tokenizer.json" in str(refused.value)
        file = save(
            tmp_path / "x.gguf", {k: v for k, v in good.items() if k != f"tokenizer.ggml.{key}"}
        )
        if key != "token_type":
            with pytest.raises(ModelError):
                load_tokenizer(file)


@pytest.mark.parametrize("name", ["gpt-2", "sentencepiece"])
def test_any_metadata_gives_a_tokenizer_or_a_message(tmp_path: Path, name: str) -> None:
    good = vocabulary_metadata(MAKERS[name](tmp_path / "source"), {}, 600)
    good = read_metadata(save(tmp_path / "x.gguf", good))
    generator, read = random.Random(3), 0
    odd = [
        7, -1, 2**63, "x", "", True, 0.5, [], ["a"], ["\udcff"], ["a b"] * 3, [""] * 600,
        array("f", [1.0]), array("i", [9] * 600),
    ]  # fmt: skip
    for _ in range(300):
        changed = dict(good)
        for key in generator.sample(sorted(good), generator.choice((1, 1, 2))):
            value = good[key]
            if isinstance(value, (list, array)) and generator.random() < 0.6:
                value = value[:]
                for _ in range(generator.choice((1, 3))):
                    value[generator.randrange(len(value))] = (
                        generator.choice(["a", "", "a b", "é", "\udcff"])
                        if isinstance(value, list)
                        else 3
                    )
            else:
                value = generator.choice(odd)
            changed[key] = value
        try:
            tokenizer_from_metadata(changed, tmp_path).tokenizer.encode("Hello  world <0x41> é")
            read += 1
        except ModelError:
            pass
    assert 10 < read < 290


def test_what_llama_cpp_would_split_otherwise_is_refused(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "bpe", "gpt-2")
    good = json.loads((folder / "tokenizer.json").read_text())
    plain = json.loads(load_tokenizer(sentencepiece(tmp_path / "sp")).to_str())

    def refused(base: dict[str, Any], said: str, **changes: Any) -> None:
        (tmp_path / "x").mkdir(exist_ok=True)
        changed = (
            base
            | {k: v for k, v in changes.items() if k != "model"}
            | {"model": base["model"] | changes.get("model", {})}
        )
        (tmp_path / "x" / "tokenizer.json").write_text(json.dumps(changed))
        (tmp_path / "x" / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
        )
        with pytest.raises(FormatError, match=said):
            vocabulary_metadata(tmp_path / "x", {}, 600)

    split, bytes_ = good["pre_tokenizer"]["pretokenizers"]
    refused(
        good,
        "pre-tokenizer",
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, bytes_ | {"use_regex": True}]},
    )
    refused(
        good,
        "pre-tokenizer",
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [split | {"behavior": "Removed"}, bytes_],
        },
    )
    refused(
        good,
        "pre-tokenizer",
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split | {"invert": True}, bytes_]},
    )
    refused(
        good,
        "pre-tokenizer",
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [split | {"pattern": {"String": " "}}, bytes_],
        },
    )
    refused(good, "add_prefix_space", pre_tokenizer=bytes_ | {"add_prefix_space": True})
    refused(good, "normalizer Lowercase", normalizer={"type": "Lowercase"})
    refused(good, "plain BPE", model={"end_of_word_suffix": "</w>"})
    begins = good["post_processor"]
    other = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, *begins["single"][1:]]
    refused(
        good,
        "around a text",
        post_processor=begins | {"single": other, "pair": other + begins["pair"][2:]},
    )

    refused(
        plain,
        "the step",
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}],
        },
    )
    refused(
        plain,
        "the step",
        pre_tokenizer={
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "always",
            "split": True,
        },
    )
    merges = [tuple(merge) for merge in plain["model"]["merges"]]
    words = ["".join(merge) for merge in merges]
    several = next(
        merge for merge, word in zip(merges, words, strict=True) if words.count(word) > 1
    )
    refused(
        plain, "no merge", model={"merges": [list(merge) for merge in merges if merge != several]}
    )
    moved = [merge for merge in merges if merge != several] + [several]
    refused(plain, "two places of their order", model={"merges": [list(merge) for merge in moved]})
