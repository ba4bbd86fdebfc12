"""Bodies that are no JSON, or JSON that nobody needs: each way has its code, and no error sends
back more than a few letters of them."""

from __future__ import annotations

import gzip
import json
import time
from typing import Any

import pytest

from quantflow.serve.body import (
    MOST_CONTAINERS,
    MOST_DEPTH,
    MOST_KEYS,
    MOST_MEMBERS,
    MOST_STRINGS,
    MOST_VALUES,
    read,
)
from quantflow.serve.errors import Refused, shortened
from tests.helpers.serving import Running, until

DIGITS = "9" * 4000


class PanicException(BaseException):
    """As what a library written in Rust raises, which is no Exception."""


def emptied(server: Running) -> bool:
    """An answer is there a moment before its request has left."""
    return until(lambda: not server.service.inside)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"prompt": "\xff"}', "invalid_utf8"),
        ('{"prompt": "é"}'.encode("utf-16"), "invalid_utf8"),
        (b"\xed\xa0\x80", "invalid_utf8"),
        (b'{"prompt": ', "invalid_json"),
        (b"'x'", "invalid_json"),
        (b'{"prompt": "x",}', "invalid_json"),
        (b'{"prompt": "a\nb"}', "invalid_json"),
        (nested(MOST_DEPTH + 1).encode(), "json_too_deep"),
        (b'{"a":' * 100_000, "json_too_large"),
        (b'[{"a":' * 500, "json_too_deep"),
        (b'{"n": %b}' % (b"9" * 4301), "number_too_long"),
        (b'{"n": -%b}' % (b"9" * 1_000_000), "number_too_long"),
        (b'{"prompt": "a", "prompt": "b"}', "duplicate_key"),
        (b'{"a": [{"\\u0062": 1, "b": 2}]}', "duplicate_key"),
        (json.dumps({f"k{i}": 0 for i in range(MOST_KEYS + 1)}).encode(), "json_too_large"),
        (b"[%b0]" % (b"[]," * MOST_CONTAINERS), "json_too_large"),
        (b"[%b0]" % (b"0," * (MOST_VALUES + 1)), "json_too_large"),
        (b"[[[%b" % (b'{"a":0},' * (MOST_MEMBERS + 1)), "json_too_large"),
    ],
)
def test_what_is_wrong_with_a_body_has_a_code(server: Running, body: bytes, code: str) -> None:
    for path in ("/tokenize", "/v1/chat/completions"):
        answer = server.post(path, body)
        assert (answer.status, answer.error["type"], answer.error["code"]) == (
            400,
            "invalid_request_error",
            code,
        )
        assert len(answer.error["message"]) < 200


@pytest.mark.parametrize(
    "text",
    [
        nested(MOST_DEPTH),
        "0",
        '""',
        '{"a": {"a": 1}, "b": {"a": 2}}',
        json.dumps("[{:," * 200_000),
        json.dumps('\\"' * 300_000 + "[" * 1000),
        json.dumps(["\\", '"[', '\\"]', "{" * 200]),
        "\ufeff[1]",
        "9" * 4300,
        '"\\ud83e\\udd8a \\\\ud800 NaN"',
        json.dumps({str(i): i for i in range(MOST_KEYS)}),
        json.dumps([0] * 2**20),
    ],
)
def test_what_stands_in_strings_does_not_count(text: str) -> None:
    assert read(text.encode("utf-8", "surrogatepass")) == json.loads(text.removeprefix("\ufeff"))


@pytest.mark.parametrize("closed", [b"]", b"}"])
def test_nothing_is_looked_at_behind_what_was_never_opened(closed: bytes) -> None:
    """Four million closing brackets would be walked one by one."""
    with pytest.raises(Refused) as error:
        read(b"[]" * (MOST_DEPTH + 2) + closed * 1000 + b"[" * 2000)
    assert error.value.code == "invalid_json"
    body = b"[]" * (MOST_DEPTH + 2) + closed * 4_000_000
    begun = time.thread_time()
    with pytest.raises(Refused):
        read(body)
    assert time.thread_time() - begun < 1


def test_strings_are_counted_where_much_else_is() -> None:
    with pytest.raises(Refused, match="strings"):
        read(b'[{"a":' * (MOST_DEPTH + 1) + b'"",' * (2 * MOST_STRINGS))


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "x" * 500])
def test_bodies_that_are_packed_are_refused_as_such(server: Running, encoding: str) -> None:
    answer = server.post("/tokenize", gzip.compress(b'{"prompt": "x"}'), content_encoding=encoding)
    assert (answer.status, answer.error["code"]) == (415, "unsupported_encoding") and len(
        answer.error["message"]
    ) < 200
    assert server.post("/tokenize", {"prompt": "x"}, content_encoding="identity").status == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b'{"prompt": "x", "max_tokens": %d}'),
        ("/v1/completions", b'{"prompt": "x", "seed": %d}'),
        ("/v1/completions", b'{"prompt": "x", "temperature": %d}'),
        ("/v1/completions", b'{"prompt": [%d]}'),
        ("/v1/completions", b'{"prompt": "x", "logit_bias": {"%d": 1}}'),
        ("/v1/completions", b'{"prompt": "x", "%d": 1}'),
        ("/v1/completions", b'{"prompt": "x", "min_tokens": %d}'),
        ("/v1/completions", b'{"prompt": "x", "max_tokens": "%d"}'),
        ("/v1/completions", b'{"prompt": "x", "model": "%d"}'),
        ("/v1/completions", b'{"prompt": "x", "response_format": {"type": "%d"}}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "%d", "content": "x"}]}'),
        (
            "/v1/chat/completions",
            b'{"messages": "x", "tools": [{"type": "function", "function": {"name": "%d"}}]}',
        ),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [{"type": "%d"}]}]}'),
        ("/v1/chat/interactive", b'{"prompt": "x", "session_id": %d}'),
        ("/detokenize", b'{"tokens": [%d]}'),
    ],
)
def test_no_error_echoes_thousands_of_digits(server: Running, path: str, body: bytes) -> None:
    answer = server.post(path, body.replace(b"%d", DIGITS.encode()))
    assert (
        answer.status == 400 and len(answer.body) < 800 and "9" * 81 not in answer.body.decode()
    ), answer


def test_messages_are_shortened_word_by_word() -> None:
    assert shortened("seed: 12; expected less") == "seed: 12; expected less"
    assert (
        shortened("a " + "b" * 81 + " c") == "a " + "b" * 79 + "… c"
        and shortened("b" * 80) == "b" * 80
    )
    assert len(shortened("ab " * 1000)) == 1000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "stream": True}),
        ("/v1/chat/completions", {"messages": "x", "stream": True}),
        ("/v1/chat/interactive", {"prompt": "x"}),
    ],
)
def test_a_library_that_panics_is_an_error_of_the_server(
    server: Running, path: str, body: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(*arguments: Any, **options: Any) -> Any:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(server.service.text, "encode", panic)
    answer = server.post(path, body)
    assert (answer.status, answer.error["code"], answer.error["type"]) == (
        500,
        "internal_error",
        "server_error",
    )
    assert b"unwrap" not in answer.body
    monkeypatch.undo()
    assert server.complete().status == 200 and emptied(server)


def test_a_panic_in_the_engines_thread_is_its_callers(server: Running) -> None:
    def panic(engine: Any) -> None:
        raise PanicException("index out of bounds")

    with pytest.raises(RuntimeError, match="index out of bounds"):
        server.service.llm.call(panic).result(30)
    assert server.get("/health").status == 200


def test_a_grammar_that_panics_ends_its_own_text(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantflow.engine.grammar import Matcher

    class Panics:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def compute_bitmask(self) -> bytes:
            raise PanicException("index out of bounds")

    made = Matcher.__init__

    def make(self: Any, matcher: Any, vocabulary: int) -> None:
        made(self, Panics(matcher), vocabulary)

    monkeypatch.setattr(Matcher, "__init__", make)
    answer = server.chat(response_format={"type": "json_object"})
    assert (answer.status, answer.error["code"]) == (500, "failed")
    monkeypatch.undo()
    assert server.chat(response_format={"type": "json_object"}).status == 200


def test_a_tokenizer_that_cannot_say_what_a_token_says_ends_one_text(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined, calls = type(server.service.text).joined, list[int]()

    def fails(self: Any, tokens: list[int], *, special: bool) -> str:
        from quantflow.errors import ModelError, Problem

        calls.append(0)
        if len(calls) > 6:
            raise ModelError(Problem("tokenizer", "cannot"))
        return joined(self, tokens, special=special)

    monkeypatch.setattr(type(server.service.text), "joined", fails)
    assert server.complete(prompt=[7]).status == 500
    monkeypatch.undo()
    assert server.complete().status == 200 and emptied(server)


LONE = ["\\ud800", "\\udc00", "\\uDFFF\\uD800", "\\ud83e\\ud83e\\udd8a"]


@pytest.mark.parametrize("place", ["user", "chat_template_kwargs", "metadata", "tools", "messages"])
def test_what_is_no_letter_or_no_number_is_refused_wherever_it_stands(
    server: Running, place: str
) -> None:
    """As a key and as a value, whether the parameter would be read or not. RFC 8259 has no NaN;
    UTF-8 has no halves of pairs."""
    body = b'{"messages": "x", "max_tokens": 1, "%b": %b}' if place != "messages" else b'{"%b": %b}'
    cases = [(f'{{"x": {name}}}', "invalid_json") for name in ("NaN", "Infinity", "-Infinity")]
    cases += [
        (template % text, "invalid_utf8")
        for text in LONE
        for template in ('"a%s"', '{"x": "%s"}', '{"%s": "x"}', '[["%sb"]]')
    ]
    for value, code in cases:
        answer = server.post("/v1/chat/completions", body % (place.encode(), value.encode()))
        assert (answer.status, answer.error["code"]) == (400, code), value
        assert answer.error["message"].startswith("body: ")


def test_pairs_are_letters(server: Running) -> None:
    body = (
        b'{"messages": "\\ud83e\\udd8a", "user": "\\uD83E\\uDD8A", "chat_template_kwargs": {"x":'
        b' "\\\\ud800 NaN"}, "max_tokens": 1}'
    )
    assert server.post("/v1/chat/completions", body).status == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "1e999"),
        ("temperature", "-1e999"),
        ("chat_template_kwargs", '{"x": [0.5, 1e999]}'),
        (
            "response_format",
            '{"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 1e999}}}',
        ),
    ],
)
def test_a_number_beyond_all_doubles_is_refused_by_the_name_of_its_parameter(
    server: Running, name: str, value: str
) -> None:
    """It is JSON, and would be infinite."""
    answer = server.post(
        "/v1/chat/completions", f'{{"messages": "x", "max_tokens": 1, "{name}": {value}}}'.encode()
    )
    assert (answer.status, answer.error["param"], answer.error["code"]) == (
        400,
        name,
        "invalid_value",
    )
