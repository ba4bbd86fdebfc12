"""/v1/messages: a dialogue in, the assistant's message out, in Anthropic's words."""

from __future__ import annotations

from dataclasses import replace

from quantflow.serve.answer import Job
from quantflow.serve.dialect import Dialect
from quantflow.serve.messages.dialogue import RENAMED, as_chat
from quantflow.serve.messages.protocol import CountRequest, MessagesRequest
from quantflow.serve.messages.shape import MessageShape
from quantflow.serve.service import Service
from quantflow.serve.tools import Reading

MESSAGES: Dialect[CountRequest] = Dialect(as_chat, RENAMED)


def messages_job(service: Service, body: MessagesRequest, request_id: str) -> Job:
    """Takes a while: tokenises. Raises Refused, RequestError."""
    asked = MESSAGES.plan(service, body)
    # Anthropic's clients ask for what their largest model can say
    room = max(1, service.context - len(asked.prompt))
    params = replace(asked.params, max_tokens=min(body.max_tokens, room))
    reading = Reading(asked.tools, asked.most_calls)
    shape = MessageShape(
        service.name, reading, len(asked.prompt), cut=body.max_tokens > room, request_id=request_id
    )
    return Job([asked.prompt], params, shape, bool(body.stream), grammar_from=asked.grammar_from)
