"""Schemas that no finite value satisfies."""

from __future__ import annotations

import functools
import json
import time
import tracemalloc
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from quantflow import LLM, SamplingParams
from quantflow.engine.grammar import Grammar, GrammarKind
from quantflow.engine.schema import endless
from quantflow.errors import RequestError
from tests.helpers.serving import DEMO

SELF = {"$ref": "#"}


def a(schema: Any, **more: Any) -> Any:
    return {"$ref": "#/$defs/a", "$defs": {"a": schema, **more}}


ENDLESS: list[Any] = [
    SELF,
    a({"$ref": "#/$defs/a"}),
    a({"$ref": "#/$defs/b"}, b={"$ref": "#/$defs/a"}),
    {"allOf": [{}, SELF]},
    {"anyOf": [SELF, {"allOf": [SELF]}]},
    {"oneOf": [SELF]},
    {"type": "object", "properties": {"x": SELF}, "required": ["x"]},
    {"type": "array", "minItems": 1, "items": SELF},
    {"type": "array", "minItems": 2, "prefixItems": [True, SELF]},
    {
        "type": ["object", "array"],
        "properties": {"x": SELF},
        "required": ["x"],
        "minItems": 1,
        "items": SELF,
    },
    {"type": "object", "properties": {"x": {"$ref": "#/properties/x"}}},
    {
        "additionalProperties": {"$ref": "#/$defs/a~1b%20"},
        "$defs": {"a/b ": {"$ref": "#/$defs/a~1b%20"}},
    },
    {"anyOf": [{"type": "null"}, {"$ref": "#/anyOf/1"}]},
]


class Tree(BaseModel):
    value: int
    left: Tree | None = None
    more: list[Tree]


class Pair(BaseModel):
    kind: Literal["pair"]
    both: tuple[Pair, int] | None


ENDING: list[Any] = [
    True,
    {},
    5,
    [SELF],
    Tree.model_json_schema(),
    Pair.model_json_schema(),
    {"type": "object", "properties": {"x": SELF}},
    {"type": "object", "properties": {"x": {"type": "array", "items": SELF}}, "required": ["x"]},
    {"type": ["object", "null"], "properties": {"x": SELF}, "required": ["x"]},
    {"properties": {"x": SELF}, "required": ["x"]},  # a number, say
    {"anyOf": [{"type": "string"}, SELF]},
    {"type": "object", "properties": {"x": SELF}, "required": ["x"], "enum": [{}]},
    {"type": "object", "properties": {"$ref": {"type": "string"}}, "required": ["$ref"]},
    {"$ref": "#/nowhere"},
    {"$ref": "http://example.com/#"},
    {"type": "string", "$defs": {"dead": {"$ref": "#/$defs/dead"}}},  # never used
    {
        "type": 5,
        "properties": 7,
        "required": "x",
        "allOf": 3,
        "$ref": 4,
        "items": 9,
        "minItems": "a",
        "prefixItems": 2,
        "patternProperties": 1,
    },
]


@pytest.mark.parametrize("schema", ENDLESS, ids=json.dumps)
def test_what_never_ends_is_told(schema: Any) -> None:
    assert endless(schema)


@pytest.mark.parametrize("schema", ENDING, ids=json.dumps)
def test_what_may_end_is_not(schema: Any) -> None:
    assert endless(schema) is None


def test_the_place() -> None:
    assert (
        endless({"type": "object", "properties": {"x": {"$ref": "#/properties/x"}}})
        == "#/properties/x"
    )
    end = "#/patternProperties/^a/prefixItems/1/oneOf/0/items/additionalProperties"
    inner = {"items": {"additionalProperties": {"allOf": [{}, {"$ref": end}]}}}
    assert endless({"patternProperties": {"^a": {"prefixItems": [{}, {"oneOf": [inner]}]}}}) == end


def test_large_ones_take_no_longer_than_they_are() -> None:
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(20_000)}
    knot = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{j}"} for j in range(150)]} for i in range(150)}
    began = time.thread_time()
    assert endless({"$ref": "#/$defs/a0", "$defs": {**links, "a20000": {"type": "null"}}}) is None
    assert endless({"$ref": "#/$defs/a0", "$defs": knot})
    assert time.thread_time() - began < 10


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"k" * 30_000: {"anyOf": [True] * 6_000}}},
        {"properties": {"k" * 30_000: {"properties": {str(n): {} for n in range(3_000)}}}},
        {"type": ["object"] * 3_000, "properties": {"a": {}}, "required": ["a"] * 7_000},
        {
            "type": ["array", "object"] * 1_500,
            "minItems": 5_000,
            "prefixItems": [0] * 8_000,
            "items": {},
        },
        functools.reduce(lambda inner, _: {"items": inner}, range(5_000), {}),
    ],
    ids=["branches", "siblings", "kinds", "items", "depth"],
)
def test_a_short_one_takes_little_memory(schema: Any) -> None:
    """Of 64 KiB at most, the length that a grammar may have."""
    tracemalloc.start()
    try:
        assert endless(schema) is None
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_they_are_refused_before_anything_is_generated() -> None:
    llm = LLM(DEMO, device="cpu", cache_bytes=2**22)
    for schema in ENDLESS[:4]:
        with pytest.raises(RequestError, match="always needs another of itself"):
            llm.generate(
                "x",
                SamplingParams(
                    max_tokens=5, grammar=Grammar(GrammarKind.json_schema, json.dumps(schema))
                ),
            )
    params = SamplingParams(
        max_tokens=400,
        temperature=1,
        seed=1,
        grammar=Grammar(GrammarKind.json_schema, json.dumps(Tree.model_json_schema())),
    )
    output = llm.generate("x", params)[0]
    assert output.completions[0].finish == "length" or Tree.model_validate_json(output.text)
