"""Rows of public data sets: what is taken for the text, what for a dialogue, and what is refused by
name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantflow.calibration.data import (
    ENOUGH,
    Document,
    cut_windows,
    documents,
    joined,
    read_documents,
)
from quantflow.calibration.shapes import Conversation, OddTurn, read_row
from quantflow.errors import DataError, Problem, RequestError

ASK, SAY = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [ASK, SAY]
WHO = [{"role": "user", "content": "Who?\n\nBea sang."}, {"role": "assistant", "content": "Bea."}]
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]

# From the cards of public data sets; the texts are ours.
CONVERSATIONS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "messages, with an id": ({"id": "conversation-000000", "messages": TALK}, TALK),
    "ShareGPT": (
        {
            "id": "identity_0",
            "conversations": [
                {"from": "human", "value": "What?"},
                {"from": "gpt", "value": "That."},
            ],
        },
        TALK,
    ),
    "UltraChat": (
        {"prompt": "What?", "prompt_id": "7", "messages": [*TALK, ASK, SAY]},
        [*TALK, ASK, SAY],
    ),
    "LMSYS": (
        {"conversation_id": "1", "model": "x", "conversation": TALK, "turn": 1, "redacted": False},
        TALK,
    ),
    "OpenHermes": (
        {
            "source": "x",
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": "What?"},
                {"from": "gpt", "value": "That."},
            ],
        },
        [SYSTEM, *TALK],
    ),
    "content as parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "at?"}],
                },
                SAY,
            ]
        },
        TALK,
    ),
    "a table's nulls": (
        {
            "messages": [
                {"role": "user", "content": "What?", "name": None, "tool_calls": None},
                SAY,
            ],
            "text": None,
        },
        TALK,
    ),
    "a blank text beside it": ({"text": "", "messages": TALK}, TALK),
    "both spellings in one table": (
        {"messages": [{"role": None, "content": None, "from": "human", "value": "What?"}, SAY]},
        TALK,
    ),
    "prompt and response": ({"prompt": "What?", "response": "That.", "id": "1"}, TALK),
    "prompt and completion": ({"prompt": "What?", "completion": "That."}, TALK),
    "prompt and completion as turns": ({"prompt": [ASK], "completion": [SAY]}, TALK),
    "GSM8K": ({"question": "What?", "answer": "That."}, TALK),
    "OpenOrca": (
        {"id": "niv.1", "system_prompt": "Be brief.", "question": "What?", "response": "That."},
        [SYSTEM, *TALK],
    ),
    "MetaMath": (
        {"query": "What?", "response": "That.", "type": "GSM", "original_question": "What is it?"},
        TALK,
    ),
    "Alpaca": ({"instruction": "What?", "input": "", "output": "That."}, TALK),
    "Alpaca with an input": (
        {"instruction": "Translate.", "input": "Hund", "output": "dog", "text": None},
        [
            {"role": "user", "content": "Translate.\n\nHund"},
            {"role": "assistant", "content": "dog"},
        ],
    ),
    "Dolly": (
        {"instruction": "Who?", "context": "Bea sang.", "response": "Bea.", "category": "qa"},
        [
            {"role": "user", "content": "Who?\n\nBea sang."},
            {"role": "assistant", "content": "Bea."},
        ],
    ),
    "input and output": ({"input": "What?", "output": "That."}, TALK),
    "DPO": ({"prompt": "What?", "chosen": "That.", "rejected": "This."}, TALK),
    "DPO as turns": (
        {"prompt": "What?", "chosen": TALK, "rejected": [ASK, ASK], "score_chosen": 9.0},
        TALK,
    ),
    "DPO as turns, the prompt apart": (
        {"prompt": [SYSTEM, ASK], "chosen": [SAY], "rejected": [SAY]},
        [SYSTEM, *TALK],
    ),
    "chosen alone": ({"chosen": TALK, "rejected": TALK, "source": "x"}, TALK),
    "a system text beside ShareGPT": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "What?"},
                {"from": "gpt", "value": "That."},
            ],
        },
        [SYSTEM, *TALK],
    ),
    "a system text beside messages": (
        {"system_prompt": "Be brief.", "messages": TALK},
        [SYSTEM, *TALK],
    ),
    "a system text that is there": (
        {"system": "Be long.", "messages": [SYSTEM, *TALK]},
        [SYSTEM, *TALK],
    ),
    "a system text beside chosen": (
        {"system": "Be brief.", "prompt": "What?", "chosen": TALK},
        [SYSTEM, *TALK],
    ),
    "a system text that is blank": ({"system": " ", "messages": TALK}, TALK),
    "a question and its context": (
        {"question": "Who?", "context": "Bea sang.", "answer": "Bea."},
        WHO,
    ),
    "a prompt and its input": ({"prompt": "Who?", "input": "Bea sang.", "output": "Bea."}, WHO),
    "an instruction and its question": (
        {"instruction": "Who?", "question": "Bea sang.", "answer": "Bea."},
        WHO,
    ),
    "a page, its question and answer": (
        {"title": "Song", "content": "Bea sang.", "question": "Who?", "answer": "Bea."},
        WHO,
    ),
    "a prompt that has its context": (
        {"prompt": "Who?\n\nBea sang.", "context": "Bea sang.", "response": "Bea."},
        WHO,
    ),
    "turns and a context": (
        {
            "prompt": [SYSTEM, {"role": "user", "content": "Who?"}],
            "context": "Bea sang.",
            "response": "Bea.",
        },
        [SYSTEM, *WHO],
    ),
    "Alpaca with a history": (
        {
            "instruction": "Who?",
            "input": "Bea sang.",
            "output": "Bea.",
            "system": "Be brief.",
            "history": [["What?", "That."]],
        },
        [SYSTEM, *TALK, *WHO],
    ),
    "Alpaca without one": (
        {"instruction": "What?", "input": "", "output": "That.", "history": []},
        TALK,
    ),
    "a history behind the system text": (
        {"prompt": [SYSTEM, ASK], "response": "That.", "history": [["What?", "That."]]},
        [SYSTEM, *TALK, *TALK],
    ),
    "a history of messages": (
        {"prompt": "What?", "response": "That.", "history": TALK},
        [*TALK, *TALK],
    ),
    "DPO as messages": ({"prompt": "What?", "chosen": SAY, "rejected": ASK}, TALK),
    "DPO as messages, the prompt too": ({"prompt": [SYSTEM, ASK], "chosen": SAY}, [SYSTEM, *TALK]),
    "both as messages": ({"prompt": ASK, "chosen": SAY}, TALK),
    "LLaMA-Factory's DPO": (
        {
            "conversations": [{"from": "human", "value": "What?"}],
            "chosen": {"from": "gpt", "value": "That."},
            "rejected": {"from": "gpt", "value": "This."},
        },
        TALK,
    ),
    "a dialogue, chosen as a list": ({"messages": [ASK], "chosen": [SAY], "rejected": [ASK]}, TALK),
    "a dialogue, chosen as a text": (
        {"system_prompt": "Be brief.", "messages": [ASK], "chosen": "That."},
        [SYSTEM, *TALK],
    ),
    "a dialogue, chosen as all of it": ({"messages": [ASK], "chosen": TALK}, TALK),
    "a name beside messages": (
        {"content": "user-123", "document": "a.pdf", "messages": TALK},
        TALK,
    ),
    "names in any case": (
        {"System": "Be brief.", "Instruction": "What?", " OUTPUT ": "That."},
        [SYSTEM, *TALK],
    ),
    "messages as JSON": ({"content": "user-123", "messages": json.dumps(TALK)}, TALK),
    "an answer that is a list": (
        {"instruction": "What?", "output": "[]"},
        [ASK, {"role": "assistant", "content": "[]"}],
    ),
    "DPO as JSON": ({"prompt": json.dumps([ASK]), "chosen": json.dumps(SAY)}, TALK),
    "messages before chosen": ({"messages": TALK, "chosen": [ASK, ASK], "prompt": "x"}, TALK),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name: str) -> None:
    row, expected = CONVERSATIONS[name]
    found = read_row(row, "a.jsonl:1")
    assert found == Conversation(expected, None)
    assert joined(found) == "\n".join(message["content"] for message in expected)


def test_tools_and_calls() -> None:
    """Arguments become objects, which templates write themselves; `tools` may be JSON."""
    turns = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
        {"role": "tool", "content": "3", "name": "f"},
        {"from": "function_call", "value": "{}"},
        {"from": "observation", "value": "4"},
    ]
    expected = [
        ASK,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "3", "name": "f"},
        {"role": "assistant", "content": "{}"},
        {"role": "tool", "content": "4"},
    ]
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert read_row({"messages": turns, "tools": tools}, "") == Conversation(expected, TOOLS)
    assert read_row({"messages": TALK, "tools": "none"}, "") == Conversation(TALK, None)


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
        ({"Text": "a", "id": 1}, "a"),
        ({"text": "a", "Text": "b"}, "a"),
        ({"prompt": '[{"a": 1}]'}, '[{"a": 1}]'),
        ({"prompt": '{"from": "a", "to": "b"}'}, '{"from": "a", "to": "b"}'),
        ({"messages": "[]", "content": "user-123"}, ""),
        ({"text": "", "id": "x"}, ""),
        ({"text": " ", "content": "a"}, "a"),
        ({"content": "a", "question": "b"}, "a"),
        ({"id": "row-1", "text": None}, ""),
        ({"messages": None, "id": "x"}, ""),
        ({"prompt": "a", "response": None}, ""),
        ({"question": None, "answer": "a"}, ""),
        ({"instruction": "a", "input": "", "output": ""}, ""),
    ],
)
def test_texts(row: Any, text: str) -> None:
    assert read_row(row, "") == text


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"id": "row-1", "n": None},
            "an object with the fields id (text), n (null); expected a string, or text or content",
        ),
        ({"instruction": "a", "input": ""}, "instruction (text), input (text)"),
        (
            {"prompt": "a", "response": "b", "history": ["c"]},
            "history[0]: 'c'; expected an object with role and content",
        ),
        ({"id": 1, "body": "a"}, "id (number), body (text)"),
        ({"prompt": "a", "reply": "b"}, "prompt (text), reply (text)"),
        ({"instruction": "a", "input": "b"}, "instruction (text), input (text)"),
        ({"question": "a", "choices": ["b"]}, "choices (list)"),
        (
            {"messages": "hi", "content": "user-123"},
            "a.jsonl:7 messages: a text ('hi'); expected a list of messages, as such or as JSON",
        ),
        ({"messages": "[{'role': 'user', 'content': 'a'}]"}, "write the column with json.dumps"),
        ({"messages": '[{"author": "a"}]'}, "a.jsonl:7 messages: a text"),
        ({"Text": "a", "TEXT": "b"}, "the fields Text (text), TEXT (text)"),
        ({"prompt": "P", "chosen": {"score": 1}}, "prompt (text), chosen (object)"),
        ({"prompt": "P", "response": 42}, "prompt (text), response (number)"),
        ({}, "no fields"),
        ([1, 2], "list ('[1, 2]')"),
        (None, "null"),
        (7, "number"),
        (
            {"messages": ["Hi"]},
            "messages[0]: 'Hi'; expected an object with role and content, or from and value",
        ),
        (
            {"messages": [{"author": "a", "text": "b"}]},
            "messages[0]: an object with the fields author (text), text (text)",
        ),
        (
            {"conversations": [{"from": "narrator", "value": "b"}]},
            "conversations[0] from: 'narrator'; expected one of system",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "a part of type image_url",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0] content: 3"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "a part of type text",
        ),
    ],
)
def test_anything_else_is_refused_with_its_fields(row: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        read_row(row, "a.jsonl:7")
    assert isinstance(caught.value, OddTurn) == any(
        place in says for place in ("messages[0]", "[0] from", "a part of", "history[")
    )
    assert "a.jsonl:7" in str(caught.value) and says in str(caught.value)


def test_a_field_by_its_name() -> None:
    row = {"text": "no", "body": "yes", "turns": TALK, "n": 1, "none": None}
    assert read_row(row, "", "body") == "yes" and read_row(row, "", "turns") == Conversation(
        TALK, None
    )
    assert read_row(row, "", "none") == "" and read_row(row, "", "Body") == "yes"
    assert read_row({"turns": json.dumps(TALK)}, "", "turns") == Conversation(TALK, None)
    assert read_row({"turns": TALK, "system": "Be brief."}, "", "turns") == Conversation(
        [SYSTEM, *TALK], None
    )
    for field in ("n", "absent"):
        with pytest.raises(
            DataError,
            match=(
                rf"n \(number\), none \(null\); expected text, or a dialogue, in the field {field}"
            ),
        ):
            read_row(row, "a", field)
    with pytest.raises(DataError):
        read_row("a string", "a", "body")


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_conversations_are_rendered_and_blank_ones_left_out(tmp_path: Path) -> None:
    silent = {"messages": [{"role": "user", "content": " "}]}
    path = lines(
        tmp_path / "a.jsonl",
        [
            {"messages": TALK},
            silent,
            {"messages": []},
            {"text": " "},
            {"text": " plain "},
            {"text": None},
        ],
    )

    def render(conversation: Conversation) -> Document:
        return Document(
            "".join(f"<{m['role']}>{m['content']}\n" for m in conversation.messages), special=False
        )

    # a dialogue's line break at the end belongs to the format
    found = list(read_documents(path, render=render))
    assert found == [
        Document("<user>What?\n<assistant>That.\n", special=False),
        Document("plain", special=True),
    ]
    assert list(documents(path)) == ["What?\nThat.", "plain"]


ODD = {"conversations": [{"from": "bing", "value": "b"}]}
PICTURE = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    """A role that nobody knows, a part that is no text, a dialogue that the model's template
    refuses: none ends a long run."""

    def render(conversation: Conversation) -> Document:
        if conversation.messages[0]["role"] == "system":
            raise RequestError(
                Problem("messages", "the model's chat template refused them: no system role")
            )
        return Document(joined(conversation))

    rows = [{"text": "ab"}, {"messages": [SYSTEM, *TALK]}, ODD, PICTURE, *[{"text": "cd"}] * 3]
    path = lines(tmp_path / "a.jsonl", rows)
    first, refused, odd, picture, *rest = read_documents(path, render=render)
    assert first == Document("ab") and rest == [Document("cd")] * 3
    assert refused == Problem("a.jsonl:2", "the model's chat template refused them: no system role")
    assert isinstance(odd, Problem) and (odd.where, odd.found) == (
        "a.jsonl:3 conversations[0] from",
        "'bing'",
    )
    assert isinstance(picture, Problem) and picture.found == "a part of type image_url"
    windows = cut_windows(Letters(), read_documents(path, render=render), count=4, length=3)
    assert [token for window in windows.tokens for token in window if token != 1] == [
        *map(ord, "abcdcdcd")
    ]
    assert windows.left_out is not None
    assert windows.left_out.note == f"3 of the first 7 rows were left out; the first: {refused}"
    assert windows.left_out.as_dict() == {"rows": 7, "count": 3, "first": str(refused)}
    assert cut_windows(Letters(), ["abc"], count=1, length=2).left_out is None


def test_most_rows_must_be_of_use(tmp_path: Path) -> None:
    half = lines(tmp_path / "half.jsonl", [ODD, ODD, {"text": "ab"}, {"text": "cd"}])
    assert list(documents(half)) == ["ab", "cd"]
    most = lines(tmp_path / "most.jsonl", [ODD, {"text": "ab"}, ODD])
    for read in (
        lambda: list(documents(most)),
        lambda: cut_windows(Letters(), read_documents(most), count=1, length=9),
    ):
        with pytest.raises(
            DataError,
            match=(
                r"most\.jsonl:1 .*'bing' \(so, or for a like reason, 2 of the first 3 rows\);"
                r" expected one of"
            ),
        ):
            read()
    # Of a long one, not all is read to find out.
    long = lines(tmp_path / "long.jsonl", [ODD] * ENOUGH + [{"neither": "text nor dialogue"}])
    with pytest.raises(DataError, match=f"{ENOUGH} of the first {ENOUGH} rows"):
        list(documents(long))


def test_where_no_row_has_a_text_the_fields_are_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"id": f"row-{i}", "text": None} for i in range(20)])
    with pytest.raises(
        DataError,
        match=(
            r"a\.jsonl:1: an object with the fields id \(text\), text \(null\), and no row with a"
            r" text"
        ),
    ):
        next(documents(path))
    assert list(documents(path, field="id"))[:2] == ["row-0", "row-1"]


class Letters:
    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[Any]:
        return [
            type("Encoding", (), {"ids": [1] * add_special_tokens + [*map(ord, text)]})
            for text in texts
        ]


def test_a_rendered_dialogue_has_its_special_tokens() -> None:
    """And gets none from the tokenizer: a chat would not have two BOS either."""

    windows = cut_windows(Letters(), ["ab", Document("cd", special=False), "e"], count=1, length=7)
    assert windows.tokens == [[1, *map(ord, "ab"), *map(ord, "cd"), 1, ord("e")]]
