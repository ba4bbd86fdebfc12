"""What is not served says so, in the words that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from quantflow.serve.absent import ABSENT
from tests.helpers.serving import Running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=2) as found:
        yield found


@pytest.mark.parametrize("path", ABSENT)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_each_door_that_is_not_here_is_refused_by_name(
    server: Running, path: str, method: str
) -> None:
    for place in (path, f"{path}/some/thing"):
        answer = server.send(
            method, place, b"--x\r\n", content_type="multipart/form-data; boundary=x"
        )
        assert answer.status == 404 and answer.error["type"] == "not_found_error"
        assert answer.error["message"].startswith(f"{place}: ")
        if not path.startswith("/v1/messages"):  # Anthropic's errors have neither
            assert (answer.error["code"], answer.error["param"]) == ("unsupported_endpoint", None)


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.embeddings.create(model="x", input="x"),
        lambda c: c.moderations.create(input="x"),
        lambda c: c.audio.transcriptions.create(model="x", file=("x.wav", b"RIFF")),
        lambda c: c.audio.speech.create(model="x", voice="alloy", input="x"),
        lambda c: c.images.generate(prompt="x"),
        lambda c: c.files.list(),
        lambda c: c.files.create(file=("x.jsonl", b"{}"), purpose="batch"),
        lambda c: c.batches.create(
            completion_window="24h", endpoint="/v1/chat/completions", input_file_id="x"
        ),
        lambda c: c.fine_tuning.jobs.list(),
        lambda c: c.vector_stores.list(),
        lambda c: c.conversations.create(),
    ],
)
def test_the_client_raises_at_once(client: OpenAI, server: Running, call: Any) -> None:
    before = server.metric("quantflow_http_responses_total")
    with pytest.raises(openai.NotFoundError) as error:
        call(client)
    assert error.value.code == "unsupported_endpoint"
    # one, and the page of metrics: it is not tried again
    assert server.metric("quantflow_http_responses_total") == before + 2


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("GET", "/v1/engines", "/openapi.json"),
        ("POST", "/v1", "/openapi.json"),
        ("POST", "/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/completions/", "/v1/completions"),
        ("GET", "/v1/health/x", "/openapi.json"),
        ("GET", "//", "/openapi.json"),
        ("GET", "/v1/embeddingsx", "/openapi.json"),
    ],
)
def test_a_path_that_nobody_has_is_an_error_of_openais(
    server: Running, method: str, path: str, meant: str
) -> None:
    answer = server.send(method, path, b"{}")
    assert (answer.status, answer.error["type"], answer.error["code"]) == (
        404,
        "not_found_error",
        "unknown_url",
    )
    assert answer.error["message"].startswith(f"{path}: ") and meant in answer.error["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("PATCH", "/health", "GET"),
    ],
)
def test_so_is_another_method(server: Running, method: str, path: str, allowed: str) -> None:
    answer = server.send(method, path, b"{}")
    assert (answer.status, answer.error["code"]) == (405, "method_not_supported")
    assert (
        allowed in answer.headers["allow"]
        and answer.error["message"] == f"{method} {path}: expected {answer.headers['allow']}"
    )
