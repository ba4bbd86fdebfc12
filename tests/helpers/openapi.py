"""OpenAI's own specification, where it is there, and what it says of a body."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

SPECIFICATION = Path(__file__).parents[3] / "shared" / "openapi" / "openapi.yaml"
shared = pytest.mark.skipif(
    not SPECIFICATION.is_file(), reason="OpenAI's specification is not there"
)


@functools.lru_cache
def specification() -> Any:
    """Its schemas by name."""
    document = yaml.load(SPECIFICATION.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    schemas = json.loads(json.dumps(document["components"]["schemas"], default=str))
    return _nullable(schemas)


def _nullable(schema: Any) -> Any:
    """OpenAPI 3.0's `nullable`, which stands in this 3.1 document, as JSON schema says it."""
    if isinstance(schema, list):
        return [_nullable(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    result = {k: _nullable(v) for k, v in schema.items()}
    if result.pop("nullable", False) is True:
        return {"anyOf": [result, {"type": "null"}]}
    return result


def check(value: Any, name: str) -> None:
    """That a body is of the schema of this name."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": specification()}}
    validator = jsonschema.Draft202012Validator(schema)
    errors = list(validator.iter_errors(value))
    assert not errors, errors[0]


def properties(name: str) -> set[str]:
    """Of a schema, with those of all its parts."""

    def of(schema: Any) -> set[str]:
        if "$ref" in schema:
            return of(specification()[schema["$ref"].rsplit("/", 1)[1]])
        return set(schema.get("properties", ())).union(
            *(of(part) for part in schema.get("allOf", ()))
        )

    return of(specification()[name])
