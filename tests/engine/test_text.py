"""Dialogue formats spelled out, and text that grows by tokens."""

from __future__ import annotations

import itertools
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from quantflow.engine.renderer import Renderer
from quantflow.engine.text import Detokenizer, Text
from quantflow.errors import RequestError
from quantflow.tokenizers.dialogue import ChatTemplate

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TALK]

FORMATS = {
    "internlm": "<s><|System|>:Be brief.\n<|User|>:Hi\n<|Bot|>:Yes?<eoa>\n<|User|>:Why\n<|Bot|>:",
    "internlm2": (
        "<s><|im_start|>system\nBe"
        " brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\nWhy<|im_end|>\n<|im_start|>assistant\n"
    ),
    "chatml": (
        "<|im_start|>system\nBe"
        " brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\nWhy<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen": (
        "<|im_start|>system\nBe"
        " brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\nWhy<|im_end|>\n<|im_start|>assistant\n"
    ),
    "vicuna": "<s>Be brief. USER: Hi ASSISTANT: Yes?</s>USER: Why ASSISTANT:",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yes? </s><s>[INST] Why [/INST]",
    "baichuan": "Be brief.<reserved_106>Hi<reserved_107>Yes?<reserved_106>Why<reserved_107>",
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_by_name(tiny: Path, name: str) -> None:
    assert Text(tiny, name).render(SYSTEM) == FORMATS[name]


def test_families_that_have_a_usual_system_text(tiny: Path) -> None:
    said = Text(tiny, "internlm").render(TALK[:1])
    assert said.startswith(
        "<s><|System|>:You are an AI assistant whose name is InternLM (书生·浦语).\n- InternLM"
    )
    assert said.endswith("such as English and 中文.\n<|User|>:Hi\n<|Bot|>:")
    assert (
        Text(tiny, "qwen")
        .render(TALK[:1])
        .startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    )
    assert (
        Text(tiny, "vicuna").render(TALK[:1]).endswith("the user's questions. USER: Hi ASSISTANT:")
    )
    assert Text(tiny, "llama2").render(TALK[:1]) == "<s>[INST] Hi [/INST]"


def with_template(tiny: Path, folder: Path, template: str) -> Text:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    return Text(folder)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}", "characters"),
        ("{{ 'x' * 10**10 }}", "MiB"),
        ("{{ 'x'.center(10**10) }}", "MiB"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "more than 1 s",
        ),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[7].content + 1 }}", "UndefinedError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_a_template_that_does_not_behave_is_a_refused_request(
    tiny: Path, tmp_path: Path, template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "more than" in said:
        monkeypatch.setattr("quantflow.engine.renderer.MOST_SECONDS", 1.0)
    text = with_template(tiny, tmp_path / "model", template)
    with pytest.raises(RequestError, match="chat template refused") as caught:
        text.render(TALK)
    assert said in str(caught.value)
    monkeypatch.undo()
    text.template = ChatTemplate({"default": "{{ messages[0].content }}"})
    assert text.render(TALK) == "Hi"  # the next one is served


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["Hi"],
        [{"content": "Hi"}],
        [{"role": 1, "content": "Hi"}],
        [{"role": "user", "content": 3}],
    ],
)
def test_messages_of_another_shape_are_refused(tiny: Path, messages: list[Any]) -> None:
    with pytest.raises(RequestError, match="messages"):
        Text(tiny, "chatml").render(messages)


def test_a_base_model_has_no_dialogue_format(tiny: Path) -> None:
    with pytest.raises(RequestError, match="no dialogue format"):
        Text(tiny).render(TALK)
    with pytest.raises(RequestError, match="one of baichuan"):
        Text(tiny, "klingon")


def test_end_tokens_come_from_all_that_names_them(tiny: Path, tmp_path: Path) -> None:
    text = with_template(tiny, tmp_path / "model", "x")
    assert text.end_tokens == {1}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert Text(tmp_path / "model").end_tokens == {1, 7, 9}


def test_letters_of_several_tokens_come_whole(tiny: Path) -> None:
    text = Text(tiny)
    tokens = text.encode("春天 and 🦊!", special=False)
    grown = Detokenizer(text, [0], ())
    parts = [grown.add(token) for token in tokens]
    assert (
        "".join(parts) == "春天 and 🦊!"
        and not any("\ufffd" in part for part in parts)
        and "" in parts
    )


def test_the_space_before_a_word_after_the_prompt_stays(tmp_path: Path) -> None:
    """SentencePiece's decoder drops the space before a first word; the first new word is not the
    first."""
    vocabulary = {"▁Hello": 0, "▁world": 1, "!": 2, "▁": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()

    tokenizer.save(str(tmp_path / "tokenizer.json"))
    grown = Detokenizer(Text(tmp_path), [0], ())
    assert grown.add(1) + grown.add(2) == " world!"


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stop"),
    [
        (("END",), ["a", "E", "N", "D", "b"], "a", "END"),
        (("END",), ["a", "E", "N", "x"], "aENx", None),
        (("aab",), ["a", "a", "a", "b"], "a", "aab"),
        (("bc", "abc"), ["a", "b", "c"], "", "abc"),
        (("abc", "ab"), ["abc"], "", "ab"),
        (("abcd", "bc"), ["abcd"], "a", "bc"),
        (("xy", "y"), ["a", "x", "y"], "a", "xy"),
        (("\n\n",), ["one\n", "\ntwo"], "one", "\n\n"),
        (("zz",), ["z"], "z", None),
    ],
)
def test_stop_strings(
    tiny: Path, stops: tuple[str, ...], pieces: list[str], shown: str, stop: str | None
) -> None:
    text = Text(tiny)
    grown = Detokenizer(text, [0], stops)
    found = ""
    for piece in pieces:
        for token in text.encode(piece, special=False):
            if grown.stop is None:
                found += grown.add(token)
    assert (found + grown.finish(), grown.stop) == (shown, stop)


@pytest.mark.parametrize("seed", range(100))
def test_which_stop_string_is_found_depends_on_no_cut(seed: int) -> None:
    """The one that is whole first, as one reads letter by letter; of two that end there, the
    longer."""
    drawn = random.Random(seed)
    letters = "".join(drawn.choices("abc", k=12))
    stops = ["".join(drawn.choices("abc", k=drawn.randint(2, 4))) for _ in range(3)]
    ends = (
        (end, len(stop), stop)
        for end in range(13)
        for stop in sorted(stops, key=len, reverse=True)
        if letters[:end].endswith(stop)
    )
    end, size, stop = next(ends, (len(letters), 0, None))
    vocabulary = {letters[a:b]: 0 for a in range(12) for b in range(a + 1, 13)} | {"?": 0}
    tokenizer = Tokenizer(
        models.WordLevel({word: id for id, word in enumerate(vocabulary)}, unk_token="?")
    )
    tokenizer.decoder = decoders.Fuse()
    text = object.__new__(Text)
    text.folder, text.tokenizer = Path("."), tokenizer
    cuts = [0, *sorted(drawn.sample(range(1, 12), k=drawn.randint(0, 11))), 12]
    grown, shown = Detokenizer(text, [], stops), ""
    for a, b in itertools.pairwise(cuts):
        if grown.stop is None:
            shown += grown.add(tokenizer.token_to_id(letters[a:b]))
    assert (shown + grown.finish(), grown.stop) == (letters[: end - size], stop)


def byte_fallback() -> Text:
    """As SentencePiece models have it: a token for each byte, and some words."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {
        "▁the": 256,
        "▁": 257,
        "中": 258,
        "x": 259,
        "<s>": 260,
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="x"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    text = object.__new__(Text)
    text.folder, text.tokenizer = Path("."), tokenizer
    return text


@pytest.mark.parametrize("seed", range(200))
def test_any_tokens_have_a_text(seed: int) -> None:
    """Random bytes and words: nothing raises, and no word is lost or shown twice. (What broken
    bytes become depends on how many are decoded together.)"""
    picked, text = random.Random(seed), byte_fallback()
    prompt = [
        257,
        *picked.choices(
            [*range(257, 260), *range(0xE0, 0xF0), *range(0x80, 0x90)], k=picked.randrange(6)
        ),
    ]
    tokens = picked.choices([256, 259, *range(0xE0, 0xF0), *range(0x80, 0xC0), 0x41], k=20)
    grown = Detokenizer(text, prompt, ())
    found = "".join([grown.add(token) for token in tokens]) + grown.finish()
    assert [c for c in found if c in "thex"] == [
        c for token in tokens if token > 255 for c in ("the" if token == 256 else "x")
    ]


@pytest.mark.parametrize("seed", range(50))
def test_whole_letters_in_bytes_are_the_decoders(seed: int) -> None:
    picked, text = random.Random(seed), byte_fallback()
    letters = "".join(picked.choices("aé中🦊 \n", k=12))
    tokens = [*letters.encode()]
    grown = Detokenizer(text, [256, 259], ())
    assert "".join([grown.add(token) for token in tokens]) + grown.finish() == letters


def test_a_letter_that_begins_in_the_prompt_is_shown_once() -> None:
    text = byte_fallback()
    first, second, third = "中".encode()
    grown = Detokenizer(text, [256, first, second], ())
    assert grown.add(third) + grown.add(259) + grown.finish() == "中x"


def test_bytes_that_never_become_a_letter_are_shown_in_the_end() -> None:
    grown = Detokenizer(byte_fallback(), [256], ())
    assert grown.add(0xE4) == "" and "\ufffd" in grown.finish()


def test_a_templates_process_that_somebody_ended_is_started_again(tiny: Path) -> None:
    text = Text(tiny, "chatml")
    expected = text.render(TALK)
    process = text._renderer._idle.queue[-1]._process
    assert process is not None
    process.kill()
    process.wait()
    assert text.render(TALK) == expected
    process = text._renderer._idle.queue[-1]._process
    assert process is not None
    process.kill()  # not yet noticed, perhaps
    assert text.render(TALK) == expected


def test_a_template_that_takes_long_does_not_keep_all_others_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quantflow.engine.renderer.MOST_SECONDS", 60.0)
    renderer = Renderer()
    renderer.render("x", {})
    slow = "{% for i in range(3000) %}{% for j in range(3000) %}{% endfor %}{% endfor %}slow"
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(renderer.render(slow, {})))
    thread.start()
    for _ in range(3):
        found.append(renderer.render("quick", {}))
    thread.join()
    assert found == ["quick"] * 3 + ["slow"]


def test_what_json_cannot_hold_is_refused(tiny: Path) -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RequestError, match="messages"):
        Text(tiny, "chatml").render([{"role": "user", "content": "x", "more": deep}])


def test_single_tokens_as_bytes_and_as_text(tiny: Path) -> None:
    text = Text(Path(__file__).parents[2] / "calib_data" / "demo_model")
    for word in ("table", " x", "é", "诗", "\n"):
        assert b"".join(map(text.token_bytes, text.encode(word, special=False))) == word.encode()
    first = text.encode("诗", special=False)[0]
    assert text.token_text(first).startswith("bytes:\\x") and text.token_text(
        text.encode("table", special=False)[0]
    )
    assert text.token_bytes(10**6) == b""


def test_sentencepieces_bytes() -> None:
    tokenizer = Tokenizer(
        models.BPE(
            {"<unk>": 0, "<0xE8>": 1, "\u2581table": 2, "x": 3},
            [],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    text = object.__new__(Text)
    text.tokenizer, text._added, text._byte_level = tokenizer, {0: True}, False
    assert [text.token_bytes(i) for i in range(4)] == [b"<unk>", b"\xe8", b" table", b"x"]
