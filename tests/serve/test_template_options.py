"""What clients may tell a model's chat template: variables within limits, reasoning, and where the
answer is to begin."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from quantflow.engine.literal import Literal
from quantflow.engine.long_text import LongTexts
from quantflow.engine.renderer import Renderer
from quantflow.engine.text import Text
from quantflow.serve.service import Service
from quantflow.serve.template_options import (
    DEEPEST,
    MOST_CHARACTERS,
    RESERVED,
    TemplateOptions,
    template_options,
)
from tests.helpers.serving import DEMO, Running, serving

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}<think>{{"
    " m.reasoning_content }}</think>{% endif %}{{ m.content }}<end>{% endfor %}{% if"
    " enable_thinking is defined %}[thinking {{ enable_thinking }}]{% endif %}{% if"
    " reasoning_effort %}[effort {{ reasoning_effort }}]{% endif %}{% for d in documents or []"
    " %}[{{ d.title }}: {{ d.text }}]{% endfor %}{% for key, value in (extra or {}).items() %}[{{"
    " key }}={{ value }}]{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMS = TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")
HI = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module", params=[TEMPLATE, TRIMS], ids=["as it is", "trimmed"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("template") / "model"
    shutil.copytree(DEMO, found)
    (found / "chat_template.jinja").write_text(request.param)
    return found


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    with serving(folder, check=True) as found:
        yield found


def written(running: Running, *messages: Any, **body: Any) -> str:
    """What the model is given, as /tokenize and /v1/chat/completions both have it."""
    answer = running.post("/tokenize", {"messages": messages, **body})
    assert answer.status == 200, answer.error
    chat = running.chat(messages=messages, max_tokens=1, **body)
    assert chat.status == 200 and chat.json["usage"]["prompt_tokens"] == answer.json["count"]
    return running.service.text.joined(answer.json["tokens"], special=True).removeprefix("<s>")


@pytest.mark.parametrize(
    ("body", "end"),
    [
        ({}, "<assistant>"),
        ({"chat_template_kwargs": {}}, "<assistant>"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "[thinking False]<assistant>"),
        (
            {"chat_template_kwargs": {"extra": {"a": [1, {"b": None}]}}},
            "[a=[1, {'b': None}]]<assistant>",
        ),
        ({"chat_template_kwargs": {"unheard_of": 5}}, "<assistant>"),
        ({"enable_thinking": True}, "[thinking True]<assistant>"),
        ({"reasoning_effort": "low"}, "[thinking True][effort low]<assistant>"),
        ({"reasoning_effort": "none"}, "[thinking False][effort none]<assistant>"),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
            "[thinking False][effort high]<assistant>",
        ),
        ({"documents": [{"title": "T", "text": "words"}]}, "[T: words]<assistant>"),
        ({"add_generation_prompt": True}, "<assistant>"),
        ({"add_generation_prompt": False}, ""),
    ],
)
def test_a_template_is_told(running: Running, body: dict[str, Any], end: str) -> None:
    assert written(running, HI, **body) == "<user>Hi<end>" + end


# What a dialogue passes on its way: a client's variable may have the name of any argument there.
PASSED = (
    Text.render, Text.dialogue, Text.encode, Service.dialogue, Service.dialogue_tokens,
    TemplateOptions, template_options,
    Renderer.render, Renderer, Literal.marked, Literal.marked_value, Literal.encode,
    LongTexts.encode, jinja2.Template.generate, jinja2.Template.render,
)  # fmt: skip
ARGUMENTS = sorted(
    {name for function in PASSED for name in inspect.signature(function).parameters}
    | {"dialogues", "extra", "context"}
)


@pytest.fixture(scope="module")
def naming(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Whose template tells what it knows by each of those names."""
    folder = tmp_path_factory.mktemp("naming") / "model"
    shutil.copytree(DEMO, folder)
    shown = "".join(
        f"{{% if {name} is string %}}[{name}={{{{ {name} }}}}]{{% endif %}}"
        for name in ARGUMENTS
        if name not in RESERVED
    )
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}" + shown
    )
    with serving(folder) as found:
        yield found


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_variable_may_be_called_like_an_argument_of_ours(naming: Running, name: str) -> None:
    variables: dict[str, Any] = {"chat_template_kwargs": {name: "mine"}}
    tokenized = naming.post("/tokenize", {"messages": [HI], **variables})
    chat = naming.chat(messages=[HI], max_tokens=1, **variables)
    response = naming.post(
        "/v1/responses", {"model": "x", "input": "Hi", "max_output_tokens": 1, **variables}
    )
    if name in RESERVED:
        assert {a.error["param"] for a in (tokenized, chat, response)} == {"chat_template_kwargs"}
        assert {a.status for a in (tokenized, chat, response)} == {400}
        return
    assert naming.service.text.decode(tokenized.json["tokens"]) == f"Hi[{name}=mine]"
    assert (
        chat.json["usage"]["prompt_tokens"]
        == response.json["usage"]["input_tokens"]
        == tokenized.json["count"]
    )


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_a_history_reaches_the_template(running: Running, name: str) -> None:
    said = {"role": "assistant", "content": "A", name: "why"}
    assert (
        written(running, HI, said, HI)
        == "<user>Hi<end><assistant><think>why</think>A<end><user>Hi<end><assistant>"
    )


@pytest.mark.parametrize(
    "content", ["The table", "The table ", "  x\n", "The ​table is", "end <end>"]
)
def test_a_message_goes_on_where_transformers_has_it(
    running: Running, folder: Path, content: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [HI, {"role": "assistant", "content": content}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    tokens = running.post("/tokenize", {"messages": messages, "continue_final_message": True}).json[
        "tokens"
    ]
    assert tokens == tokenizer(expected, add_special_tokens=False)["input_ids"]
    answer = running.chat(
        messages=messages, continue_final_message=True, add_generation_prompt=False, max_tokens=6
    )
    assert answer.json["usage"]["prompt_tokens"] == len(tokens)
    assert (
        answer.json["choices"]
        and answer.json["choices"][0]["message"]["content"]
        == running.complete(prompt=tokens, max_tokens=6).json["choices"][0]["text"]
    )


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("body", "param"),
    [
        *[
            ({"chat_template_kwargs": {name: "x"}}, "chat_template_kwargs")
            for name in (
                "messages",
                "tools",
                "documents",
                "bos_token",
                "raise_exception",
                "namespace",
                "self",
                "_private",
                "a-b",
                "",
                "x" * 65,
            )
        ],
        ({"chat_template_kwargs": {"x": _deep(DEEPEST)}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": _deep(100)}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": [1] * 5000}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": "y" * (MOST_CHARACTERS + 1)}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": {"y" * MOST_CHARACTERS: 1}}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {f"x{i}": 1 for i in range(65)}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"reasoning_effort": "very"}, "reasoning_effort"),
        ({"documents": [{"title": 1}]}, "documents[0].title"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (
            {
                "continue_final_message": True,
                "messages": [
                    HI,
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}],
                    },
                ],
            },
            "continue_final_message",
        ),
    ],
)
def test_limits(running: Running, body: dict[str, Any], param: str) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = running.post(path, {"messages": [HI], **body})
        assert answer.status == 400 and answer.error["param"].startswith(param), answer.body


def test_documents_count_as_text(running: Running) -> None:
    answer = running.chat(documents=[{"text": "x" * 100_000}])
    assert (answer.error["param"], answer.error["code"]) == ("messages", "context_length_exceeded")


def test_what_a_variable_may_be_at_most(running: Running) -> None:
    for value in (_deep(DEEPEST - 1), "y" * (MOST_CHARACTERS - 1), [1] * 4000):
        assert (
            running.post(
                "/tokenize", {"messages": [HI], "chat_template_kwargs": {"x": value}}
            ).status
            == 200
        )


def test_a_template_that_rewrites_the_last_message_cannot_continue_it(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content | upper }}{{ m.content[:1] }}{% endfor %}"
    )
    with serving(tmp_path / "model") as running:
        answer = running.chat(continue_final_message=True)
        assert answer.status == 400 and "cannot be continued" in answer.error["message"]
