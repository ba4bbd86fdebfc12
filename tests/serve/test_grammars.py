"""What an answer must be, in the words of OpenAI, vLLM, LMDeploy, SGLang and llama.cpp: followed,
or refused by name."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import jsonschema
import pytest

from quantflow.engine import grammar
from quantflow.engine.gbnf import PARTS
from quantflow.engine.grammar import MOST_CHARACTERS, GrammarKind
from quantflow.serve.grammars import constraint
from quantflow.serve.requests import CompletionRequest
from tests.helpers.serving import Running

SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 3, "maximum": 40},
        "kind": {"enum": ["table", None]},
    },
    "required": ["id", "kind"],
    "additionalProperties": False,
}
REGEX = r"[a-f]{2,4}(-[0-9]){2}"
CHOICES = ['é"1\n', "two", "two/three"]
LARK = 'start: "yes" | "no" " way"'
GBNF = 'root ::= answer # the only one\nanswer ::= "yes"\n  | "no" " way"\n'
TREE = {
    "type": "object",
    "properties": {
        "leaf": {"const": 1},
        "more": {"type": "array", "maxItems": 1, "items": {"$ref": "#"}},
    },
    "required": ["leaf"],
    "additionalProperties": False,
}
BACKEND = {"disable_any_whitespace": True, "disable_fallback": False, "backend": "xgrammar"}


def valid(schema: Any) -> Any:
    return lambda text: jsonschema.validate(json.loads(text), schema) is None


def matches(text: str) -> bool:
    return re.fullmatch(REGEX, text) is not None


def among(*texts: str) -> Any:
    return lambda text: text in texts


FOLLOWED: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, valid(SCHEMA)),  # llama.cpp
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, valid(SCHEMA)),
    ({"response_format": {"type": "regex_schema", "regex_schema": REGEX}}, matches),  # LMDeploy
    ({"response_format": {"type": "regex", "pattern": REGEX}}, matches),
    ({"response_format": {"type": "regex", "regex": f"^{REGEX}$"}}, matches),
    ({"response_format": {"type": "grammar", "grammar": GBNF}}, among("yes", "no way")),
    # vLLM
    (
        {
            "guided_json": SCHEMA,
            "guided_decoding_backend": "outlines",
            "guided_whitespace_pattern": None,
        },
        valid(SCHEMA),
    ),
    ({"guided_json": json.dumps(SCHEMA)}, valid(SCHEMA)),
    ({"guided_regex": REGEX}, matches),
    ({"guided_choice": CHOICES}, among(*CHOICES)),
    ({"guided_grammar": LARK}, among("yes", "no way")),
    ({"guided_grammar": GBNF}, among("yes", "no way")),
    ({"guided_grammar": 'start: "a::=b"'}, among("a::=b")),
    ({"structured_outputs": {"json": SCHEMA, **BACKEND}}, valid(SCHEMA)),
    ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, valid(SCHEMA)),
    ({"structured_outputs": {"regex": REGEX}}, matches),
    (
        {"structured_outputs": {"choice": CHOICES}, "response_format": {"type": "text"}},
        among(*CHOICES),
    ),
    ({"structured_outputs": {"grammar": GBNF, "json_object": False}}, among("yes", "no way")),
    ({"regex": REGEX, "ebnf": ""}, matches),  # SGLang
    ({"ebnf": GBNF}, among("yes", "no way")),
    ({"json_schema": json.dumps(SCHEMA)}, valid(SCHEMA)),
    ({"json_schema": SCHEMA}, valid(SCHEMA)),  # llama.cpp
    ({"grammar": GBNF}, among("yes", "no way")),
]


@pytest.mark.parametrize(
    ("given", "right"),
    FOLLOWED,
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_answers_follow_it_in_whatever_words_it_is_given(
    server: Running, given: Any, right: Any
) -> None:
    for route in (server.chat, server.complete):
        answer = route(max_tokens=60, temperature=1.5, seed=7, n=3, **given)
        assert answer.status == 200, answer.body
        for choice in answer.json["choices"]:
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            assert choice["finish_reason"] == "stop" and right(text), text


def test_what_asks_for_nothing_changes_nothing(server: Running) -> None:
    plain = server.chat(seed=1, temperature=1).json["choices"]
    for nothing in (
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False, "json": None, "backend": "auto"}},
        {"guided_json": None, "guided_decoding_backend": "guidance", "regex": "", "grammar": ""},
        {
            "guided_whitespace_pattern": "",
            "structured_outputs": {"structural_tag": None, "whitespace_pattern": None},
        },
        {"response_format": {"type": "text"}},
    ):
        assert server.chat(seed=1, temperature=1, **nothing).json["choices"] == plain
    assert server.chat(structured_outputs={"json_object": True}, max_tokens=1).json["choices"][0][
        "message"
    ]["content"] in ("{", '{"')


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs.regex",
    ),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
    (
        {"structured_outputs": {"disable_additional_properties": True}},
        "structured_outputs.disable_additional_properties",
    ),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"guided_whitespace_pattern": "[ ]?"}, "guided_whitespace_pattern"),
    ({"guided_decoding_backend": "mine"}, "guided_decoding_backend"),
    ({"guided_json": {"$ref": "#"}}, "guided_json"),
    ({"guided_json": {"properties": {"x": {"$ref": "#/properties/x"}}}}, "guided_json"),
    ({"guided_json": "[1"}, "guided_json"),
    ({"guided_json": [1]}, "guided_json"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_regex": r"(a)\1"}, "guided_regex"),
    ({"guided_regex": "a", "ignore_eos": True}, "guided_regex"),
    ({"guided_grammar": "x"}, "guided_grammar"),
    ({"guided_grammar": "root ::= other"}, "guided_grammar"),
    ({"guided_choice": "yes"}, "guided_choice"),
    ({"grammar": "x" * 70_000}, "grammar"),
    ({"response_format": {"type": "regex", "regex": "a", "pattern": "b"}}, "response_format"),
    ({"response_format": {"type": "regex"}}, "response_format"),
    ({"response_format": {"type": "regex", "grammar": "b"}}, "response_format"),
    (
        {"response_format": {"type": "structural_tag", "structures": [], "triggers": []}},
        "response_format",
    ),
    ({"response_format": {"type": "python"}}, "response_format"),
    ({"response_format": {"type": "wizard"}}, "response_format.type"),
]


@pytest.mark.parametrize(
    ("given", "param"),
    REFUSED,
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_what_is_refused(server: Running, given: Any, param: str) -> None:
    for route in (server.chat, server.complete):
        answer = route(**given)
        assert answer.status == 400 and answer.error["param"] == param, answer.body
        assert param in answer.error["message"]


def test_schemas_with_references(server: Running) -> None:
    """One that comes back to itself and reaches nothing is refused; a tree is followed."""
    for schema in (
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}},
    ):
        answer = server.chat(
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        )
        assert answer.status == 400 and "always needs another of itself" in answer.error["message"]
    found = server.chat(guided_json=TREE, max_tokens=300, temperature=1, seed=2, n=4).json[
        "choices"
    ]
    texts = [choice["message"]["content"] for choice in found if choice["finish_reason"] == "stop"]
    assert texts and all(valid(TREE)(text) for text in texts)


@pytest.mark.parametrize(
    "name",
    [
        "guided_grammar",
        "ebnf",
        "grammar",
        "guided_json",
        "json_schema",
        "response_format",
        "structured_outputs",
    ],
)
def test_what_is_too_long_is_refused_at_once(server: Running, name: str) -> None:
    """A text of 4 MB whose quotes, read by an expression that gives back what it took, hold
    everybody up for minutes."""
    text = '"' + '\\"' * 1_000_000
    given = {
        "response_format": {"type": "grammar", "grammar": text},
        "structured_outputs": {"grammar": text},
        "guided_choice": [text],
    }.get(name, text)
    began = time.process_time()
    answer = server.complete(**{name: given})
    assert (
        answer.status == 400
        and answer.error["param"].startswith(name)
        and str(MOST_CHARACTERS) in answer.error["message"]
    )
    assert time.process_time() - began < 15


@pytest.mark.parametrize("part", ['"', '\\"', "\n", " ", "a", "a ", "a\n", "\n ", "[", "[\\]", "#"])
def test_a_grammars_dialect_is_told_in_the_time_of_its_length(part: str) -> None:
    text = '"' * ("\\" in part) + part * (65_000 // len(part))
    began = time.thread_time()
    found = constraint(CompletionRequest(prompt="x", grammar=text)).grammar
    PARTS.sub("", text)
    assert time.thread_time() - began < 1  # a square of it would be a minute's work
    assert found and found.kind == GrammarKind.lark


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (GBNF, "gbnf"),
        ("# first\n\n  root-1\t::= [a]", "gbnf"),
        ('root ::= ["] "::="', "gbnf"),
        (LARK, "lark"),
        ('// as root ::= x\nstart: "a::=b"\n', "lark"),
        ('start: "\\" ::= "', "lark"),
        ("start: /a::=b/", "lark"),
    ],
)
def test_the_dialect_is_told_by_how_its_rules_begin(text: str, kind: str) -> None:
    found = constraint(CompletionRequest(prompt="x", guided_grammar=text)).grammar
    assert found and found.kind == kind


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"type": "object", "type": "array"}', "duplicate_key"),
        ("[" * 200 + "]" * 200, "json_too_deep"),
        ('{"a": ', "invalid_json"),
    ],
)
def test_a_schema_as_text_is_read_as_a_body_is(server: Running, text: str, code: str) -> None:
    for given, param in (
        ({"guided_json": text}, "guided_json"),
        ({"structured_outputs": {"json": text}}, "structured_outputs.json"),
    ):
        answer = server.chat(**given)
        assert (answer.status, answer.error["param"], answer.error["code"]) == (400, param, code)
        assert answer.error["message"].startswith(f"{param}: ")


HOSTILE: list[dict[str, Any]] = [
    {"guided_regex": "(((a{0,300}){0,300}){0,300}b{0,300}){0,300}"},
    {"guided_regex": "(a|b)*a(a|b){4000}"},
    {"guided_choice": [f"word {i}" for i in range(4000)]},
    {"guided_json": {"enum": [f"word {i}" for i in range(4000)]}},
    {
        "guided_json": {
            "allOf": [{"type": "integer", "multipleOf": n} for n in (99991, 99989, 99971, 99961)]
        }
    },
    {"grammar": "root ::= " + "(" * 2000 + '"a"' + ")" * 2000},
    {"grammar": 'root ::= a a a a a a\na ::= [a-z]* | a a | a "x"? a'},
    {"guided_grammar": "start: " + "(" * 2000 + '"a"' + ")*" * 2000},
]


@pytest.mark.parametrize("given", HOSTILE, ids=lambda given: json.dumps(given)[:60])
def test_hostile_ones_are_bounded(server: Running, given: Any) -> None:
    """Followed, refused, or ended as that one text; never for long, and the server lives."""
    answer = server.chat(**given, max_tokens=4)
    assert answer.status in (200, 400) or answer.error["code"] == "failed", answer.body
    assert server.get("/health").status == 200


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "images are"),
        ({"type": "input_image", "image_url": "https://example.com/x.png"}, "images are"),
        ({"type": "image"}, "images are"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "audio is"),
        ({"type": "file", "file": {"file_id": "x"}}, "files are"),
        ({"type": "video_url", "video_url": {"url": "x"}}, "video is"),
    ],
)
def test_what_is_no_text_is_refused_by_name(server: Running, part: Any, words: str) -> None:
    answer = server.chat(
        messages=[{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}]
    )
    assert answer.status == 400 and answer.error["param"] == "messages[0].content[1]"
    assert (
        answer.error["message"]
        == f"messages[0].content[1]: {words} not supported here; expected text"
    )


def test_a_grammar_takes_no_longer_than_it_may(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "MOST_SECONDS", 0.0)
    answer = server.chat(grammar="root ::= " + '"a" ' * 5000)
    assert (answer.status, answer.error["param"]) == (
        400,
        "grammar",
    ) and "to compile" in answer.error["message"]


ENDLESS = ('start: "a" start', 'root ::= "a" root', "start: A start\nA: /a/")
LATER = 'start: "x" /[a-z]/ rest\nrest: "a" rest'  # its beginning can be followed


@pytest.mark.parametrize("given", [*ENDLESS, LATER])
@pytest.mark.parametrize("name", ["grammar", "guided_grammar"])
def test_a_grammar_without_an_end_is_the_clients_error(
    server: Running, name: str, given: str
) -> None:
    """Not the server's, after which clients try again."""
    answer = server.chat(**{name: given}, max_tokens=20)
    assert (answer.status, answer.error["type"], answer.error["param"]) == (
        400,
        "invalid_request_error",
        name,
    )
    assert answer.error["code"] == ("grammar_not_followed" if given == LATER else "invalid_value")
    assert server.chat(max_tokens=2).status == 200


def test_a_grammar_that_fails_late_is_the_clients_error_in_a_stream(server: Running) -> None:
    answer = server.chat(grammar=LATER, max_tokens=20, stream=True)
    error = answer.events[-1]["error"]
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        "grammar_not_followed",
        "grammar",
    )


def test_endless_grammars_that_may_go_on_are_followed(server: Running) -> None:
    """Some of their texts end, or all that is asked of them can be written."""
    for given in ('start: "a" start | "b"', 'root ::= ("a" | "b") root'):
        assert server.chat(grammar=given, max_tokens=5).status == 200
