"""What one request may make the event loop do: every list that comes in has an end, and the first
of its items that is wrong ends the reading, since each error costs as much as many good items."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from quantflow.serve import app  # all that comes in is known with it
from quantflow.serve.body import MOST_KEYS
from quantflow.serve.messages.protocol import MessagesRequest
from quantflow.serve.protocol import Incoming
from quantflow.serve.requests import ChatRequest
from quantflow.serve.responses.protocol import ResponsesRequest

TEXT, ANYTHING = {"type": "str"}, {"type": "any"}
SEQUENCES = ("list", "set", "frozenset", "generator")


def incoming(base: type[Incoming] = Incoming) -> Iterator[type[Incoming]]:
    yield base
    for model in base.__subclasses__():
        yield from incoming(model)


def containers(schema: Any, place: str) -> Iterator[tuple[str, Any]]:
    """All lists and dictionaries of what pydantic made of a model's annotations, wherever they
    stand in unions and validators."""
    if isinstance(schema, dict):
        if schema.get("type") in (*SEQUENCES, "tuple", "dict"):
            yield place, schema
        for name, inner in schema.items():
            # which check nothing
            if name not in ("metadata", "serialization", "json_schema_input_schema"):
                yield from containers(inner, f"{place}.{name}" if name != "schema" else place)
    elif isinstance(schema, (list, tuple)):
        for inner in schema:
            yield from containers(inner, place)


def test_every_list_has_an_end_and_stops_at_what_is_wrong() -> None:
    assert app.create_app
    models = set(incoming())
    found = [
        c
        for m in models
        for c in containers(m.__pydantic_core_schema__, f"{m.__module__}.{m.__name__}")
    ]
    assert len(models) > 50 and len([c for _, c in found if c["type"] == "list"]) > 50
    for place, schema in found:
        if schema["type"] == "dict":  # any value is right, or there are few
            free = (schema.get("keys_schema", TEXT), schema.get("values_schema", ANYTHING)) == (
                TEXT,
                ANYTHING,
            )
            assert free or schema.get("max_length", MOST_KEYS) <= 1024, place
        else:
            assert schema["type"] in SEQUENCES, place
            assert schema.get("max_length") and schema.get("fail_fast") is True, place


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (
            ResponsesRequest,
            {
                "input": "x",
                "tools": [{"type": "function", "name": "f", "allowed_callers": [0] * 100_000}],
            },
        ),
        (ResponsesRequest, {"input": "x", "tools": [{"type": "x" * 9}] * 100_000}),
        (
            ResponsesRequest,
            {
                "input": "x",
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"name": 0}] * 100_000,
                },
            },
        ),
        (
            MessagesRequest,
            {
                "messages": [{"role": "user", "content": "x"}],
                "max_tokens": 1,
                "tools": [0] * 100_000,
            },
        ),
        (ChatRequest, {"messages": "x", "tools": [0] * 100_000}),
        (ChatRequest, {"messages": "x", "documents": [0] * 100_000}),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [0] * 100_000}]}),
    ],
)
def test_wrong_items_are_one_error(model: type[Incoming], body: Any) -> None:
    begun = time.thread_time()
    with pytest.raises(ValidationError) as error:
        model.model_validate(body)
    assert error.value.error_count() <= 2 and time.thread_time() - begun < 1
