"""What a request says its answer must be, in any of the words that servers have for it, as the one
grammar that the engine follows.

OpenAI has `response_format`; vLLM `structured_outputs`, and before it `guided_json` and others;
LMDeploy's `regex_schema`, and what SGLang (`regex`, `ebnf`, `json_schema`) and llama.cpp
(`grammar`, `json_schema`) call theirs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quantflow.engine.grammar import MOST_CHARACTERS, Grammar, GrammarKind
from quantflow.serve.body import read_text
from quantflow.serve.errors import Refused, renaming
from quantflow.serve.requests import Constrained, JsonSchema, ResponseFormat, StructuredOutputs

GBNF_RULE = re.compile(r"^[ \t]*+[\w.-]++\s*+::=", re.MULTILINE)


@dataclass(frozen=True)
class Constraint:
    """What a text must be. grammar: None: anything. source: the parameter that it was made of."""

    grammar: Grammar | None = None
    source: str = "response_format"


def constraint(body: Constrained) -> Constraint:
    """Raises Refused for what is none, and for two."""
    sources = {name: getattr(body, name) for name in SOURCES}
    constraints = [
        c
        for name, value in sources.items()
        if value is not None and value != "" and (c := SOURCES[name](value, name)).grammar
    ]
    if len(constraints) > 1:
        names = " and ".join(c.source for c in constraints)
        raise Refused(
            400,
            f"{constraints[1].source}: {names}; expected one of them",
            param=constraints[1].source,
            code="invalid_value",
        )
    return constraints[0] if constraints else Constraint()


def compact(schema: Any, param: str) -> str:
    """A JSON schema as text. Raises Refused."""
    try:
        return json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (RecursionError, ValueError):
        message = f"{param}: a schema with NaN or infinity in it, or nested too deep"
        raise Refused(400, message, param=param, code="invalid_value") from None


def _schema(schema: Any, name: str) -> Constraint:
    """An object, or one as text."""
    if isinstance(schema, str):
        _check_length(len(schema), name)
        schema = read_text(schema, name)
    return _constraint(GrammarKind.json_schema, compact(schema, name), name)


def _object(wanted: bool, name: str) -> Constraint:
    return _schema({"type": "object"}, name) if wanted else Constraint()


def _regex(pattern: str, name: str) -> Constraint:
    return _constraint(GrammarKind.regex, pattern, name)


def _choice(choices: list[str], name: str) -> Constraint:
    _check_length(sum(map(len, choices)) + len(choices), name)
    return _constraint(
        GrammarKind.lark,
        "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choices),
        name,
    )


def _grammar(grammar: str, name: str) -> Constraint:
    """GBNF's rules have a sign of their own."""
    _check_length(len(grammar), name)
    return _constraint(
        GrammarKind.gbnf if GBNF_RULE.search(grammar) else GrammarKind.lark, grammar, name
    )


def _check_length(length: int, name: str) -> None:
    """Raises Refused, before anything takes the time of so many."""
    if length > MOST_CHARACTERS:
        message = f"{name}: {length} characters; expected at most {MOST_CHARACTERS}"
        raise Refused(400, message, param=name, code="invalid_value")


def _constraint(kind: GrammarKind, text: str, name: str) -> Constraint:
    with renaming({"grammar": name}):
        return Constraint(Grammar(kind, text), name)


def _format(form: ResponseFormat, name: str) -> Constraint:
    """The type says where the rest is."""
    places = FORMATS[form.type]
    values = {
        word: value
        for word in ResponseFormat.model_fields
        if word != "type" and (value := getattr(form, word)) is not None
    }
    wrong = [word for word in values if word not in places]
    if wrong or len(values) > 1:
        word = wrong[0] if wrong else list(values)[1]
        message = f"{name}: {word} with type {form.type}" + (
            "" if wrong else f" and {next(iter(values))}"
        )
        raise Refused(
            400, f"{message}; expected {_one_of(places)}", param=name, code="invalid_value"
        )
    if form.type == "text":
        return Constraint()
    if not values and form.type != "json_object":
        raise Refused(
            400,
            f"{name}: no {_one_of(places)} beside its type; expected one",
            param=name,
            code="invalid_value",
        )
    word, value = next(iter(values.items()), ("schema_", {"type": "object"}))
    if isinstance(value, JsonSchema):
        value = {"type": "object"} if value.schema_ is None else value.schema_
    return places[word](value, name)


def _one_of(places: Any) -> str:
    return " or ".join(word.rstrip("_") for word in places) or "none"


def _structured(outputs: StructuredOutputs, name: str) -> Constraint:
    values = {
        kind: value for kind in KINDS if (value := getattr(outputs, kind)) not in (None, False)
    }
    if len(values) > 1:
        message = (
            f"{name}: {' and '.join(kind.rstrip('_') for kind in values)}; expected one of them"
        )
        raise Refused(400, message, param=name, code="invalid_value")
    return next(
        (KINDS[kind](value, f"{name}.{kind.rstrip('_')}") for kind, value in values.items()),
        Constraint(),
    )


Read = Callable[[Any, str], Constraint]

FORMATS: dict[str, dict[str, Read]] = {
    "text": {},
    "json_object": {"schema_": _schema},
    "json_schema": {"json_schema": _schema, "schema_": _schema},
    "regex_schema": {"regex_schema": _regex},
    "regex": {"regex": _regex, "pattern": _regex},
    "grammar": {"grammar": _grammar},
}
"""By the type of a response_format: the names under which what it must be can stand, and how that
is read."""

KINDS: dict[str, Read] = {
    "json_": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _object,
}
"""What vLLM's structured_outputs may hold."""

SOURCES: dict[str, Read] = {
    "response_format": _format, "structured_outputs": _structured, "guided_json": _schema,
    "guided_regex": _regex, "guided_choice": _choice, "guided_grammar": _grammar,
    "json_schema": _schema, "regex": _regex, "ebnf": _grammar, "grammar": _grammar,
}  # fmt: skip
"""The parameters that say what an answer must be."""
