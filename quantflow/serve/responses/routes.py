"""The routes of the Responses API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from quantflow.serve.answer import Answer, prepared
from quantflow.serve.errors import Refused
from quantflow.serve.responses.dialogue import RENAMED
from quantflow.serve.responses.job import RESPONSES, responses_job
from quantflow.serve.responses.protocol import InputTokens, Response, ResponsesRequest
from quantflow.serve.service import Service
from quantflow.serve.watched import Worked
from quantflow.serve.wire import encode

STORED = (("/{id}", ["GET", "DELETE"]), ("/{id}/cancel", ["POST"]), ("/{id}/input_items", ["GET"]))


def add_routes(app: FastAPI, service: Service, answers: Callable[..., dict[str, Any]]) -> None:
    """answers: what the document at /openapi.json says of a route's answers."""

    @app.post("/v1/responses", tags=["generation"], **answers(Response, events=True))
    async def responses(body: ResponsesRequest) -> Any:
        """A dialogue in, the assistant's items out. Nothing is stored."""

        return Answer(service, 1, prepared(service, lambda: responses_job(service, body)), RENAMED)

    @app.post("/v1/responses/input_tokens", tags=["text"], **answers(InputTokens))
    async def count(body: ResponsesRequest) -> Any:
        """How many tokens the same request would begin with."""
        return Worked(
            service,
            lambda: encode(
                {"object": "response.input_tokens", "input_tokens": RESPONSES.count(service, body)}
            ),
        )

    async def stored(id: str) -> Any:
        message = f"id: {id[:100]!r}: no response is stored here; send the whole dialogue as input"
        raise Refused(404, message, param="id", code="response_not_found")

    for path, methods in STORED:
        app.api_route(f"/v1/responses{path}", methods=methods, include_in_schema=False)(stored)
