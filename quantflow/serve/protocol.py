"""What the messages of the HTTP interface are made of, in whoever's words: objects that take what
is declared and nothing else, and the numbers, names and lists that several of them have.

Every parameter is honoured, or accepted with the values that change nothing and refused by name
with any other (`serve/fields.py` has those), so that the document at /openapi.json says so. What is
null is as if it were not there, known or not.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST_TOOLS = 128

MOST_MESSAGES = 4096

MOST_PROMPTS = 128

MOST_STOPS = 16

MOST_NAME = 256  # letters


def _null_or_nothing(schema: dict[str, Any]) -> None:
    """Also where there is a default, which null stands for."""
    schema["additionalProperties"] = {"type": "null"}
    properties = schema.get("properties", {})
    for name, value in properties.items():
        if value.get("default") is not None:
            about = {key: value[key] for key in ("default", "title", "description") if key in value}
            properties[name] = {
                "anyOf": [{k: v for k, v in value.items() if k not in about}, {"type": "null"}],
                **about,
            }


class Incoming(BaseModel):
    """What clients send: of the types that are declared, and nothing else but nulls."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_null_or_nothing)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict) or None not in data.values():
            return data
        required = {
            field.alias or name for name, field in cls.model_fields.items() if field.is_required()
        }
        return {
            name: value for name, value in data.items() if value is not None or name in required
        }


class Outgoing(BaseModel):
    model_config = ConfigDict(extra="forbid")


Name = Annotated[str, Field(max_length=MOST_NAME)]

Probability = Annotated[float, Field(ge=0, le=1)]

Penalty = Annotated[float, Field(ge=-2, le=2)]

StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=512)]],
    Field(max_length=MOST_STOPS, fail_fast=True),
]

Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024),
]

# fail_fast: a million wrong items are one error, not a million.
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(max_length=2**20, fail_fast=True)
]


def _many(stop: Any) -> Any:
    """`false` is LMDeploy's way of saying that there is none."""
    return None if stop is False else [stop] if isinstance(stop, str) else stop


Stop = Annotated[
    StopStrings | None,
    BeforeValidator(
        _many,
        json_schema_input_type=Annotated[str, Field(min_length=1, max_length=512)]
        | StopStrings
        | Literal[False]
        | None,
    ),
]


def _switch(value: Any) -> Any:
    """As LMDeploy's own tests send it."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


Switch = Annotated[
    bool, BeforeValidator(_switch, json_schema_input_type=bool | Literal["true", "false"])
]

# OpenAI's have 64 letters, Anthropic's twice as many
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]

Variables = Annotated[
    dict[Annotated[str, Field(pattern=r"^[a-zA-Z][a-zA-Z0-9_]{0,63}$")], Any], Field(max_length=64)
]
