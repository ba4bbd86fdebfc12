"""Doors that clients of other servers knock on and that are not here: each is refused by name,
whatever was sent to it."""

from __future__ import annotations

from quantflow.serve.errors import Refused

_EMBEDDINGS = (
    "embeddings are not served: a model that generates text has none. Use a server with an"
    " embedding model"
)
_RANKS = "rankings and scores are not served. Use a server with a model that was trained for them"
_SOUND = "audio is not served, neither read nor made"
_IMAGES = "images and videos are not served, neither read nor made"
_STORED = "nothing is stored here. Send what is meant in the request itself"
_AGENTS = (
    "agents do not run here. Use /v1/responses or /v1/chat/completions, and run the tools yourself"
)

ABSENT = {
    **dict.fromkeys(
        ("/v1/embeddings", "/embeddings", "/v2/embed", "/api/embed", "/api/embeddings"), _EMBEDDINGS
    ),
    **dict.fromkeys(
        (
            "/v1/rerank",
            "/v2/rerank",
            "/rerank",
            "/v1/score",
            "/score",
            "/pooling",
            "/classify",
            "/v1/classify",
        ),
        _RANKS,
    ),
    **dict.fromkeys(("/v1/audio", "/v1/realtime"), _SOUND),
    **dict.fromkeys(("/v1/images", "/v1/videos"), _IMAGES),
    **dict.fromkeys(
        ("/v1/files", "/v1/uploads", "/v1/vector_stores", "/v1/containers", "/v1/conversations"),
        _STORED,
    ),
    **dict.fromkeys(("/v1/assistants", "/v1/threads", "/v1/chatkit"), _AGENTS),
    "/v1/batches": (
        "batches are not run. Send their requests one by one, as many at once as --max-queue"
        " allows; the engine batches them"
    ),
    "/v1/evals": "evaluations do not run here. Use quantflow eval",
    "/v1/fine_tuning": "models are not trained here",
    "/v1/messages/batches": (
        "batches are not run. Send their requests one by one; the engine batches them"
    ),
    "/v1/moderations": "moderation is not served: a model that generates text has none",
    "/v1/responses/compact": (
        "dialogues are not compacted. Leave out what the model's context has no room for"
    ),
}
"""By the beginning of the path: why, and what to do."""


def check_present(path: str) -> None:
    """Raises Refused for a door that is not here. 404, as for any path without a route, so that no
    client tries again."""
    parts = path.split("/")
    for length in range(2, min(len(parts), 4) + 1):
        reason = ABSENT.get("/".join(parts[:length]))
        if reason is not None:
            raise Refused(404, f"{path[:100]}: {reason}", code="unsupported_endpoint")
