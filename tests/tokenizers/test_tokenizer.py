"""Tokenizers against the libraries the models were made with: sentencepiece, tiktoken and
transformers."""

from __future__ import annotations

import base64
import io
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from tiktoken._educational import bpe_train
from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.pre_tokenizers import Split

from quantflow.calibration.beginnings import Beginnings
from quantflow.calibration.data import cut_windows
from quantflow.engine.text import Text
from quantflow.errors import ModelError
from quantflow.tokenizers.byte_level import QWEN_PATTERN, QWEN_SPECIALS, byte_characters
from quantflow.tokenizers.export import export_tokenizer
from quantflow.tokenizers.load import load_tokenizer, tokenizer_problem
from quantflow.tokenizers.merges import merges_of

SHARED = Path(__file__).resolve().parents[3] / "shared"

TEXT = (
    """Once upon a time there was a quiet village beside a river, and in the village lived a tailor who had three daughters.
The eldest daughter counted the stars; the second daughter counted the sheep. "And you?" the tailor asked the youngest.
She said nothing, because she was reading: def total(values):\n    return sum(v for v in values if v > 0)  # 12345.67
The river ran and ran, aaa aaaa ababab bababa, and nobody in the village knew where the river was going or why.
写一首春天的诗，春天的河边，春天的村庄。书生说：春天在哪里？诗人说：春天在这里。
Über den Fluß führte eine Brücke; l'été était là, naïve café déjà vu. It's they'll we've I'd YOU'RE don't.
There were also numbers, 1 2 3 and 10 20 30, tabs\tand\tmore\ttabs, and two  spaces   and   three.
"""
    * 3
)

AWKWARD = (
    "",
    " ",
    "  ",
    "   ",
    "hello",
    " leading space",
    "trailing space ",
    "two  spaces   three",
    "\n",
    "\n\n  indented\n",
    "\ttab\t\t",
    "😀 emoji 👨‍👩‍👧",
    "写一首春天的诗",
    "春天 the  春天",
    "naïve café",
    "e\u0301 is é",
    "aaaaaaaaa",
    "ababababababa",
    "<s>no</s> tokens",
    "<0x41> is no A",
    "a literal \u2581 mark",
    "\r\nwindows\r\n",
    "ﬁne １２３ ａ",
    "\u00a0non\u3000breaking",
    "It's 12345.67, isn't IT'LL?",
    "def f(x):\n    return  x  # done\n",
    "\x00\x7f\u200b",
    "<|endoftext|",
    "x" * 300,
)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def auto(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def random_texts(letters: Sequence[str], count: int = 400, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices(letters, k=generator.randint(1, 14))) for _ in range(count)]


def train_sentencepiece(**options: Any) -> bytes:
    out = io.BytesIO()
    defaults = {
        "vocab_size": 480, "model_type": "bpe", "byte_fallback": True,
        "normalization_rule_name": "identity", "character_coverage": 0.98,
        "remove_extra_whitespaces": False, "num_threads": 1, "minloglevel": 2,
        "hard_vocab_limit": False,
    }  # fmt: skip
    lines = [line for line in TEXT.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, **(defaults | options)
    )
    return out.getvalue()


@pytest.fixture(scope="session")
def llama_model() -> bytes:
    """A tokenizer.model as Llama 2 and InternLM have one."""
    return train_sentencepiece()


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    import contextlib

    with contextlib.redirect_stdout(io.StringIO()):
        return bpe_train(
            data=TEXT[: len(TEXT) // 3], vocab_size=420, pat_str=QWEN_PATTERN, visualise=None
        )


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def directory(path: Path, files: dict[str, Any]) -> Path:
    """A model directory with these files: bytes and text as they are, anything else as JSON."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        elif isinstance(content, str):
            (path / name).write_text(content, encoding="utf-8")
        else:
            write_json(path / name, content)
    return path


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    return b"".join(
        base64.b64encode(token) + b" %d\n" % rank
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    )


@pytest.fixture(scope="session")
def gpt2_files() -> dict[str, Any]:
    """vocab.json and merges.txt, with OPT's special tokens at OPT's ids."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [TEXT],
        vocab_size=420,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        show_progress=False,
    )
    state = json.loads(trained.to_str())["model"]
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in state["merges"])
    return {"vocab.json": state["vocab"], "merges.txt": merges}


# --- SentencePiece


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"byte_fallback": False},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"remove_extra_whitespaces": True, "add_dummy_prefix": False},
    ],
    ids=["llama", "no-prefix", "unknown", "nfkc", "collapse"],
)
def test_sentencepiece_ids_are_sentencepieces(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    data = train_sentencepiece(
        model_type=kind, vocab_size=480 if options.get("byte_fallback", True) else 260, **options
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = load_tokenizer(directory(tmp_path, {"tokenizer.model": data}))
    # A special token written in a text is that token to us (and to transformers), and letters to
    # sentencepiece.
    texts = [
        t
        for t in (
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
                    "ﬁ",
                    "1",
                ]
            ),
        )
    ]
    texts = [text for text in texts if "<s>" not in text]
    assert ours.get_vocab_size() == theirs.get_piece_size()
    for text in texts:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text), text
        if options.get("byte_fallback", True) and not options.get("remove_extra_whitespaces"):
            assert ours.decode(ids) == theirs.decode(ids) == text.replace("\u2581", " ")


def test_byte_fallback_is_used_and_bos_added(tmp_path: Path, llama_model: bytes) -> None:
    tokenizer = load_tokenizer(directory(tmp_path, {"tokenizer.model": llama_model}))
    encoding = tokenizer.encode("the 😀")
    assert encoding.tokens[0] == "<s>" and encoding.ids[0] == 1
    assert encoding.tokens[-4:] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert tokenizer.encode("a", "b").tokens == ["<s>", "▁a", "<s>", "▁b"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ["<s>", "▁a"]),
        ({"add_bos_token": False}, ["▁a"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>", "▁a", "</s>"]),
        ({"add_bos_token": False, "add_eos_token": True}, ["▁a", "</s>"]),
        ({"bos_token": "</s>"}, ["</s>", "▁a"]),
        (
            {"bos_token": {"__type": "AddedToken", "content": "</s>", "normalized": True}},
            ["</s>", "▁a"],
        ),
    ],
)
def test_add_bos_and_eos(
    tmp_path: Path, llama_model: bytes, config: dict[str, Any], expected: list[str]
) -> None:
    files = {"tokenizer.model": llama_model, "tokenizer_config.json": config}
    assert load_tokenizer(directory(tmp_path, files)).encode("a").tokens == expected


def test_special_tokens_in_a_text(tmp_path: Path, llama_model: bytes) -> None:
    tokenizer = load_tokenizer(directory(tmp_path, {"tokenizer.model": llama_model}))
    assert tokenizer.encode("a</s><s>a", add_special_tokens=False).tokens == [
        "▁a",
        "</s>",
        "<s>",
        "▁a",
    ]


def test_user_defined_symbols_are_found_in_the_normalised_text(tmp_path: Path) -> None:
    data = train_sentencepiece(user_defined_symbols=["<eoh>", "<eoa>"])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = load_tokenizer(directory(tmp_path / "model", {"tokenizer.model": data}))
    texts = [
        "<|User|>:the river<eoh>\n<|Bot|>:",
        "a<eoh>a",
        "<eoh>a",
        " <eoh> <eoa>",
        "a<eoh><eoa>",
        "<eoh><eoh>",
    ]
    for text in [*texts, *random_texts(["a", " ", "  ", "<eoh>", "\n", "the"], 200)]:
        if text not in ("<eoh>", "<eoa>"):
            assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text
    assert ours.encode("<eoh>", add_special_tokens=False).ids == [theirs.piece_to_id("<eoh>")]
    export_tokenizer(
        tmp_path / "model", directory(tmp_path / "out", {"config.json": {"model_type": "llama"}})
    )
    exported = auto(tmp_path / "out")
    for text in texts:
        assert exported.encode(text, add_special_tokens=False) == theirs.encode(text)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_added_tokens_take_a_placeholders_place_and_follow_the_vocabulary(
    tmp_path: Path, kind: str
) -> None:
    data = train_sentencepiece(model_type=kind, user_defined_symbols=["[UNUSED_TOKEN_1]"])
    pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
    size, place = pieces.get_piece_size(), pieces.piece_to_id("[UNUSED_TOKEN_1]")
    config = {
        "added_tokens_decoder": {
            str(place): {"content": "<|im_start|>", "special": True, "normalized": False},
            str(size): {"content": "<|im_end|>", "special": True, "normalized": False},
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|late|>"],
    }
    files = {
        "tokenizer.model": data,
        "tokenizer_config.json": config,
        "added_tokens.json": {"<|im_end|>": size, "<plain>": size + 1},
    }
    tokenizer = load_tokenizer(directory(tmp_path / "model", files))
    text = "<|im_start|>a<|im_end|><|late|><plain>"
    assert tokenizer.encode(text, add_special_tokens=False).ids == [
        place,
        pieces.piece_to_id("▁a"),
        size,
        size + 2,
        size + 1,
    ]
    assert tokenizer.decode([place, size, size + 1]) == "<plain>"
    export_tokenizer(
        tmp_path / "model", directory(tmp_path / "out", {"config.json": {"model_type": "llama"}})
    )
    assert auto(tmp_path / "out").encode(text) == tokenizer.encode(text).ids


def test_the_unknown_piece_may_have_another_name(tmp_path: Path, llama_model: bytes) -> None:
    config = {"added_tokens_decoder": {"0": {"content": "<unknown>", "special": True}}}
    tokenizer = load_tokenizer(
        directory(tmp_path, {"tokenizer.model": llama_model, "tokenizer_config.json": config})
    )
    assert (
        tokenizer.encode("<unknown>", add_special_tokens=False).ids == [0]
        and tokenizer.token_to_id("<unk>") is None
    )


# --- the artifact's files


def test_internlm_exports_without_its_code(tmp_path: Path) -> None:
    data = train_sentencepiece(user_defined_symbols=["<eoh>", "<eoa>"])
    source = directory(
        tmp_path / "source",
        {
            "config.json": {
                "model_type": "internlm",
                "vocab_size": 480,
                "auto_map": {"AutoConfig": "c.InternLMConfig"},
            },
            "tokenizer.model": data,
            "tokenizer_config.json": {
                "auto_map": {"AutoTokenizer": ["tokenization_internlm.InternLMTokenizer", None]},
                "tokenizer_class": "InternLMTokenizer",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "</s>",
                "name_or_path": "/home/somebody/model",
                "fast_tokenizer_files": ["tokenizer.9.json"],
            },
            "special_tokens_map.json": {
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "</s>",
                "unk_token": "<unk>",
            },
            "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
            "tokenization_internlm.py": "raise SystemExit('remote code was run')\n",
            "modeling_internlm.py": "",
            "pytorch_model.bin": b"\x80",
            "README.md": "x",
        },
    )
    target = tmp_path / "artifact"
    written = export_tokenizer(source, target)
    assert written == sorted(p.name for p in target.iterdir())
    assert written == [
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    config = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["bos_token"], config["eos_token"], config["unk_token"], config["pad_token"]) == (
        "<s>",
        "</s>",
        "<unk>",
        "</s>",
    )
    everything = "".join(p.read_text(encoding="utf-8") for p in target.glob("*.json"))
    assert (
        "auto_map" not in everything
        and "InternLMTokenizer" not in everything
        and "somebody" not in everything
        and "tokenizer.9" not in everything
    )
    assert (target / "tokenizer.model").read_bytes() == data

    pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [
        2,
        pieces.piece_to_id("<eoa>"),
    ]
    write_json(target / "config.json", {"model_type": "llama", "vocab_size": 480})
    exported = auto(target)
    ours = load_tokenizer(source)
    for text in AWKWARD:
        assert exported(text)["input_ids"] == ours.encode(text).ids, text
        if "<s>" not in text:
            assert exported(text)["input_ids"] == [1, *pieces.encode(text)]
            assert exported.decode(exported.encode(text), skip_special_tokens=True) == text.replace(
                "\u2581", " "
            )
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "the river"},
        {"role": "assistant", "content": "ran"},
        {"role": "user", "content": "春天"},
    ]
    prompt = "<s><|System|>:S\n<|User|>:the river\n<|Bot|>:ran<eoa>\n<|User|>:春天\n<|Bot|>:"
    assert (
        exported.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
    )
    ids = exported.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == [1, *pieces.encode(prompt.removeprefix("<s>"))]


def test_chatml_for_internlm2_and_generation_config_made(
    tmp_path: Path, llama_model: bytes
) -> None:
    size = sentencepiece.SentencePieceProcessor(model_proto=llama_model).get_piece_size()
    decoder = {
        str(size + i): {"content": t, "special": True}
        for i, t in enumerate(["<|im_start|>", "<|im_end|>"])
    }
    files = {
        "config.json": {"model_type": "internlm2"},
        "tokenizer.model": llama_model,
        "tokenizer_config.json": {
            "tokenizer_class": "InternLM2Tokenizer",
            "added_tokens_decoder": decoder,
        },
    }
    export_tokenizer(
        directory(tmp_path / "source", files),
        directory(tmp_path / "out", {"config.json": {"model_type": "llama"}}),
    )
    exported = auto(tmp_path / "out")
    prompt = exported.apply_chat_template(
        [{"role": "user", "content": "Q"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<s><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert exported.encode("<|im_end|>", add_special_tokens=False) == [size + 1]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, size + 1]}

    # A template of the model's own stays, and nothing is added for it.
    for name, content in (
        ("chat_template.jinja", "{{ 'own' }}"),
        ("chat_template.json", {"chat_template": "{{ 'own' }}"}),
    ):
        source = directory(tmp_path / name / "source", {**files, name: content})
        written = export_tokenizer(source, tmp_path / name / "out")
        assert "chat_template.jinja" in written and "generation_config.json" not in written
        assert (tmp_path / name / "out" / "chat_template.jinja").read_text() == "{{ 'own' }}"
        assert "chat_template" not in json.loads(
            (tmp_path / name / "out" / "tokenizer_config.json").read_text()
        )
    files["tokenizer_config.json"]["chat_template"] = "{{ 'mine' }}"
    export_tokenizer(directory(tmp_path / "mine", files), tmp_path / "mine-out")
    assert (
        json.loads((tmp_path / "mine-out" / "tokenizer_config.json").read_text())["chat_template"]
        == "{{ 'mine' }}"
    )


def test_no_template_for_other_families(tmp_path: Path, llama_model: bytes) -> None:
    files = {"config.json": {"model_type": "llama"}, "tokenizer.model": llama_model}
    written = export_tokenizer(directory(tmp_path / "source", files), tmp_path / "out")
    assert written == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert "chat_template" not in json.loads(
        (tmp_path / "out" / "tokenizer_config.json").read_text()
    )


def test_export_is_deterministic_and_stable(
    tmp_path: Path, llama_model: bytes, ranks: dict[bytes, int], gpt2_files: dict[str, Any]
) -> None:
    for name, files in (
        ("a", {"tokenizer.model": llama_model}),
        ("b", {"qwen.tiktoken": tiktoken_file(ranks)}),
        ("c", gpt2_files),
    ):
        source = directory(tmp_path / name, {**files, "config.json": {"model_type": "llama"}})
        first, second, again = (tmp_path / f"{name}{i}" for i in range(3))
        written = export_tokenizer(source, first)
        assert export_tokenizer(source, second) == written
        # What was exported exports as it is.
        assert export_tokenizer(first, again) == written
        for file in written:
            assert (
                (first / file).read_bytes()
                == (second / file).read_bytes()
                == (again / file).read_bytes()
            ), file


def test_a_tokenizer_json_is_taken_as_it_is(tmp_path: Path, llama_model: bytes) -> None:
    export_tokenizer(
        directory(tmp_path / "model", {"tokenizer.model": llama_model}), tmp_path / "json"
    )
    whole = (tmp_path / "json" / "tokenizer.json").read_text(encoding="utf-8")
    without = json.loads(whole)
    without["post_processor"] = None
    for name in ("LlamaTokenizer", "LlamaTokenizerFast"):
        for text, tokens in ((whole, ["<s>", "▁a"]), (json.dumps(without), ["▁a"])):
            files = {
                "tokenizer.json": text,
                "config.json": {"model_type": "llama"},
                "tokenizer_config.json": {
                    "tokenizer_class": name,
                    "add_bos_token": True,
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                },
            }
            path = directory(tmp_path / name, files)
            ours = load_tokenizer(path)
            assert ours.encode("a").tokens == tokens
            theirs = auto(path)
            for line in ("a", "the river", "春天 😀", "a  b\n"):
                assert theirs(line)["input_ids"] == ours.encode(line).ids
            export_tokenizer(path, tmp_path / f"{name}-out")
            assert (tmp_path / f"{name}-out" / "tokenizer.json").read_text(encoding="utf-8") == text
            assert (
                json.loads((tmp_path / f"{name}-out" / "tokenizer_config.json").read_text())[
                    "tokenizer_class"
                ]
                == name
            )


@pytest.mark.parametrize("remote", ["QWenTokenizer", "TokenizersBackend", None])
def test_unknown_classes_become_the_one_every_loader_has(
    tmp_path: Path, llama_model: bytes, remote: str | None
) -> None:
    export_tokenizer(
        directory(tmp_path / "model", {"tokenizer.model": llama_model}), tmp_path / "json"
    )
    config = {"tokenizer_class": remote, "eos_token": None, "unk_token": "<unk>"}
    directory(
        tmp_path / "json",
        {"tokenizer_config.json": config, "config.json": {"eos_token_id": 2, "bos_token_id": [1]}},
    )
    (tmp_path / "json" / "special_tokens_map.json").unlink()
    export_tokenizer(tmp_path / "json", tmp_path / "out")
    exported = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    # bos comes from config.json's id; eos is null on purpose.
    assert exported == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": None,
        "unk_token": "<unk>",
        "bos_token": "<s>",
    }


@pytest.mark.shared
@pytest.mark.parametrize("name", ["babyllama-1m", "docs-llama-16m", "stories260k"])
def test_shared_models_agree_with_transformers(tmp_path: Path, name: str) -> None:
    path = SHARED / "models" / name
    if not path.is_dir():
        pytest.skip(f"the reference model {name} is not in {SHARED.name}/")
    ours, theirs = load_tokenizer(path), auto(path)
    text = (SHARED / "text" / "tinystories.txt").read_text(encoding="utf-8")[:20_000]
    texts = [*AWKWARD, *text.split("\n")]
    expected = [theirs(t)["input_ids"] for t in texts]
    assert ids_of(ours, texts) == expected
    export_tokenizer(
        path, directory(tmp_path, {"config.json": (path / "config.json").read_bytes()})
    )
    exported = auto(tmp_path)
    assert [exported(t)["input_ids"] for t in texts] == expected
    assert [exported.decode(ids) for ids in expected] == [theirs.decode(ids) for ids in expected]
    assert (exported.bos_token, exported.eos_token, exported.unk_token) == (
        theirs.bos_token,
        theirs.eos_token,
        theirs.unk_token,
    )


# --- tiktoken


def test_qwen_ids_are_tiktokens(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    files = {
        "qwen.tiktoken": tiktoken_file(ranks),
        "config.json": {"model_type": "qwen", "vocab_size": 640},
        "tokenizer_config.json": {
            "tokenizer_class": "QWenTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        },
        "generation_config.json": {
            "chat_format": "chatml",
            "eos_token_id": len(ranks),
            "pad_token_id": len(ranks),
            "max_window_size": 24000,
        },
        "tokenization_qwen.py": "raise SystemExit('remote code was run')\n",
    }
    source = directory(tmp_path / "source", files)
    specials = {name: len(ranks) + i for i, name in enumerate(QWEN_SPECIALS)}
    theirs = tiktoken.Encoding(
        "qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )
    ours = load_tokenizer(source)
    assert (specials["<|im_start|>"], specials["<|extra_204|>"]) == (
        len(ranks) + 1,
        len(ranks) + 207,
    )
    texts = [*AWKWARD, "<|im_start|>user\nthe river<|im_end|>\n<|extra_7|>", TEXT]
    texts += random_texts(
        [
            "a",
            "ab",
            "ba",
            " ",
            "  ",
            "\n",
            "\r\n",
            "'s",
            "'LL",
            "é",
            "😀",
            "春天",
            "the",
            "12",
            ".",
            "_",
            "\t",
        ]
    )
    import unicodedata

    for text in texts:
        expected = theirs.encode(unicodedata.normalize("NFC", text), allowed_special="all")
        assert ours.encode(text).ids == expected, text
        assert ours.decode(expected, skip_special_tokens=False) == theirs.decode(expected)

    written = export_tokenizer(
        source, directory(tmp_path / "out", {"config.json": {"model_type": "qwen2"}})
    )
    assert written == [
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    exported = auto(tmp_path / "out")
    for text in texts:
        assert exported(text)["input_ids"] == ours.encode(text).ids, text
    assert (exported.eos_token, exported.pad_token) == ("<|im_end|>", "<|endoftext|>")
    chat = [{"role": "user", "content": "Q"}]
    prompt = (
        "<|im_start|>system\nYou are a helpful"
        " assistant.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )
    assert exported.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == prompt
    own_system = exported.apply_chat_template(
        [{"role": "system", "content": "S"}, *chat], tokenize=False
    )
    assert own_system == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"

    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [
        len(ranks),
        len(ranks) + 2,
    ]


def test_a_base_qwen_gets_no_template(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    generation = {"chat_format": "raw", "eos_token_id": len(ranks)}
    files = {
        "qwen.tiktoken": tiktoken_file(ranks),
        "config.json": {"model_type": "qwen"},
        "generation_config.json": generation,
    }
    export_tokenizer(directory(tmp_path / "source", files), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "chat_template" not in config and config["eos_token"] == "<|endoftext|>"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == generation


# --- vocab.json and merges.txt


def test_gpt2_and_opt_agree_with_transformers(tmp_path: Path, gpt2_files: dict[str, Any]) -> None:
    from transformers import GPT2Tokenizer

    roles = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    texts = [
        *AWKWARD,
        "a</s>b<pad>",
        *random_texts(["a", " ", "  ", "\n", "'s", "é", "😀", "春天", "the", "12", "."]),
    ]
    for model_type, add_bos in (("opt", True), ("gpt2", False)):
        config = {**roles, "add_bos_token": add_bos, "tokenizer_class": "GPT2Tokenizer"}
        source = directory(
            tmp_path / model_type,
            {
                **gpt2_files,
                "config.json": {"model_type": model_type},
                "tokenizer_config.json": config,
            },
        )
        theirs = GPT2Tokenizer.from_pretrained(source, local_files_only=True)
        ours = load_tokenizer(source)
        expected = [theirs(t)["input_ids"] for t in texts]
        assert ids_of(ours, texts) == expected
        assert expected[4][0] == 2 if add_bos else expected[4][0] != 2
        written = export_tokenizer(
            source,
            directory(tmp_path / f"{model_type}-out", {"config.json": {"model_type": model_type}}),
        )
        assert written == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
        exported = auto(tmp_path / f"{model_type}-out")
        assert [exported(t)["input_ids"] for t in texts] == expected
        assert [exported.decode(ids) for ids in expected] == [
            theirs.decode(ids) for ids in expected
        ]


def test_bytes_without_a_token_are_left_out_as_in_transformers(
    tmp_path: Path, gpt2_files: dict[str, Any]
) -> None:
    """Texts that a vocabulary was made of may lack bytes: those of SmolLM's lack 21."""
    from transformers import GPT2Tokenizer

    letters = byte_characters()
    lost = {letters[byte] for byte in (0x00, 0x1D, 0xC3)}
    vocab = {
        token: number for token, number in gpt2_files["vocab.json"].items() if not lost & set(token)
    }
    lines = [line for line in gpt2_files["merges.txt"].splitlines() if not lost & set(line)]
    source = directory(
        tmp_path,
        {
            "vocab.json": vocab,
            "merges.txt": "\n".join(lines) + "\n",
            "config.json": {"model_type": "gpt2"},
        },
    )
    theirs, ours = (
        GPT2Tokenizer.from_pretrained(source, local_files_only=True),
        load_tokenizer(source),
    )
    assert any("é" in text for text in AWKWARD)
    for text in (*AWKWARD, "a\0b", "the\0re", "\0\x1d", "th\x1de"):
        assert ours.encode(text).ids == theirs(text)["input_ids"]
    assert ours.encode("\0\x1d").ids == []


@pytest.mark.parametrize("lost", ["$", "q", "~"])
def test_a_byte_level_tokenizer_json_has_all_of_ascii(tmp_path: Path, lost: str) -> None:
    """Or the library would leave signs out of a text without a word; an unknown token is a word."""
    vocab = {letter: number for number, letter in enumerate(byte_characters()) if letter != lost}
    for unknown in (None, "a"):
        tokenizer = Tokenizer(BPE(vocab, [], unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        if unknown:
            assert load_tokenizer(tmp_path).encode(lost).ids == [vocab["a"]]
        else:
            with pytest.raises(
                ModelError,
                match=(
                    rf"tokenizer\.json: 1 of the 256 bytes have no token: {ord(lost):#x}; .*94"
                    r" signs"
                ),
            ):
                load_tokenizer(tmp_path)


def test_opt_without_configuration_still_begins_with_its_bos(
    tmp_path: Path, gpt2_files: dict[str, Any]
) -> None:
    tokenizer = load_tokenizer(
        directory(tmp_path, {**gpt2_files, "config.json": {"model_type": "opt"}})
    )
    assert tokenizer.encode("a").ids == [2, gpt2_files["vocab.json"]["a"]]


def test_qwen2_without_tokenizer_json(tmp_path: Path, gpt2_files: dict[str, Any]) -> None:
    from transformers import Qwen2Tokenizer

    files = {
        **gpt2_files,
        "config.json": {"model_type": "qwen2"},
        "tokenizer_config.json": {"eos_token": "</s>", "pad_token": "<pad>"},
    }
    source = directory(tmp_path, files)
    theirs = Qwen2Tokenizer.from_pretrained(source, local_files_only=True)
    ours = load_tokenizer(source)
    for text in AWKWARD:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text


def test_byte_characters_are_gpt2s() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = byte_characters()
    assert sorted(letters) == sorted(ByteLevel.alphabet())
    assert [letters[b] for b in (0, 9, 10, 32, 33, 126, 127, 173, 255)] == [
        "Ā",
        "ĉ",
        "Ċ",
        "Ġ",
        "!",
        "~",
        "ġ",
        "Ń",
        "ÿ",
    ]


# --- documents


def test_documents_are_never_truncated_or_padded(tmp_path: Path, llama_model: bytes) -> None:
    tokenizer = load_tokenizer(directory(tmp_path / "model", {"tokenizer.model": llama_model}))
    limited = Tokenizer.from_str(tokenizer.to_str())
    limited.enable_truncation(4)
    limited.enable_padding(length=16)
    path = directory(tmp_path / "limited", {"tokenizer.json": limited.to_str()})
    texts = [TEXT, "a", "", "the river " * 50]
    expected = [tokenizer.encode(t).ids for t in texts]
    assert len(expected[0]) > 100 and expected[2] == [1]
    assert ids_of(load_tokenizer(path), texts) == expected


# --- damaged files


def test_every_cut_of_a_sentencepiece_model_is_found(tmp_path: Path, llama_model: bytes) -> None:
    load_tokenizer(directory(tmp_path, {"tokenizer.model": llama_model}))
    cuts = [
        *range(0, 60),
        *range(60, len(llama_model), 97),
        *range(len(llama_model) - 90, len(llama_model)),
    ]
    for cut in cuts:
        directory(tmp_path, {"tokenizer.model": llama_model[:cut]})
        with pytest.raises(
            ModelError, match=r"tokenizer\.model: (not a SentencePiece model|an empty file)"
        ):
            load_tokenizer(tmp_path)


def test_a_tampered_model_gives_a_tokenizer_or_a_model_error(
    tmp_path: Path, ranks: dict[bytes, int], gpt2_files: dict[str, Any]
) -> None:
    generator = random.Random(1)
    files = {
        "tokenizer.model": train_sentencepiece(normalization_rule_name="nmt_nfkc"),
        "qwen.tiktoken": tiktoken_file(ranks),
        "vocab.json": json.dumps(gpt2_files["vocab.json"]).encode(),
    }
    refused = 0
    for name, data in files.items():
        for i in range(60):
            damaged = bytearray(data)
            for _ in range(3):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            path = directory(
                tmp_path / f"{name}{i}",
                {name: bytes(damaged), "merges.txt": gpt2_files["merges.txt"]},
            )
            try:
                load_tokenizer(path).encode("the river 春天")
            except ModelError:
                refused += 1
    assert refused > 60


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def piece(text: str, kind: int = 1, score: bytes = bytes(4)) -> bytes:
    return message(1, message(1, text.encode()) + b"\x15" + score + b"\x18" + varint(kind))


TRAINER = message(2, b"\x18\x02")  # model_type: BPE
NORMALIZER = message(3, b"\x18\x01\x20\x00")


def test_the_handmade_model_that_the_next_test_damages_is_good(tmp_path: Path) -> None:
    data = piece("<unk>", 2) + piece("▁") + piece("a") + piece("▁a") + TRAINER + NORMALIZER
    assert load_tokenizer(directory(tmp_path, {"tokenizer.model": data})).encode("a aa").ids == [
        3,
        3,
        2,
    ]


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"tiktoken.model": "IQ== 0\nIg== 1\n"}, ("no tokenizer", "needs a tokenizer.json")),
        (
            {"tokenizer.model": "IQ== 0\nIg== 1\n", "config.json": {"model_type": "chatglm"}},
            ("a tiktoken file", "that of glm-4-9b-chat-hf"),
        ),
        ({"tokenizer.model": "IQ== 0\n", "tokenizer.json": "{}"}, ()),
        ({"tokenizer.model": "not looked at any further"}, ()),
    ],
)
def test_what_only_remote_code_reads_is_told_before_a_run(
    files: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
    problem = tokenizer_problem(tmp_path)
    assert (problem is None) == (not parts)
    assert all(part in str(problem) for part in parts)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": (
        {},
        (
            "no tokenizer; expected one of tokenizer.json, tokenizer.model, qwen.tiktoken,"
            " vocab.json with merges.txt"
        ),
    ),
    "merges alone": ({"merges.txt": "a b\n"}, "no tokenizer"),
    "json: cut": (
        {"tokenizer.json": '{"version": "1.0", "model": {"type": "BPE", "vo'},
        "tokenizer.json",
    ),
    "json: other": ({"tokenizer.json": '{"version": "1.0"}'}, "tokenizer.json"),
    "json: empty": ({"tokenizer.json": ""}, "an empty file"),
    "json: not text": ({"tokenizer.json": b"\xff\xfe{}"}, "not text"),
    "json: pointer": (
        {"tokenizer.json": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"},
        "Git LFS pointer",
    ),
    "sp: text": ({"tokenizer.model": "not found"}, "not a SentencePiece model"),
    "sp: page": ({"tokenizer.model": "<html>not found</html>"}, "a web page, not the file"),
    "sp: llama 3": ({"tokenizer.model": "IQ== 0\nIg== 1\n"}, "tiktoken file"),
    "sp: no trainer": ({"tokenizer.model": piece("<unk>", 2) + piece("a")}, "cut off"),
    "sp: twice": (
        {"tokenizer.model": piece("<unk>", 2) + piece("a") * 2 + TRAINER + NORMALIZER},
        "twice",
    ),
    "sp: no unknown": ({"tokenizer.model": piece("a") + TRAINER + NORMALIZER}, "0 unknown pieces"),
    "sp: nan": (
        {
            "tokenizer.model": (
                piece("<unk>", 2) + piece("a", 1, b"\0\0\xc0\x7f") + TRAINER + NORMALIZER
            )
        },
        "not finite",
    ),
    "sp: unused": (
        {"tokenizer.model": piece("<unk>", 2) + piece("a", 5) + TRAINER + NORMALIZER},
        "types",
    ),
    "sp: not utf-8": (
        {
            "tokenizer.model": (
                piece("<unk>", 2) + message(1, message(1, b"\xff")) + TRAINER + NORMALIZER
            )
        },
        "utf-8",
    ),
    "sp: characters": (
        {"tokenizer.model": piece("<unk>", 2) + message(2, b"\x18\x04") + NORMALIZER},
        "model type 4",
    ),
    "sp: bytes": (
        {"tokenizer.model": piece("<unk>", 2) + message(2, b"\x18\x02\x98\x02\x01") + NORMALIZER},
        "256 bytes",
    ),
    "sp: suffix": (
        {"tokenizer.model": piece("<unk>", 2) + message(2, b"\x18\x02\xc0\x01\x01") + NORMALIZER},
        "suffixes",
    ),
    "sp: score": (
        {"tokenizer.model": message(1, message(1, b"a") + b"\x10\x01") + TRAINER + NORMALIZER},
        "another type",
    ),
    "sp: group": ({"tokenizer.model": b"\x0b"}, "wire type 3"),
    "sp: number": ({"tokenizer.model": b"\x80" * 12}, "more than 10 bytes"),
    "qwen: cut": ({"qwen.tiktoken": "IQ== 0\nIg=="}, "line 2"),
    "qwen: base64": ({"qwen.tiktoken": "I!== 0\n"}, "line 1"),
    "qwen: twice": ({"qwen.tiktoken": "IQ== 0\nIQ== 1\n"}, "twice"),
    "qwen: bytes": ({"qwen.tiktoken": "IQ== 0\nIg== 1\n"}, "254 of the 256"),
    "vocab: no merges": (
        {"vocab.json": {c: i for i, c in enumerate(byte_characters())}},
        "merges.txt: missing",
    ),
    "vocab: not json": ({"vocab.json": '{"a": 1, "b', "merges.txt": ""}, "not JSON"),
    "vocab: ids": ({"vocab.json": {"a": 0, "b": 0}, "merges.txt": "x"}, "two tokens have one id"),
    "vocab: id": ({"vocab.json": {"a": "0"}, "merges.txt": "x"}, "'0'"),
    "vocab: bytes": (
        {"vocab.json": {"a": 0}, "merges.txt": "x"},
        "255 of the 256 bytes have no token: 0x00 to 0x60, 0x62 to 0xff; ",
    ),
    "vocab: merge": (
        {
            "vocab.json": {c: i for i, c in enumerate(byte_characters())},
            "merges.txt": "#version: 0.2\na b\n",
        },
        "line 2",
    ),
    "config": (
        {"tokenizer.model": piece("<unk>", 2) + TRAINER + NORMALIZER, "config.json": "[1"},
        "config.json: not JSON",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_files(tmp_path: Path, name: str) -> None:
    files, message_part = BAD[name]
    source = directory(tmp_path / "source", files)
    for use in (load_tokenizer, lambda path: export_tokenizer(path, tmp_path / "out")):
        with pytest.raises(ModelError) as caught:
            use(source)
        assert message_part in str(caught.value) and str(source) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_cut_merges_and_ranks_are_found(
    tmp_path: Path, ranks: dict[bytes, int], gpt2_files: dict[str, Any]
) -> None:
    merges = gpt2_files["merges.txt"].split("\n")
    cut = {**gpt2_files, "merges.txt": "\n".join(merges[: len(merges) // 2]) + "\n"}
    with pytest.raises(ModelError, match=r"no merge for \d+ of 420 tokens"):
        load_tokenizer(directory(tmp_path / "merges", cut))
    lines = tiktoken_file(ranks).splitlines(keepends=True)[:-3]
    files = {
        "qwen.tiktoken": b"".join(lines),
        "generation_config.json": {"eos_token_id": len(ranks) + 207},
    }
    with pytest.raises(ModelError, match="417 tokens, so that id 627 is no special token"):
        load_tokenizer(directory(tmp_path / "ranks", files))


def test_another_models_tokenizer_is_found(tmp_path: Path, llama_model: bytes) -> None:
    size = sentencepiece.SentencePieceProcessor(model_proto=llama_model).get_piece_size()
    files = {"tokenizer.model": llama_model, "config.json": {"vocab_size": size - 1}}
    with pytest.raises(
        ModelError, match=f"token ids up to {size - 1}; expected less than vocab_size {size - 1}"
    ):
        load_tokenizer(directory(tmp_path / "small", files))
    # A padding token behind the embedding is common, and harmless.
    files = {**files, "config.json": {"vocab_size": size}, "added_tokens.json": {"<pad>": size}}
    assert load_tokenizer(directory(tmp_path / "padded", files)).token_to_id("<pad>") == size


def test_all_problems_of_the_special_tokens_at_once(tmp_path: Path, llama_model: bytes) -> None:
    files = {
        "tokenizer.model": llama_model,
        "tokenizer_config.json": {
            "bos_token": 7,
            "added_tokens_decoder": {"x": {"content": "a"}, "900": 3},
        },
        "special_tokens_map.json": {"additional_special_tokens": ["<a>", 5]},
        "added_tokens.json": {"<b>": "9", "<c>": 901, "<d>": -1},
    }
    with pytest.raises(ModelError) as caught:
        load_tokenizer(directory(tmp_path, files))
    assert len(caught.value.problems) == 6
    files = {"tokenizer.model": llama_model, "added_tokens.json": {"<s>": 900}}
    with pytest.raises(
        ModelError, match=r"added token '<s>': has the id 900, and is in the vocabulary as 1"
    ):
        load_tokenizer(directory(tmp_path / "moved", files))


# --- what fuzzing found


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
    ],
)
def test_half_a_surrogate_pair_in_a_file_is_named(
    tmp_path: Path, llama_model: bytes, name: str
) -> None:
    """An escape of JSON that no text can hold; a whole pair is a letter."""
    whole = {"<\U0001f600>": 481} if name == "added_tokens.json" else {"bos_token": "<\U0001f600>"}
    directory(tmp_path / "whole", {"tokenizer.model": llama_model, name: json.dumps(whole)})
    export_tokenizer(tmp_path / "whole", tmp_path / "out")
    half = json.dumps(whole).replace("\\ude00", "")
    assert "\\ud83d" in half
    directory(tmp_path / "half", {"tokenizer.model": llama_model, name: half})
    with pytest.raises(
        ModelError, match=rf'{name}.*"<\\ud83d>"; expected text that UTF-8 can hold'
    ):
        export_tokenizer(tmp_path / "half", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("token", ["a:b", "$A", "$"])
def test_a_token_that_the_librarys_templates_cannot_say(
    tmp_path: Path, llama_model: bytes, token: str
) -> None:
    """Its small language would take `$A` for the text itself, and a colon for the end of the
    name."""
    files = {
        "tokenizer.model": llama_model,
        "tokenizer_config.json": {"bos_token": token, "add_bos_token": True},
    }
    with pytest.raises(ModelError, match="as the token around a text"):
        load_tokenizer(directory(tmp_path, files))


def test_a_long_token_is_cut_where_tokens_can_meet(tmp_path: Path) -> None:
    """A line of a megabyte was cut a million times, which took minutes; what merges are found is
    the same."""
    order = {b"a": 0, b"b": 1, b"ab": 2, b"ba": 3, b"aba": 4, b"abab": 5, b"x" * 2**20: 6}
    began = time.process_time()
    expected = [
        (b"a", b"b"),
        (b"b", b"a"),
        (b"ab", b"a"),
        (b"a", b"ba"),
        (b"aba", b"b"),
        (b"ab", b"ab"),
    ]
    assert merges_of(order) == expected and time.process_time() - began < 5


def test_a_tokenizer_that_fails_at_a_text_says_so(tmp_path: Path) -> None:
    """A unigram vocabulary without an unknown token can be read, and splits what it knows."""
    tokenizer = Tokenizer(Unigram([("a", 0.0), ("b", -1.0)], None, False))
    text = Text(directory(tmp_path, {"tokenizer.json": tokenizer.to_str()}))
    assert text.encode("ab") == [0, 1]
    for fails in (
        lambda: text.encode("z"),
        lambda: cut_windows(text.tokenizer, ["a", "z"], count=1, length=2),
    ):
        with pytest.raises(
            ModelError, match=r"unk_id.*expected a tokenizer that can split any text"
        ):
            fails()


def test_an_expression_that_backtracks_is_given_up(tmp_path: Path) -> None:
    """The library's engine has a limit, at which it panics: no Exception of Python's."""
    tokenizer = Tokenizer(WordLevel({"a": 0}, "a"))
    tokenizer.pre_tokenizer = Split(Regex("(a|a)+$"), "isolated")
    text = Text(directory(tmp_path, {"tokenizer.json": tokenizer.to_str()}))
    long = "a" * 30 + "!"
    for fails in (
        lambda: text.encode(long),
        lambda: Beginnings(text.tokenizer).encode([long] * 3, 8, special=[True] * 3),
    ):
        with pytest.raises(
            ModelError, match=r"retry-limit.*expected a tokenizer that can split any text"
        ):
            fails()


@pytest.mark.parametrize("name", ["added_tokens.json", "vocab.json", "tokenizer.json"])
def test_an_id_near_2_to_the_32nd(
    tmp_path: Path, llama_model: bytes, gpt2_files: dict[str, Any], name: str
) -> None:
    """800 bytes were 8 GB and 20 s when the tokenizer was written: the library keeps count of all
    ids in between."""
    far, files = (
        {"<pad>": 2**31 - 1},
        {"tokenizer.model": llama_model, "added_tokens.json": {"<pad>": 2**31 - 1}},
    )
    if name == "vocab.json":
        files = {**gpt2_files, "vocab.json": {**gpt2_files["vocab.json"], **far}}
    elif name == "tokenizer.json":
        files = {
            "tokenizer.json": (
                Tokenizer(WordLevel({"a": 0}, "a"))
                .to_str()
                .replace('"a":0', '"a":0,"<pad>":2147483647')
            )
        }
    with pytest.raises(ModelError, match="token ids up to 2147483647; expected less than 16777216"):
        export_tokenizer(directory(tmp_path / "source", files), tmp_path / "out")


def test_a_piece_that_only_looks_like_a_byte(tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"<0x41>": 0, "<0xZZ>": 1}, "<0x41>"))
    text = Text(directory(tmp_path, {"tokenizer.json": tokenizer.to_str()}))
    assert (text.token_bytes(0), text.token_bytes(1)) == (b"A", b"<0xZZ>")
