"""The server as software that we did not write sees it: the openai client, OpenAI's specification,
schemathesis, curl."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from quantflow.serve.config import ServerConfig
from quantflow.serve.requests import ChatRequest, CompletionRequest
from tests.helpers.openapi import check, properties, shared
from tests.helpers.serving import LMDEPLOY_BODY, Running, serving

KEY = "key-of-a-user-0001"
HI: list[Any] = [{"role": "user", "content": "What is a table?"}]


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving(
        config=ServerConfig(port=0, keys=(KEY,), names=("demo",), max_queue=0), check=True
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(locked: Running) -> OpenAI:
    return OpenAI(
        base_url=f"{locked.address}/v1",
        api_key=KEY,
        max_retries=0,
        _strict_response_validation=True,
    )


def test_models(client: OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "quantflow"


def test_a_model_whose_name_has_slashes() -> None:
    """As a hub has it. The openai client escapes the slash, curl does not, and both ask for the
    same."""
    name = "org/team/model"
    with serving(config=ServerConfig(port=0, names=(name,)), check=True) as running:
        client = OpenAI(base_url=f"{running.address}/v1", api_key="none", max_retries=0)
        assert client.models.retrieve(name).id == client.models.list().data[0].id == name
        assert running.get(f"/v1/models/{name}").json["id"] == name
        anthropic = running.get(
            "/v1/models/org%2Fteam%2Fmodel", anthropic_version="2023-06-01"
        ).json
        assert (anthropic["id"], anthropic["type"]) == (name, "model")
        for other in ("org", "org/team", "org/team/model/", "/org/team/model"):
            answer = running.get(f"/v1/models/{other}")
            assert (answer.status, answer.error["code"], answer.error["param"]) == (
                404,
                "model_not_found",
                "model",
            )
        nothing = running.get("/v1/models/")
        assert (
            nothing.error["code"] == "unknown_url"
            and "Is /v1/models meant?" in nothing.error["message"]
        )
        assert "/v1/models/{model}" in running.get("/openapi.json").json["paths"]
        assert 'path="/v1/models/{model}",status="200"' in running.get("/metrics").body.decode()
        assert "org/team" not in running.get("/metrics").body.decode(), (
            "a path that a client chose is no label"
        )


def test_chat_and_its_stream(client: OpenAI) -> None:
    arguments: Any = {
        "model": "demo",
        "messages": HI,
        "max_tokens": 12,
        "n": 2,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**arguments)
    assert whole._request_id and whole.usage
    texts = ["", ""]
    usage = None
    for chunk in client.chat.completions.create(
        **arguments, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [c.message.content for c in whole.choices]
    assert usage and usage.completion_tokens == whole.usage.completion_tokens


def test_the_clients_own_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="demo", messages=HI, max_tokens=300, temperature=0, stop=" is"
    ) as stream:
        said = "".join(event.delta for event in stream if event.type == "content.delta")
        assert stream.get_final_completion().choices[0].message.content == said


def test_answers_become_objects(client: OpenAI) -> None:
    class Thing(BaseModel):
        name: str
        kind: Literal["table", "index"]

    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="demo", messages=HI, response_format=Thing, max_tokens=3
        )
    parsed = client.chat.completions.parse(
        model="demo", messages=HI, response_format=Thing, max_tokens=300, seed=1
    )
    assert isinstance(parsed.choices[0].message.parsed, Thing)


def test_completions_and_their_stream(client: OpenAI, locked: Running) -> None:
    arguments: Any = {
        "model": "demo",
        "prompt": ["The table", "An index"],
        "max_tokens": 6,
        "n": 2,
        "best_of": 2,
        "seed": 3,
        "echo": True,
    }
    whole = client.completions.create(**arguments, logprobs=2)
    texts = [""] * 4
    # Not strict: the client's types allow no null for the finish_reason of an unfinished text,
    # which is what OpenAI's own server sends.
    loose = OpenAI(base_url=f"{locked.address}/v1", api_key=KEY, max_retries=0)
    for chunk in loose.completions.create(**arguments, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [c.text for c in whole.choices]


def test_the_asynchronous_client(locked: Running) -> None:
    async def run() -> None:
        async with AsyncOpenAI(
            base_url=f"{locked.address}/v1",
            api_key=KEY,
            max_retries=0,
            _strict_response_validation=True,
        ) as client:
            arguments: Any = {"model": "demo", "messages": HI, "max_tokens": 12, "temperature": 0}
            answers = await asyncio.gather(
                *(client.chat.completions.create(**arguments) for _ in range(6))
            )
            assert len({a.choices[0].message.content for a in answers}) == 1
            stream = await client.chat.completions.create(**arguments, stream=True)
            said = "".join([c.choices[0].delta.content or "" async for c in stream])
            assert said == answers[0].choices[0].message.content
            assert [m.id async for m in client.models.list()] == ["demo"]
            assert (await client.completions.create(model="demo", prompt="x", max_tokens=1)).choices

    asyncio.run(run())


def test_our_own_routes_by_the_client(client: OpenAI) -> None:
    root = client.with_options(base_url=str(client.base_url).removesuffix("v1/"))
    tokens = root.post("/tokenize", body={"prompt": "The table"}, cast_to=object)
    assert root.post("/detokenize", body={"tokens": tokens["tokens"]}, cast_to=object)  # type: ignore[index]
    assert root.get("/health", cast_to=object) == {"status": "ok"}
    turn = root.post(
        "/v1/chat/interactive",
        body={"prompt": "x", "session_id": 1, "request_output_len": 2},
        cast_to=object,
    )
    assert turn["tokens"] == 2  # type: ignore[index]


def test_errors_are_the_clients_exceptions(client: OpenAI, locked: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=HI)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="demo", messages=HI, max_tokens=10**6)
    assert wrong.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.RateLimitError):
        held = client.chat.completions.create(
            model="demo", messages=HI, n=8, max_tokens=900, stream=True
        )
        try:
            client.chat.completions.create(model="demo", messages=HI)
        finally:
            held.close()


# --- OpenAI's specification


@shared
@pytest.mark.shared
def test_answers_are_those_of_the_specification(server: Running) -> None:
    check(server.get("/v1/models").json, "ListModelsResponse")
    check(server.get("/v1/models/demo_model").json, "Model")
    scored = {"n": 3, "logprobs": True, "top_logprobs": 4, "temperature": 1}
    for body in (
        {},
        scored,
        {"response_format": {"type": "json_object"}, "max_tokens": 5},
        LMDEPLOY_BODY,
    ):
        check(server.chat(**body).json, "CreateChatCompletionResponse")
    for event in server.chat(
        n=2, logprobs=True, stream=True, stream_options={"include_usage": True}
    ).events:
        check(event, "CreateChatCompletionStreamResponse")
    echoed = {"echo": True, "logprobs": 3}
    for body in (
        {},
        {"prompt": ["a", "b"], "n": 2},
        echoed,
        {**echoed, "max_tokens": 0},
        {"best_of": 3},
    ):
        check(server.complete(**body).json, "CreateCompletionResponse")
    for answer in (
        server.chat(n=0),
        server.get("/nothing"),
        server.get("/v1/models/x"),
        server.post("/v1/completions", b"{"),
    ):
        check(answer.json, "ErrorResponse")


@shared
@pytest.mark.shared
def test_the_check_can_fail() -> None:
    with pytest.raises(AssertionError):
        check({"object": "list", "data": [{"id": "x"}]}, "ListModelsResponse")


@shared
@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "ours"),
    [("CreateChatCompletionRequest", ChatRequest), ("CreateCompletionRequest", CompletionRequest)],
)
def test_every_parameter_of_the_specification_is_known(name: str, ours: type[BaseModel]) -> None:
    wanted = properties(name)
    assert len(wanted) > 15 and wanted <= set(ours.model_fields)


# --- schemathesis and curl


@pytest.mark.slow
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    """Requests made from our own document, right and wrong ones: no 500, no hang, and every answer
    is one that the document tells of."""
    with serving(config=ServerConfig(port=0, keys=(KEY,), request_timeout_s=30)) as running:
        document = running.get("/openapi.json", authorization=f"Bearer {KEY}").json
        (tmp_path / "openapi.json").write_text(json.dumps(document))
        checks = ",".join(
            (
                "not_a_server_error",
                "status_code_conformance",
                "content_type_conformance",
                "response_schema_conformance",
                "negative_data_rejection",
            )
        )
        options = {
            "url": running.address, "header": f"Authorization: Bearer {KEY}", "checks": checks,
            "max-examples": "10", "seed": "1", "request-timeout": "40",
            "exclude-path": "/admin/drain", "phases": "examples,fuzzing",
            "generation-database": "none",
        }  # fmt: skip
        given = [part for name, value in options.items() for part in (f"--{name}", value)]
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            "openapi.json",
            "--no-color",
            *given,
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-6000:]
        assert running.get("/health").status == 200


def test_curl(server: Running) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    command = [
        curl, "-sS", "--fail-with-body", "-N", f"{server.address}/v1/chat/completions", "-H",
        "Content-Type: application/json", "-d",
    ]  # fmt: skip
    done = subprocess.run(
        [*command, json.dumps({**LMDEPLOY_BODY, "max_tokens": 5})], capture_output=True, timeout=60
    )
    assert done.returncode == 0 and json.loads(done.stdout)["usage"]["completion_tokens"] <= 5
    done = subprocess.run(
        [*command, json.dumps({**LMDEPLOY_BODY, "max_tokens": 5, "stream": True})],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.endswith(b"data: [DONE]\n\n")
