"""The other end of the wire: a dialogue with a server that speaks OpenAI's protocol, ours or another's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx2 as httpx

from quantflow.errors import Problem, RequestError, ResourceError

CONNECT_S = 10.0
SILENCE_S = 300.0  # a server of ours says something every 15


class Client:
    """address: with or without /v1. Raises RequestError for what the server refuses, ResourceError where it cannot be reached or fails."""

    def __init__(self, address: str, key: str | None = None) -> None:
        self.address = address.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=self.address, headers=headers, timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S))
        self.usage: dict[str, Any] = {}  # of the last answer

    def close(self) -> None:
        self._http.close()

    def model(self) -> str:
        """The name of the model that is served, the first of several."""
        try:
            answer = self._http.get("/v1/models")
            self._check(answer)
            return str(answer.json()["data"][0]["id"])
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (ValueError, LookupError, TypeError) as error:
            raise ResourceError(Problem(self.address, "its list of models cannot be read", "a server with OpenAI's API")) from error

    def stream(self, messages: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any]) -> Iterator[str]:
        """The pieces of the assistant's answer. parameters: OpenAI's, by their names there."""
        body = {**parameters, "messages": list(messages), "stream": True, "stream_options": {"include_usage": True}}
        self.usage = {}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                self._check(answer)
                for event in httpx.EventSource(answer):
                    if event.data != "[DONE]":
                        yield from self._piece(json.loads(event.data))
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
            raise ResourceError(Problem(self.address, f"an event that cannot be read ({error})", "OpenAI's")) from error

    def _piece(self, event: Any) -> Iterator[str]:
        """Raises TypeError, LookupError and AttributeError for what is no event."""
        if "error" in event:
            said = event["error"]
            raise ResourceError(Problem(self.address, str(said.get("message", said) if isinstance(said, dict) else said)))
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.usage = usage
        for choice in event["choices"]:
            content = choice["delta"].get("content")
            if isinstance(content, str) and content:
                yield content

    def _check(self, answer: httpx.Response) -> None:
        if answer.status_code == 200:
            return
        try:
            said = str(answer.json()["error"]["message"])
        except (ValueError, LookupError, TypeError):
            said = answer.text[:200]
        hint = "Give a key by --api-key-file or QUANTFLOW_API_KEY" if answer.status_code == 401 else ""
        kind = ResourceError if answer.status_code >= 500 or answer.status_code == 429 else RequestError
        raise kind(Problem(self.address, f"{answer.status_code}: {said}", hint=hint))

    def _unreachable(self, error: Exception) -> ResourceError:
        return ResourceError(
            Problem(self.address, f"no answer ({error or type(error).__name__})", "a running server", "quantflow serve DIR")
        )
