"""/tokenize takes a text or a dialogue, and refuses by name what only counts with the other."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.serving import Running

HI = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    "body",
    [
        {"chat_template_kwargs": {"x": 1}},
        {"reasoning_effort": "low"},
        {"enable_thinking": True},
        {"documents": [{"text": "x"}]},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
    ],
)
def test_a_text_has_no_template_as_in_completions(server: Running, body: dict[str, Any]) -> None:
    for answer in (server.post("/tokenize", {"prompt": "x", **body}), server.complete(**body)):
        name = next(iter(body))
        assert (answer.status, answer.error["param"], answer.error["code"]) == (
            400,
            name,
            "unsupported_parameter",
        )
        assert answer.error["message"].startswith(
            f"{name}: this value is not supported here; expected "
        )


def test_a_dialogue_has_its_own_special_tokens_as_in_chat(server: Running) -> None:
    for answer in (
        server.post("/tokenize", {"messages": HI, "add_special_tokens": True}),
        server.chat(add_special_tokens=True),
    ):
        assert (answer.status, answer.error["param"]) == (400, "add_special_tokens")
        assert answer.error["message"].endswith("expected false. A chat template writes them")


@pytest.mark.parametrize(
    "body",
    [
        {"chat_template_kwargs": {}},
        {"reasoning_effort": "none"},
        {"enable_thinking": False},
        {"documents": []},
        {"add_generation_prompt": True},
        {"continue_final_message": False},
        {"documents": None},
    ],
)
def test_what_changes_nothing_is_accepted(server: Running, body: dict[str, Any]) -> None:
    assert (
        server.post("/tokenize", {"prompt": "x", **body}).json
        == server.post("/tokenize", {"prompt": "x"}).json
    )
    assert (
        server.post("/tokenize", {"messages": HI, "add_special_tokens": False}).json
        == server.post("/tokenize", {"messages": HI}).json
    )


def test_one_of_the_two(server: Running) -> None:
    for body in ({}, {"prompt": "x", "messages": HI}):
        answer = server.post("/tokenize", body)
        assert (answer.status, answer.error["param"]) == (400, "prompt")
    answer = server.post("/tokenize", {"prompt": ""})
    assert answer.status == 200 and answer.json["count"] == len(answer.json["tokens"])
