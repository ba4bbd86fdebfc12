"""APIs of dialogues in other words than those of chat completions, which are what the rest of the
server reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from quantflow.serve.chat import Plan, count, plan
from quantflow.serve.errors import Refused, renaming
from quantflow.serve.requests import ChatRequest
from quantflow.serve.service import Service

Body = TypeVar("Body", bound=BaseModel)

COUNTED = {"messages": "messages", "tool_calls": "calls in one turn"}


@dataclass(frozen=True)
class Dialect(Generic[Body]):
    """as_chat: the same request in the words of chat completions. renamed: what this API calls
    their parameters and the engine's arguments."""

    as_chat: Callable[[Body], ChatRequest]
    renamed: Mapping[str, str]

    def plan(self, service: Service, body: Body) -> Plan:
        """Takes a while: tokenises. Raises Refused."""
        with renaming(self.renamed):
            result = plan(service, self.as_chat(body))
        return replace(
            result, grammar_from=self.renamed.get(result.grammar_from, result.grammar_from)
        )

    def count(self, service: Service, body: Body) -> int:
        """Tokens that the request would begin with. Takes a while: tokenises. Raises Refused."""
        with renaming(self.renamed):
            return count(service, self.as_chat(body))


def chat_request(parameters: Mapping[str, Any]) -> ChatRequest:
    """What another API's request is in the words of chat completions, which has bounds of its own.
    Raises Refused, which names the parameter of chat completions that is wrong."""
    try:
        return ChatRequest.model_validate(
            {name: value for name, value in parameters.items() if value is not None}
        )
    except ValidationError as error:
        problem = error.errors()[0]
        names, bounds = (
            [str(part) for part in problem["loc"] if isinstance(part, str)],
            problem.get("ctx", {}),
        )
        message = problem["msg"][:1].lower() + problem["msg"][1:]
        if problem["type"] == "too_long" and names[-1] in COUNTED:
            message = (
                f"{bounds['actual_length']} {COUNTED[names[-1]]}; expected at most"
                f" {bounds['max_length']}"
            )
        raise Refused(
            400, f"{names[0]}: {message}", param=names[0], code="invalid_value"
        ) from error
