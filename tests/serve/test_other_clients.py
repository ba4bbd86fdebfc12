"""Clients that bring much with them, and are tested where they are installed: LiteLLM and
LangChain, over both of OpenAI's APIs."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from quantflow.serve.config import ServerConfig
from tests.helpers.serving import Running, serving, with_tools

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, of each other

SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}},
    "required": ["unit"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {"name": "weather", "description": "The weather", "parameters": SCHEMA}
QUESTION = "What is a table?"
HI: list[Any] = [{"role": "user", "content": QUESTION}]
BOTH = pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])


class Thing(BaseModel):
    """A thing"""

    kind: Literal["table", "index"]


def installed(name: str) -> Any:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(
        with_tools(tmp_path_factory.mktemp("clients") / "model"),
        ServerConfig(port=0, names=("demo",)),
        check=True,
    ) as found:
        yield found


# --- LiteLLM


@pytest.fixture(scope="module")
def litellm() -> Any:
    found = installed("litellm")
    found.suppress_debug_info = True
    return found


@pytest.fixture(scope="module")
def there(litellm: Any, running: Running) -> dict[str, Any]:
    """Where the server is, in LiteLLM's words; after it, so that none is started where LiteLLM is
    not installed."""
    return {"api_base": f"{running.address}/v1", "api_key": "none", "num_retries": 0}


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "openai/responses"])
def test_litellm(litellm: Any, there: dict[str, Any], provider: str) -> None:
    model, asked = f"{provider}/demo", {"messages": HI, "temperature": 0, "max_tokens": 20}
    whole = litellm.completion(model=model, **asked, **there)
    said = whole.choices[0].message.content
    assert (
        said and whole.usage.completion_tokens == 20 and whole.choices[0].finish_reason == "length"
    )
    assert said == "".join(
        c.choices[0].delta.content or ""
        for c in litellm.completion(model=model, stream=True, **asked, **there)
    )
    again = litellm.completion(
        model=model, **{**asked, "messages": [*HI, whole.choices[0].message, *HI]}, **there
    )
    assert again.usage.prompt_tokens > whole.usage.prompt_tokens
    thing = (
        litellm.completion(
            model=model, **asked | {"response_format": Thing, "max_tokens": 300}, **there
        )
        .choices[0]
        .message.content
    )
    assert Thing.model_validate_json(thing)


@pytest.mark.parametrize("model", ["openai/demo", "openai/responses/demo"])
def test_litellms_tools(litellm: Any, there: dict[str, Any], model: str) -> None:
    tools = [{"type": "function", "function": WEATHER}]
    asked = {
        "model": model,
        "tools": tools,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 200,
        **there,
    }
    said = litellm.completion(messages=HI, **asked).choices[0].message
    (call,) = said.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["unit"] in (
        "C",
        "F",
    )
    for message in (said, said.model_dump()):
        messages = [
            *HI,
            message,
            {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "Sunny."},
        ]
        assert (
            litellm.completion(
                messages=messages, **asked | {"tool_choice": "none", "max_tokens": 5}
            )
            .choices[0]
            .message.content
        )
    streamed = litellm.stream_chunk_builder(
        list(litellm.completion(messages=HI, stream=True, **asked))
    )
    assert streamed.choices[0].message.tool_calls[0].function.name == "weather"


def test_litellms_responses(litellm: Any, there: dict[str, Any]) -> None:
    asked: dict[str, Any] = {
        "model": "openai/demo",
        "input": QUESTION,
        "temperature": 0,
        "max_output_tokens": 20,
        **there,
    }
    whole = litellm.responses(**asked)
    assert whole.status == "incomplete" and whole.usage.output_tokens == 20
    kinds = [event.type for event in litellm.responses(**asked, stream=True)]
    assert kinds[0] == "response.created" and "response.output_text.delta" in kinds
    found = litellm.responses(
        **asked
        | {
            "tools": [{"type": "function", **WEATHER}],
            "tool_choice": "required",
            "max_output_tokens": 200,
        }
    )
    assert found.output[0].name == "weather"


def test_litellms_errors(litellm: Any, there: dict[str, Any]) -> None:
    long = [{"role": "user", "content": "word " * 3000}]
    for model in ("openai/demo", "openai/responses/demo"):
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(model=model, messages=long, **there)
    with pytest.raises(litellm.NotFoundError, match="embeddings are not served"):
        litellm.embedding(model="openai/demo", input=["x"], **there)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/other", messages=HI, **there)


# --- LangChain


@pytest.fixture(scope="module")
def langchain() -> Any:
    return installed("langchain_openai")


@pytest.fixture(scope="module")
def chat(langchain: Any, running: Running) -> Any:
    def make(responses: bool, **options: Any) -> Any:
        given = {
            "temperature": 0,
            "max_tokens": 20,
            "max_retries": 0,
            "use_responses_api": responses,
            **options,
        }
        return langchain.ChatOpenAI(
            base_url=f"{running.address}/v1", api_key="none", model="demo", **given
        )

    return make


@BOTH
def test_langchain(chat: Any, responses: bool) -> None:
    model = chat(responses)
    whole = model.invoke([("system", "Be short."), ("user", QUESTION)])
    assert whole.text and whole.usage_metadata["output_tokens"] == 20
    assert (
        "".join(piece.text for piece in model.stream([("system", "Be short."), ("user", QUESTION)]))
        == whole.text
    )
    again = model.invoke(
        [("system", "Be short."), ("user", QUESTION), whole, ("user", "And an index?")]
    )
    assert again.usage_metadata["input_tokens"] > whole.usage_metadata["input_tokens"]


@BOTH
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchains_objects(chat: Any, responses: bool, method: str) -> None:
    model = chat(responses, max_tokens=300)
    for strict in (None, True):
        assert isinstance(
            model.with_structured_output(Thing, method=method, strict=strict).invoke(QUESTION),
            Thing,
        )


@BOTH
def test_langchains_tools(chat: Any, responses: bool) -> None:
    tool = {"type": "function", "function": WEATHER}
    model = chat(responses, max_tokens=200).bind_tools(
        [tool], tool_choice="any", parallel_tool_calls=False
    )
    whole, streamed = model.invoke(QUESTION), None
    for piece in model.stream(QUESTION):
        streamed = piece if streamed is None else streamed + piece
    for said in (whole, streamed):
        (call,) = said.tool_calls
        assert call["name"] == "weather" and call["args"]["unit"] in ("C", "F")
        result = importlib.import_module("langchain_core.messages").ToolMessage(
            "Sunny.", tool_call_id=call["id"]
        )
        assert (
            chat(responses)
            .bind_tools([tool], tool_choice="none")
            .invoke([("user", QUESTION), said, result])
            .text
        )


@BOTH
def test_langchains_errors(chat: Any, responses: bool) -> None:
    exceptions = importlib.import_module("langchain_core.exceptions")
    if hasattr(exceptions, "ContextOverflowError"):
        with pytest.raises(exceptions.ContextOverflowError):
            chat(responses).invoke("word " * 3000)
