"""/v1/responses: a dialogue in, items out."""

from __future__ import annotations

from quantflow.serve.answer import Job
from quantflow.serve.dialect import Dialect
from quantflow.serve.errors import Refused
from quantflow.serve.responses.dialogue import RENAMED, as_chat, wants_logprobs
from quantflow.serve.responses.protocol import ResponsesRequest
from quantflow.serve.responses.shape import ResponsesShape
from quantflow.serve.service import Service
from quantflow.serve.tools import Reading
from quantflow.serve.wire import Object

RESPONSES: Dialect[ResponsesRequest] = Dialect(as_chat, RENAMED)


def responses_job(service: Service, body: ResponsesRequest) -> Job:
    """Takes a while: tokenises. Raises Refused, RequestError."""
    asked, logprobs = RESPONSES.plan(service, body), wants_logprobs(body)
    if asked.tools and logprobs:
        message = (
            "top_logprobs: with tools, whose calls have no place for them; expected one of them, or"
            " tool_choice: none"
        )
        raise Refused(400, message, param="top_logprobs", code="unsupported_value")
    shape = ResponsesShape(
        service, _told(service, body), Reading(asked.tools, asked.most_calls), logprobs=logprobs
    )
    return Job(
        [asked.prompt], asked.params, shape, bool(body.stream), grammar_from=asked.grammar_from
    )


def _told(service: Service, body: ResponsesRequest) -> Object:
    """What the response object tells of the request: the values that hold."""
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
    return {
        "model": service.name,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "background": False,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": _choice(body),
        "tools": [
            {
                "type": "function",
                "name": t.name,
                "description": t.description,
                "parameters": t.parameters,
                "strict": bool(t.strict),
            }
            for t in body.tools or ()
        ],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
    }


def _choice(body: ResponsesRequest) -> object:
    choice = body.tool_choice
    return (choice or "auto") if isinstance(choice, (str, type(None))) else choice.model_dump()
