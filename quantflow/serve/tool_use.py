"""What a request's tools mean: from them, the choice among them and what the answer must be
otherwise, to the grammar of the answer and how calls are read out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from quantflow.engine.grammar import Grammar, GrammarKind
from quantflow.engine.schema import endless
from quantflow.serve.errors import Refused, renaming
from quantflow.serve.grammars import Constraint
from quantflow.serve.requests import AllowedToolsChoice, Function, ToolChoice
from quantflow.serve.service import Service
from quantflow.serve.tools import MOST_CALLS, Callee, Opening, ToolFormat, lark
from quantflow.serve.wire import Object


@dataclass(frozen=True)
class Choice:
    """mode: whether calls may, must or cannot be made. names: the functions that can be called;
    None: all. one: exactly one call."""

    mode: Literal["auto", "required", "none"] = "auto"
    names: frozenset[str] | None = None
    one: bool = False


@dataclass(frozen=True)
class ToolUse:
    """format: how calls are read out of the answer; None: they are not. functions: what the
    template is given. constraint: what the answer must be. most_calls: those after are dropped."""

    format: ToolFormat | None
    functions: tuple[Object, ...]
    constraint: Constraint
    most_calls: int | None


def choice_of(choice: str | ToolChoice | AllowedToolsChoice | None) -> Choice:
    if isinstance(choice, ToolChoice):
        return Choice("required", frozenset({choice.function.name}), one=True)
    if isinstance(choice, AllowedToolsChoice):
        return Choice(
            choice.allowed_tools.mode,
            frozenset(tool.function.name for tool in choice.allowed_tools.tools),
        )
    return Choice(choice or "auto")  # type: ignore[arg-type]


def tool_use(
    service: Service,
    functions: Sequence[Function],
    choice: Choice,
    *,
    parallel: bool,
    answer: Constraint,
) -> ToolUse:
    """parallel: whether several calls may be made. answer: what the answer must be where it is no
    call. Raises Refused."""
    names = [f.name for f in functions]
    _check(names, choice)
    if not functions or choice.mode == "none":
        return ToolUse(None, (), answer, None)
    format = service.tools
    if format is None:
        message = (
            "tools: this model's dialogue format has no place for them; expected none, or a model"
            " trained to call tools"
        )
        raise Refused(400, message, param="tools", code="unsupported_value")
    shown = tuple(
        {"type": "function", "function": {"parameters": {}, **f.model_dump(exclude_none=True)}}
        for f in functions
    )
    callees = [f for f in functions if choice.names is None or f.name in choice.names]
    one = choice.one or not parallel
    constraint = answer
    if (
        choice.mode == "required"
        or answer.grammar
        or len(callees) < len(functions)
        or any(f.strict for f in callees)
        # What came behind a first call would be generated to be dropped. Without a sign around it,
        # a call ends the text by itself.
        or (one and not format.bare)
    ):
        constraint = _constraint(
            service, format, callees, choice, answer, most=1 if one else MOST_CALLS
        )
    return ToolUse(
        replace(format, functions=frozenset(names)), shown, constraint, 1 if one else None
    )


def _check(names: Sequence[str], choice: Choice) -> None:
    """Raises Refused."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Refused(
            400,
            f"tools: two are called {twice[:80]!r}; expected names of their own",
            param="tools",
            code="invalid_value",
        )
    if not names and (choice.mode == "required" or choice.names is not None):
        raise Refused(
            400,
            "tool_choice: without tools; expected some",
            param="tool_choice",
            code="invalid_value",
        )
    unknown = next((name for name in sorted(choice.names or ()) if name not in names), None)
    if unknown is not None:
        message = (
            f"tool_choice: {unknown[:80]!r} is none of the tools; expected one of"
            f" {', '.join(names)}"
        )
        raise Refused(400, message, param="tool_choice", code="invalid_value")


def _constraint(
    service: Service,
    format: ToolFormat,
    functions: Sequence[Function],
    choice: Choice,
    answer: Constraint,
    *,
    most: int,
) -> Constraint:
    """Where a call must be made, it follows its schema, strict or not. Where it may, that is for
    those that say so: others may have schemas that nothing can follow."""
    must = choice.mode == "required"
    opening = Opening.calls if must else Opening.answer if answer.grammar else Opening.text
    callees = [Callee(f.name, f.parameters if must or f.strict else None) for f in functions]
    try:
        text = lark(format, callees, service.text.special_id(format.begin), opening, most=most)
    except RecursionError as error:
        raise Refused(
            400, "tools: a schema that is nested too deep", param="tools", code="invalid_value"
        ) from error
    by_schema = any(c.parameters for c in callees)
    source = "tools" if by_schema or opening != Opening.answer else answer.source
    with renaming({"grammar": source}):
        inner = answer.grammar if opening == Opening.answer else None
        grammar = replace(inner, around=text) if inner else Grammar(GrammarKind.lark, text)
    for c in callees:  # of those that are short enough for a grammar
        place = endless(c.parameters)
        if place is not None:
            message = (
                f"tools: {c.name}: {place}: no value satisfies it, since it always needs another of"
                " itself"
            )
            raise Refused(400, message, param="tools", code="invalid_value")
    return Constraint(grammar, source)
