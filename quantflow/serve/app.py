"""The routes, and the document that describes them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from quantflow import __version__
from quantflow.errors import RequestError, ResourceError
from quantflow.serve import replies
from quantflow.serve.answer import Answer, Job, prepared
from quantflow.serve.body import JsonRoute
from quantflow.serve.chat import chat_job
from quantflow.serve.completion import completion_job, sequences
from quantflow.serve.errors import Refused, asks_anthropic, engine_stopped, refused, response
from quantflow.serve.generate import GENERATE_RENAMED, encoded, generate_job
from quantflow.serve.guard import HEALTH, Guard
from quantflow.serve.interactive import Sessions, turn_job
from quantflow.serve.messages.models import model_info, model_page
from quantflow.serve.messages.routes import add_routes as add_messages
from quantflow.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EncodeRequest,
    GenerateRequest,
    InteractiveRequest,
    TokenizeRequest,
)
from quantflow.serve.responses.routes import add_routes as add_responses
from quantflow.serve.service import Service
from quantflow.serve.tokenize import detokenized, tokenized
from quantflow.serve.unreadable import unreadable
from quantflow.serve.watched import Worked
from quantflow.serve.wire import Json

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGES = {"/": "index.html", "/docs": "docs.html"}  # beside each file of the page under its own name
READS = (400,)
GENERATES = (400, 404, 408, 413, 415, 429, 504)
CLOSE_S = 5.0  # for the engine's thread to end its step
MODEL_PATH = "/v1/models/{model}"  # as it is written where it is counted
# how the openai client says that it adds up a stream's deltas, roles included
HELPER = "x-stainless-helper-method"
CHAT_RENAMED = {"prompt": "messages"}  # what clients call the engine's arguments


def create_app(service: Service) -> ASGIApp:
    """The whole application, its guard included."""
    sessions = Sessions(service)
    app = FastAPI(
        title="QuantFlow",
        version=__version__,
        lifespan=_lifespan(service),
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.router.route_class = JsonRoute
    _models(app, service)
    _generation(app, service)
    _sessions(app, service, sessions)
    add_messages(app, service, _answers)
    add_responses(app, service, _answers)
    _text(app, service)
    _operation(app, service)
    _administration(app, service, sessions)
    static = _pages(app)
    _errors(app, service)
    known = {route.path for route in app.routes if isinstance(route, Route)}

    def count(path: str, status: int) -> None:
        place = path if path in known else MODEL_PATH if path.startswith("/v1/models/") else "other"
        service.metrics.responses.labels(place, status).inc()

    guarded: ASGIApp = Guard(app, service.config, static, count)
    if service.config.origins:  # outside the guard: a browser asks before it sends a key
        guarded = CORSMiddleware(
            guarded,
            allow_origins=service.config.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "request-id", "retry-after"],
        )
    return guarded


def _lifespan(service: Service) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.prepare(lambda: service.llm.close(CLOSE_S))
        service.close()

    return lifespan


def _answers(
    model: Any,
    *,
    events: bool = False,
    refusals: tuple[int, ...] = GENERATES,
    error: Any = replies.ErrorResponse,
) -> dict[str, Any]:
    """The part of the OpenAPI document that says what a route may answer."""
    whole: dict[str, Any] = {"model": model} if model else {}
    if events:
        whole["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    refusal = {"model": error}
    return {
        "response_model": model,
        "responses": {
            200: whole,
            **dict.fromkeys(sorted({*refusals, 401, 403, 421, 500, 503}), refusal),
        },
    }


def _models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["models"], **_answers(replies.ModelList, refusals=READS))
    async def models(request: Request) -> Any:
        """The names that the model answers to; to a client that sends anthropic-version, in
        Anthropic's words."""
        if asks_anthropic(request.scope):
            return Json(model_page(service.cards()))
        return replies.ModelList(data=service.cards())

    # path: names of models have slashes, which are the same to a server whether they are escaped or
    # not
    @app.get(
        MODEL_PATH.replace("}", ":path}"),
        tags=["models"],
        **_answers(replies.ModelCard, refusals=(*READS, 404)),
    )
    async def model(model: str, request: Request) -> Any:
        """What is known of one of them."""
        if not model:
            raise HTTPException(404)
        for card in service.cards():
            if card.id == model:
                return Json(model_info(card)) if asks_anthropic(request.scope) else card
        raise Refused(
            404, f"The model {model[:100]!r} does not exist", param="model", code="model_not_found"
        )


def _generation(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/chat/completions", tags=["generation"], **_answers(replies.ChatCompletion, events=True)
    )
    async def chat(body: ChatRequest, request: Request) -> Any:
        """A dialogue in, the assistant's message out."""
        roles = HELPER not in request.headers
        return Answer(
            service,
            body.n or 1,
            prepared(service, lambda: chat_job(service, body, roles=roles)),
            CHAT_RENAMED,
        )

    @app.post("/v1/completions", tags=["generation"], **_answers(replies.Completion, events=True))
    async def completions(body: CompletionRequest) -> Any:
        """A text in, what follows it out."""
        return Answer(
            service, sequences(body), prepared(service, lambda: completion_job(service, body))
        )

    @app.post("/generate", tags=["generation"], **_answers(replies.GenerateResponse, events=True))
    async def generate(body: GenerateRequest) -> Any:
        """A text or tokens in, what follows them out, in LMDeploy's words."""
        renamed = (
            GENERATE_RENAMED
            if body.input_ids is None
            else {**GENERATE_RENAMED, "prompt": "input_ids"}
        )
        return Answer(service, 1, prepared(service, lambda: generate_job(service, body)), renamed)


def _sessions(app: FastAPI, service: Service, sessions: Sessions) -> None:
    @app.post(
        "/v1/chat/interactive",
        tags=["generation"],
        **_answers(replies.InteractiveResponse, events=True, refusals=(*GENERATES, 409)),
    )
    async def interactive(body: InteractiveRequest, request: Request) -> Any:
        """A turn of a dialogue that the server remembers."""
        owner = request.state.owner
        id = body.session_id if body.session_id >= 0 else sessions.unnamed()
        if body.request_output_len == 0 and body.interactive_mode and not body.cancel:
            message = (
                "request_output_len: 0; expected at least 1, or interactive_mode: false, which ends"
                " the session"
            )
            raise Refused(400, message, param="request_output_len", code="invalid_value")
        if body.cancel or body.request_output_len == 0:
            sessions.end(owner, id)
            return Json(
                {
                    "text": "",
                    "tokens": 0,
                    "input_tokens": 0,
                    "history_tokens": 0,
                    "finish_reason": None,
                }
            )

        @asynccontextmanager
        async def job() -> AsyncIterator[Job]:
            session = sessions.enter(owner, id)
            try:
                yield await service.prepare(lambda: turn_job(service, body, session))
            finally:
                sessions.leave(
                    owner, id, session, keep=body.interactive_mode and body.session_id >= 0
                )

        return Answer(service, 1, job, CHAT_RENAMED)


def _text(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", tags=["text"], **_answers(replies.TokenizeResponse))
    async def tokenize(body: TokenizeRequest) -> Any:
        """The tokens of a text, or of a dialogue up to where the answer begins."""
        return Worked(service, lambda: tokenized(service, body))

    @app.post("/detokenize", tags=["text"], **_answers(replies.DetokenizeResponse))
    async def detokenize(body: DetokenizeRequest) -> Any:
        """The text of tokens, special ones left out."""
        return Worked(service, lambda: detokenized(service, body))

    @app.post("/v1/encode", tags=["text"], **_answers(replies.EncodeResponse))
    async def encode(body: EncodeRequest) -> Any:
        """The tokens of a text, or of each of several, in LMDeploy's words."""
        return Worked(service, lambda: encoded(service, body))


def _operation(app: FastAPI, service: Service) -> None:
    @app.get(
        HEALTH[0],
        tags=["operation"],
        **_answers(replies.Health, refusals=READS)
        | {"responses": {503: {"model": replies.Health}}},
    )
    async def health() -> Any:
        """200 only while the engine makes progress."""
        return Json({"status": service.health}, 200 if service.health == "ok" else 503)

    app.head(HEALTH[0], include_in_schema=False)(health)
    for path in HEALTH[1:]:
        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(health)

    @app.get("/version", tags=["operation"], **_answers(replies.Version, refusals=READS))
    async def version() -> Any:
        return Json({"version": __version__})

    @app.get("/load", tags=["operation"], **_answers(replies.Load, refusals=READS))
    async def load() -> Any:
        """How much there is to do."""
        return Json({"server_load": service.inside})

    @app.get(
        "/metrics",
        tags=["operation"],
        response_class=PlainTextResponse,
        **_answers(None, refusals=READS),
    )
    async def metrics() -> Any:
        """Prometheus' text format."""
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json", include_in_schema=False)
    async def document() -> Any:
        return Json(openapi(app))


def _administration(app: FastAPI, service: Service, sessions: Sessions) -> None:
    """What changes the server needs an admin key."""

    @app.post(
        "/admin/drain",
        tags=["administration"],
        **_answers(replies.Done, refusals=(400, 408, 413, 415)),
    )
    async def drain() -> Any:
        """No new requests; those that run are finished. It lasts until the server is started
        again."""
        service.draining = True
        return Json({"done": f"draining: {service.inside} texts are left"})

    @app.post(
        "/admin/sessions/end",
        tags=["administration"],
        **_answers(replies.Done, refusals=(400, 408, 413, 415)),
    )
    async def end_sessions() -> Any:
        """Ends all sessions."""
        return Json({"done": f"{sessions.clear()} sessions ended"})


def _pages(app: FastAPI) -> list[str]:
    """Serves the web page's files."""
    folder = files("quantflow.serve") / "page"
    places = dict(PAGES)
    for file in folder.iterdir():
        if not file.name.endswith(".html"):
            places[f"/{file.name}"] = file.name
    for path, name in places.items():
        content, kind = (folder / name).read_bytes(), TYPES[name[name.rindex(".") :]]

        def page(content: bytes = content, kind: str = kind) -> Any:
            async def route() -> Any:
                return Response(content, headers={"content-type": kind})

            return route

        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(page())
    return list(places)


def _errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(Refused)
    async def refusal(request: Request, error: Refused) -> Response:
        return response(error, request.scope)

    @app.exception_handler(RequestError)
    async def wrong(request: Request, error: RequestError) -> Response:
        return response(refused(error.problems), request.scope)

    @app.exception_handler(ResourceError)
    async def failed(request: Request, error: ResourceError) -> Response:
        return response(engine_stopped(), request.scope)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return response(unreadable(error), request.scope)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        other = Refused(
            error.status_code, str(error.detail), code="http_error", headers=error.headers
        )
        return response(no_route(app, request, error) or other, request.scope)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        """What happened goes to the server's log, with the request's id, and not to the client."""
        message = f"internal error; the server's log has it under {request.state.request_id}"
        return response(Refused(500, message, code="internal_error"), request.scope)


def no_route(app: FastAPI, request: Request, error: HTTPException) -> Refused | None:
    """What to say where there is nothing at a path, or nothing for the method; None where the error
    is another."""
    path, shown = request.url.path, request.url.path[:100]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{request.method} {shown}: expected {allowed}"
        return Refused(405, message, code="method_not_supported", headers=error.headers)
    if error.status_code != 404:
        return None
    known = {route.path for route in app.routes if isinstance(route, Route)}
    meant = next(
        (
            p
            for p in (f"/v1{path}", path.removeprefix("/v1"), path.rstrip("/"))
            if p in known and p != "/"
        ),
        None,
    )
    hint = (
        f"Is {meant} meant? Look at the client's base URL"
        if meant
        else "GET /openapi.json tells what there is"
    )
    return Refused(404, f"{shown}: nothing is served here. {hint}", code="unknown_url")


def openapi(app: FastAPI) -> dict[str, Any]:
    """The document, without what FastAPI says of errors that this server words otherwise."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        routes=app.routes,
        description="Large language models, quantised, over OpenAI's protocol.",
    )
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}, {}]
    return document
