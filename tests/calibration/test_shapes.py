"""Rows of public data sets: what is taken for the text, what for a dialogue, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantflow.calibration.data import Rendered, cut_windows, documents, joined
from quantflow.calibration.shapes import Dialogue, read_row
from quantflow.errors import DataError, Problem, RequestError

ASK, SAY = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [ASK, SAY]
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]

# From the cards of public data sets; the texts are ours.
DIALOGUES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "messages, with an id": ({"id": "conversation-000000", "messages": TALK}, TALK),
    "ShareGPT": ({"id": "identity_0", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}, TALK),
    "UltraChat": ({"prompt": "What?", "prompt_id": "7", "messages": [*TALK, ASK, SAY]}, [*TALK, ASK, SAY]),
    "LMSYS": ({"conversation_id": "1", "model": "x", "conversation": TALK, "turn": 1, "redacted": False}, TALK),
    "OpenHermes": (
        {"source": "x", "conversations": [{"from": "system", "value": "Be brief.", "weight": None}, {"from": "human", "value": "What?"},
                                          {"from": "gpt", "value": "That."}]}, [SYSTEM, *TALK],
    ),
    "content as parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "at?"}]}, SAY]}, TALK,
    ),
    "a table's nulls": ({"messages": [{"role": "user", "content": "What?", "name": None, "tool_calls": None}, SAY], "text": None}, TALK),
    "a blank text beside it": ({"text": "", "messages": TALK}, TALK),
    "both spellings in one table": ({"messages": [{"role": None, "content": None, "from": "human", "value": "What?"}, SAY]}, TALK),
    "prompt and response": ({"prompt": "What?", "response": "That.", "id": "1"}, TALK),
    "prompt and completion": ({"prompt": "What?", "completion": "That."}, TALK),
    "prompt and completion as turns": ({"prompt": [ASK], "completion": [SAY]}, TALK),
    "GSM8K": ({"question": "What?", "answer": "That."}, TALK),
    "OpenOrca": ({"id": "niv.1", "system_prompt": "Be brief.", "question": "What?", "response": "That."}, [SYSTEM, *TALK]),
    "MetaMath": ({"query": "What?", "response": "That.", "type": "GSM", "original_question": "What is it?"}, TALK),
    "Alpaca": ({"instruction": "What?", "input": "", "output": "That."}, TALK),
    "Alpaca with an input": (
        {"instruction": "Translate.", "input": "Hund", "output": "dog", "text": None},
        [{"role": "user", "content": "Translate.\n\nHund"}, {"role": "assistant", "content": "dog"}],
    ),
    "Dolly": (
        {"instruction": "Who?", "context": "Bea sang.", "response": "Bea.", "category": "qa"},
        [{"role": "user", "content": "Who?\n\nBea sang."}, {"role": "assistant", "content": "Bea."}],
    ),
    "input and output": ({"input": "What?", "output": "That."}, TALK),
    "DPO": ({"prompt": "What?", "chosen": "That.", "rejected": "This."}, TALK),
    "DPO as turns": ({"prompt": "What?", "chosen": TALK, "rejected": [ASK, ASK], "score_chosen": 9.0}, TALK),
    "DPO as turns, the prompt apart": ({"prompt": [SYSTEM, ASK], "chosen": [SAY], "rejected": [SAY]}, [SYSTEM, *TALK]),
    "chosen alone": ({"chosen": TALK, "rejected": TALK, "source": "x"}, TALK),
    "messages before chosen": ({"messages": TALK, "chosen": [ASK, ASK], "prompt": "x"}, TALK),
}  # fmt: skip


@pytest.mark.parametrize("name", DIALOGUES)
def test_dialogues(name: str) -> None:
    row, expected = DIALOGUES[name]
    found = read_row(row, "a.jsonl:1")
    assert found == Dialogue(expected, None)
    assert joined(found) == "\n".join(message["content"] for message in expected)


def test_tools_and_calls() -> None:
    """Arguments become objects, which templates write themselves; `tools` may be JSON."""
    turns = [
        ASK, {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0}, {"role": "tool", "content": "3", "name": "f"},
        {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "4"},
    ]  # fmt: skip
    expected = [
        ASK, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "3", "name": "f"}, {"role": "assistant", "content": "{}"}, {"role": "tool", "content": "4"},
    ]  # fmt: skip
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert read_row({"messages": turns, "tools": tools}, "") == Dialogue(expected, TOOLS)
    assert read_row({"messages": TALK, "tools": "none"}, "") == Dialogue(TALK, None)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("plain", "plain"),
        ({"id": "row-1", "text": "a"}, "a"),
        ({"url": "http://x", "content": "a"}, "a"),
        ({"sentence": "a", "label": 1}, "a"),
        ({"document": "a", "id": "x"}, "a"),
        ({"prompt": "a", "n": 3}, "a"),
        ({"chosen": "Human: a", "rejected": "Human: b"}, "Human: a"),
        ({"text": "rendered", "messages": TALK}, "rendered"),
        ({"text": "", "id": "x"}, ""),
        ({"text": " ", "content": "a"}, "a"),
    ],
)
def test_texts(row: Any, text: str) -> None:
    assert read_row(row, "") == text


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"id": "row-1", "text": None}, "an object with the fields id (text), text (null); expected a string, or text or content"),
        ({"id": 1, "body": "a"}, "id (number), body (text)"),
        ({"prompt": "a", "reply": "b"}, "prompt (text), reply (text)"),
        ({"instruction": "a", "input": "b"}, "instruction (text), input (text)"),
        ({"question": "a", "choices": ["b"]}, "choices (list)"),
        ({"messages": "[]", "ok": True}, "messages (text), ok (yes or no)"),
        ({}, "no fields"),
        ([1, 2], "list ('[1, 2]')"),
        (None, "null"),
        (7, "number"),
        ({"messages": ["Hi"]}, "messages[0]: 'Hi'; expected an object with role and content, or from and value"),
        ({"messages": [{"author": "a", "text": "b"}]}, "messages[0]: an object with the fields author (text), text (text)"),
        ({"conversations": [{"from": "narrator", "value": "b"}]}, "conversations[0] from: 'narrator'; expected one of system"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "a part of type image_url"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0] content: 3"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "a part of type text"),
    ],
)
def test_anything_else_is_refused_with_its_fields(row: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        read_row(row, "a.jsonl:7")
    assert "a.jsonl:7" in str(caught.value) and says in str(caught.value)


def test_a_field_by_its_name() -> None:
    row = {"text": "no", "body": "yes", "turns": TALK, "n": 1, "none": None}
    assert read_row(row, "", "body") == "yes" and read_row(row, "", "turns") == Dialogue(TALK, None)
    for field in ("n", "none", "absent"):
        with pytest.raises(DataError, match=rf"n \(number\), none \(null\); expected text, or a dialogue, in the field {field}"):
            read_row(row, "a", field)
    with pytest.raises(DataError):
        read_row("a string", "a", "body")


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_dialogues_are_rendered_and_blank_ones_left_out(tmp_path: Path) -> None:
    silent = {"messages": [{"role": "user", "content": " "}]}
    path = lines(tmp_path / "a.jsonl", [{"messages": TALK}, silent, {"messages": []}, {"text": " "}, {"text": " plain "}])

    def render(dialogue: Dialogue) -> str:
        return Rendered("".join(f"<{m['role']}>{m['content']}\n" for m in dialogue.messages))

    found = list(documents(path, render=render))
    assert found == ["<user>What?\n<assistant>That.\n", "plain"]  # whose line break at the end belongs to the format
    assert [isinstance(text, Rendered) for text in found] == [True, False]


def test_a_row_that_a_template_refuses_is_named(tmp_path: Path) -> None:
    def render(dialogue: Dialogue) -> str:
        raise RequestError(Problem("messages", "the model's chat template refused them: no system role"))

    path = lines(tmp_path / "a.jsonl", [{"text": "a"}, {"messages": [SYSTEM, *TALK]}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: the model's chat template refused them: no system role"):
        list(documents(path, render=render))


def test_a_rendered_dialogue_has_its_special_tokens() -> None:
    """And gets none from the tokenizer: a chat would not have two BOS either."""

    class Letters:
        def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[Any]:
            return [type("Encoding", (), {"ids": [1] * add_special_tokens + [*map(ord, text)]}) for text in texts]

    windows = cut_windows(Letters(), ["ab", Rendered("cd"), "e"], count=1, length=7)
    assert windows.tokens == [[1, *map(ord, "ab"), *map(ord, "cd"), 1, ord("e")]]
