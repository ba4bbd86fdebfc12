"""The routes of the Messages API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request

from quantflow.serve.answer import Answer, prepared
from quantflow.serve.messages.dialogue import RENAMED
from quantflow.serve.messages.job import MESSAGES, messages_job
from quantflow.serve.messages.protocol import (
    Count,
    CountRequest,
    ErrorResponse,
    MessageResponse,
    MessagesRequest,
)
from quantflow.serve.service import Service
from quantflow.serve.watched import Worked
from quantflow.serve.wire import encode


def add_routes(app: FastAPI, service: Service, answers: Callable[..., dict[str, Any]]) -> None:
    """answers: what the document at /openapi.json says of a route's answers."""

    @app.post(
        "/v1/messages",
        tags=["generation"],
        **answers(MessageResponse, events=True, error=ErrorResponse),
    )
    async def messages(body: MessagesRequest, request: Request) -> Any:
        """A dialogue in, the assistant's message out, in Anthropic's words."""
        id = request.state.request_id

        return Answer(
            service, 1, prepared(service, lambda: messages_job(service, body, id)), RENAMED
        )

    @app.post("/v1/messages/count_tokens", tags=["text"], **answers(Count, error=ErrorResponse))
    async def count(body: CountRequest) -> Any:
        """How many tokens the same request would begin with."""
        return Worked(service, lambda: encode({"input_tokens": MESSAGES.count(service, body)}))
