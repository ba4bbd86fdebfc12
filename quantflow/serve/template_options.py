"""What a request may tell the model's chat template beside the dialogue: variables, within limits,
and where the text is to go on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantflow.serve.errors import Refused

if TYPE_CHECKING:
    from quantflow.serve.requests import Message, Templated

MOST_CHARACTERS = 65_536  # of all variables together, names included
MOST_VALUES = 4096
DEEPEST = 8
# What the server itself gives a template, or Jinja: a variable of that name would stand in its
# place.
RESERVED = frozenset(
    "messages tools documents add_generation_prompt continue_final_message chat_template tokenize"
    " raise_exception strftime_now namespace dict range lipsum cycler joiner loop self super caller"
    " varargs kwargs additional_special_tokens".split()
)


@dataclass(frozen=True)
class TemplateOptions:
    """What a template is told beside the dialogue, as `Text.render` wants it: what clients name
    themselves, in `variables`, is kept apart from what this server understands."""

    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continued: bool = False


def template_options(
    body: Templated, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
) -> TemplateOptions:
    """tools: as JSON schemas. Takes a while where there are many variables. Raises Refused."""
    named = body.chat_template_kwargs or {}
    _check(named)
    variables: dict[str, Any] = {}
    if body.reasoning_effort is not None:  # whichever of them a template knows
        thinks = body.reasoning_effort != "none"
        variables |= {
            "reasoning_effort": body.reasoning_effort,
            "enable_thinking": thinks,
            "thinking": thinks,
        }
    if body.enable_thinking is not None:
        variables["enable_thinking"] = body.enable_thinking
    variables |= named
    if body.documents:
        variables["documents"] = body.documents
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise _wrong(
                "continue_final_message", "with add_generation_prompt: true; expected one of them"
            )
        if messages[-1].tool_calls:
            raise _wrong(
                "continue_final_message",
                "the last message calls tools; expected one that ends with text",
            )
    return TemplateOptions(
        variables,
        tools or None,
        body.add_generation_prompt is not False,
        bool(body.continue_final_message),
    )


def _check(variables: dict[str, Any]) -> None:
    reserved = sorted(name for name in variables if name in RESERVED or name.endswith("_token"))
    if reserved:
        raise _wrong(
            "chat_template_kwargs",
            f"{reserved[0]!r}; expected none of the names that the server or the tokenizer gives",
        )
    characters = 0
    for values, (depth, value) in enumerate(_walk(variables)):
        characters += len(value) if isinstance(value, str) else 0
        if isinstance(value, float) and not math.isfinite(value):  # 1e999
            raise _wrong(
                "chat_template_kwargs", f"{value}; expected numbers that a double can hold"
            )
        if depth > DEEPEST or values > MOST_VALUES or characters > MOST_CHARACTERS:
            expected = (
                f"at most {DEEPEST} levels, {MOST_VALUES} values and {MOST_CHARACTERS} characters"
            )
            raise _wrong("chat_template_kwargs", f"too deep, or too much; expected {expected}")


def _walk(variables: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """Every name and value, and how deep it lies: no deeper than is needed to see that it is too
    deep."""
    waiting: list[tuple[int, Any]] = [(0, variables)]
    while waiting:
        depth, value = waiting.pop()
        yield depth, value
        inner = (
            [*value, *value.values()]
            if isinstance(value, dict)
            else value
            if isinstance(value, list)
            else []
        )
        if depth <= DEEPEST:
            waiting += [(depth + 1, item) for item in inner]


def _wrong(param: str, words: str) -> Refused:
    return Refused(400, f"{param}: {words}", param=param, code="invalid_value")
