"""The routes of the Messages API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request

from quantflow.serve.answer import Answer, Job
from quantflow.serve.messages.dialogue import RENAMED
from quantflow.serve.messages.job import input_tokens, messages_job
from quantflow.serve.messages.protocol import Count, CountRequest, ErrorResponse, MessageResponse, MessagesRequest
from quantflow.serve.service import Service
from quantflow.serve.watched import Worked
from quantflow.serve.wire import encode


def add_routes(app: FastAPI, service: Service, answers: Callable[..., dict[str, Any]]) -> None:
    """answers: what the document at /openapi.json says of a route's answers."""
    refusals = (400, 404, 408, 413, 415, 429, 504)

    @app.post("/v1/messages", tags=["generation"], **answers(MessageResponse, events=True, refusals=refusals, error=ErrorResponse))
    async def messages(body: MessagesRequest, request: Request) -> Any:
        """A dialogue in, the assistant's message out, in Anthropic's words."""
        id = request.state.request_id

        @asynccontextmanager
        async def job() -> AsyncIterator[Job]:
            yield await service.prepare(lambda: messages_job(service, body, id))

        return Answer(service, 1, job, RENAMED)

    @app.post("/v1/messages/count_tokens", tags=["text"], **answers(Count, refusals=refusals, error=ErrorResponse))
    async def count(body: CountRequest) -> Any:
        """How many tokens the same request would begin with."""
        return Worked(service, lambda: encode({"input_tokens": input_tokens(service, body)}))
