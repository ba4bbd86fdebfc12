"""The other end of the wire: a dialogue with a server that speaks OpenAI's protocol, ours or
another's."""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx

from quantflow.errors import Problem, QuantFlowError, RequestError, ServerError

CONNECT_S = 10.0
SILENCE_S = 300.0  # a server of ours says something every 15
ADDRESS = "http://HOST:PORT of a server with OpenAI's API"
START = "Start one with `quantflow serve DIR`, or correct the address"


class Client:
    """address: with or without /v1; without a scheme it is http. Raises RequestError where the
    address, the key or the request is wrong, ServerError where nobody answers there, or the server
    fails."""

    def __init__(self, address: str, key: str | None = None) -> None:
        address = address if "://" in address else f"http://{address}"
        self.address = address.rstrip("/").removesuffix("/v1")
        self._keyed = bool(key)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        if not _is_address(address):
            raise RequestError(Problem(address, "no address", ADDRESS))
        try:
            self._http = httpx.Client(
                base_url=self.address,
                headers=headers,
                timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
            )
        except (
            httpx.InvalidURL,
            ValueError,
        ) as error:  # a key that no header can carry, or a proxy's address
            raise RequestError(
                Problem(
                    self.address, f"cannot be asked ({error})", "an API key of ASCII characters"
                )
            ) from error
        self.usage: dict[str, Any] = {}  # of the last answer

    def close(self) -> None:
        self._http.close()

    def model(self) -> str:
        """The name of the model that is served, the first of several."""
        try:
            answer = self._http.get("/v1/models")
        except httpx.HTTPError as error:
            raise self._failed(error) from error
        if answer.status_code == 404 or (answer.status_code == 200 and _is_page(answer)):
            problem = (
                f"no list of models ({answer.status_code}, {_kind(answer)} at /v1/models): another"
                " kind of server"
            )
            raise RequestError(
                Problem(
                    self.address,
                    problem,
                    ADDRESS,
                    "Is it the right port, and a path before /v1 missing?",
                )
            )
        self._check(answer)
        try:
            models = answer.json()["data"]
            if models == []:
                raise ServerError(
                    Problem(self.address, "it serves no model", "one at least in /v1/models")
                )
            return str(models[0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise RequestError(
                Problem(self.address, "its list of models cannot be read", ADDRESS)
            ) from error

    def stream(
        self, messages: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any]
    ) -> Iterator[str]:
        """The pieces of the assistant's answer. parameters: OpenAI's, by their names there."""
        body = {
            **parameters,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self.usage = {}
        begun = whole = False
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                self._check(answer)
                for event in httpx.EventSource(answer):
                    begun = True
                    if event.data == "[DONE]":
                        whole = True
                        continue
                    data = json.loads(event.data)
                    yield from self._piece(data)
                    whole = whole or any(choice.get("finish_reason") for choice in data["choices"])
        except httpx.HTTPError as error:
            raise (self._cut(str(error)) if begun else self._failed(error)) from error
        except (json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
            raise ServerError(
                Problem(self.address, f"an event that cannot be read ({error})", "OpenAI's")
            ) from error
        if not whole:
            raise self._cut("the stream ended before the answer did")

    def _piece(self, event: Any) -> Iterator[str]:
        """Raises TypeError, LookupError and AttributeError for what is no event."""
        error = event.get("error")
        if error:
            raise ServerError(
                Problem(
                    self.address,
                    str(error.get("message", error) if isinstance(error, dict) else error),
                )
            )
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.usage = usage
        for choice in event["choices"]:
            content = choice["delta"].get("content")
            if isinstance(content, str) and content:
                yield content

    def _check(self, answer: httpx.Response) -> None:
        """Raises what a status other than 200 means."""
        status = answer.status_code
        if status == 200:
            return
        problem, hint = f"{status}: {_message(answer)}", ""
        if status == 401:
            hint = (
                "The key is not one of this server's"
                if self._keyed
                else "Give a key by --api-key-file or QUANTFLOW_API_KEY"
            )
        elif answer.is_redirect:
            hint = (
                f"It sends its clients to {answer.headers.get('location', '')[:200]!r}: give that"
                " address"
            )
        elif status == 429:
            hint = f"Ask again in {answer.headers.get('retry-after', 'some')[:10]} seconds"
        raise (ServerError if status >= 500 or status == 429 else RequestError)(
            Problem(self.address, problem, hint=hint)
        )

    def _cut(self, why: str) -> ServerError:
        hint = "Ask again; if nobody answers, the server has ended: its log says why"
        return ServerError(
            Problem(self.address, f"the answer broke off ({why})", "all of it", hint)
        )

    def _failed(self, error: Exception) -> QuantFlowError:
        """The error to raise where no answer began, by what the socket reports."""
        causes = list(_causes(error))
        # Nobody was reached.
        if isinstance(error, httpx.ProxyError):
            return ServerError(
                Problem(
                    self.address,
                    f"the proxy refused ({error})",
                    hint="NO_PROXY names what needs none",
                )
            )
        if any(isinstance(cause, socket.gaierror) for cause in causes):
            return ServerError(
                Problem(
                    self.address,
                    "nobody knows that host's name",
                    ADDRESS,
                    "Correct it, or give its number",
                )
            )
        if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
            return ServerError(
                Problem(
                    self.address,
                    "nothing listens there (connection refused)",
                    "a running server",
                    START,
                )
            )
        # TLS.
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
            hint = "SSL_CERT_FILE names a file with the certificate that signed it"
            return RequestError(
                Problem(self.address, f"its certificate is not trusted ({error})", hint=hint)
            )
        if any(isinstance(cause, ssl.SSLError) for cause in causes):
            plain = self.address.replace("https://", "http://", 1)
            return RequestError(Problem(self.address, "what listens there speaks no TLS", plain))
        # Silence.
        if isinstance(error, httpx.ConnectTimeout):
            hint = "Check the address, and any firewall between"
            return ServerError(
                Problem(
                    self.address,
                    f"cannot be reached within {CONNECT_S:g} seconds",
                    "a running server",
                    hint,
                )
            )
        if isinstance(error, httpx.TimeoutException):
            hint = "It may be stuck: ask its /health, and look at its log"
            return ServerError(
                Problem(self.address, f"silent for {SILENCE_S:g} seconds", "an answer", hint)
            )
        # Something else than a server of this kind.
        if isinstance(error, (httpx.RemoteProtocolError, httpx.ReadError)):
            problem = f"what listens there does not answer over HTTP ({error})"
            hint = "" if self.address.startswith("https") else "A server with TLS wants https://"
            return ServerError(Problem(self.address, problem, ADDRESS, hint))
        return ServerError(
            Problem(
                self.address,
                f"no answer ({error or type(error).__name__})",
                "a running server",
                START,
            )
        )


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and not re.search(r"\s", text)
        )
    except ValueError:  # an IPv6 address that is not closed, a port beyond 65535
        return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _kind(answer: httpx.Response) -> str:
    return answer.headers.get("content-type", "").split(";")[0].strip()[:60] or "nothing"


def _is_page(answer: httpx.Response) -> bool:
    return _kind(answer) in ("text/html", "application/xhtml+xml")


def _message(answer: httpx.Response) -> str:
    """What a server says about a failure: OpenAI's error, or others' ways of it."""
    try:
        body = answer.json()
    except ValueError:
        return (
            "a page of HTML"
            if _is_page(answer)
            else " ".join(answer.text[:200].split()) or answer.reason_phrase
        )
    if isinstance(body, dict):
        body = next((body[name] for name in ("error", "message", "detail") if body.get(name)), body)
        if isinstance(body, dict):
            body = body.get("message", body)
    return str(body)[:1000]
