"""The terminal chat's end of the wire, against servers that are not there, not ours, or not
well."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from quantflow.errors import QuantFlowError, RequestError, ServerError
from quantflow.serve import client as client_module
from quantflow.serve.client import Client

MODELS = b'{"object": "list", "data": [{"id": "first"}, {"id": "second"}]}'


def http(status: str, body: bytes = b"", kind: str = "application/json", **headers: str) -> bytes:
    """An answer, after which the connection ends."""
    given = {
        "content-type": kind,
        "content-length": str(len(body)),
        "connection": "close",
        **headers,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def events(*said: object, size: int | None = None) -> bytes:
    """A stream that ends in order, or has promised `size` more bytes than come."""
    body = "".join(
        f"data: {text if isinstance(text, str) else json.dumps(text)}\n\n" for text in said
    ).encode()
    length = {} if size is None else {"content-length": str(len(body) + size)}
    return http("200 OK", body, "text/event-stream", **length)


def word(text: str, end: str | None = None) -> dict[str, object]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": end}]}


@contextmanager
def listening(answers: dict[str, bytes]) -> Iterator[str]:
    """A server of fixed answers, by the method that is asked with; "" answers anything, "silent"
    nothing."""
    with socket.create_server(("127.0.0.1", 0)) as door:

        def serve() -> None:
            while True:
                try:
                    connection, _ = door.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    asked = connection.recv(65536).decode("latin-1")
                    if "silent" in answers:
                        stop.wait(5)
                    connection.sendall(answers.get(asked.split(" ")[0], answers.get("", b"")))
                    connection.shutdown(socket.SHUT_WR)
                    # a body that is still on its way would reset the connection
                    while connection.recv(65536):
                        pass

        stop = threading.Event()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{door.getsockname()[1]}"
        finally:
            stop.set()
            door.shutdown(socket.SHUT_RDWR)
            thread.join(5)


PAGE = http("200 OK", b"<html>A router</html>", "text/html; charset=utf-8")


def refusal(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


def wrong(address: str, key: str | None = None) -> QuantFlowError:
    with pytest.raises(QuantFlowError) as caught:
        Client(address, key).model()
    (problem,) = caught.value.problems
    assert problem.where == (address if "://" in address else f"http://{address}").rstrip("/")
    return caught.value


def test_the_first_model() -> None:
    with listening({"GET": http("200 OK", MODELS)}) as address:
        for given in (
            address,
            f"http://{address}",
            f"http://{address}/v1",
            f"http://{address}/v1/",
        ):
            assert Client(given).model() == "first"


@pytest.mark.parametrize(
    ("answer", "said", "kind"),
    [
        (PAGE, "another kind of server", RequestError),
        (
            http("404 Not Found", b"nothing here", "text/plain"),
            "no list of models (404",
            RequestError,
        ),
        (http("200 OK", b"hello", "text/plain"), "its list of models cannot be read", RequestError),
        (http("200 OK", b'{"models": []}'), "its list of models cannot be read", RequestError),
        (http("200 OK", b'{"data": []}'), "it serves no model", ServerError),
        (
            http("401 Unauthorized", refusal("no key")),
            "401: no key. Give a key by --api-key-file or QUANTFLOW_API_KEY",
            RequestError,
        ),
        (http("403 Forbidden", b'{"detail": "not you"}'), "403: not you", RequestError),
        (
            http("307 Moved", location="https://elsewhere/"),
            "'https://elsewhere/': give that address",
            RequestError,
        ),
        (
            http("429 Too Many", refusal("full"), **{"retry-after": "7"}),
            "429: full. Ask again in 7 seconds",
            ServerError,
        ),
        (
            http("502 Bad Gateway", b"<html>" + b"x" * 9999, "text/html"),
            "502: a page of HTML",
            ServerError,
        ),
        (http("500 Error", b'{"error": "out of memory"}'), "500: out of memory", ServerError),
        (b"\x15\x03\x01\x00\x02\x02\x46", "A server with TLS wants https://", ServerError),
        (b"", "does not answer over HTTP", ServerError),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not answer over HTTP", ServerError),
    ],
)
def test_what_answers_is_no_server_to_talk_to(
    answer: bytes, said: str, kind: type[QuantFlowError]
) -> None:
    with listening({"": answer}) as address:
        error = wrong(address)
    assert said in str(error) and type(error) is kind, error


def test_a_key_that_is_wrong() -> None:
    with listening({"": http("401 Unauthorized", refusal("no"))}) as address:
        assert "The key is not one of this server's" in str(wrong(address, "key-of-nobody"))
    with pytest.raises(RequestError, match="an API key of ASCII characters"):
        Client("127.0.0.1:1", "kéy☃")


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    error = wrong(f"127.0.0.1:{port}")
    assert type(error) is ServerError and error.exit_code == 4
    assert "nothing listens there (connection refused)" in str(
        error
    ) and "`quantflow serve DIR`" in str(error)


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "nobody knows that host's name" in str(wrong("http://serverr:23333"))


@pytest.mark.parametrize(
    "address",
    ["http://", "http://[::1", "http://x:99999", "ftp://x", "http://a b", "http://x:port", "://x"],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(RequestError, match="expected http://HOST:PORT"):
        Client(address).model()


def test_tls_at_a_plain_port() -> None:
    with listening({"": http("400 Bad Request")}) as address:
        error = wrong(f"https://{address}")
    assert f"speaks no TLS; expected http://{address}" in str(error) and type(error) is RequestError


def test_a_server_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SILENCE_S", 0.2)
    with listening({"silent": b""}) as address:
        assert "silent for 0.2 seconds" in str(wrong(address))


def test_a_server_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A door whose queue is full drops who knocks, as a firewall does."""
    monkeypatch.setattr(client_module, "CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as door:
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(door.getsockname())
        assert "cannot be reached within 0.3 seconds" in str(
            wrong(f"127.0.0.1:{door.getsockname()[1]}")
        )
        for each in waiting:
            each.close()


def talk(answer: bytes) -> tuple[str, QuantFlowError | None]:
    """What came of an answer, and how it ended."""
    pieces = ""
    with listening({"GET": http("200 OK", MODELS), "POST": answer}) as address:
        try:
            for piece in Client(address).stream(
                [{"role": "user", "content": "Hello"}], {"model": "first"}
            ):
                pieces += piece
        except QuantFlowError as error:
            return pieces, error
    return pieces, None


def test_an_answer_that_breaks_off_is_no_answer() -> None:
    for answer in (events(word("half "), word("of")), events(word("half "), word("of"), size=10)):
        pieces, error = talk(answer)
        assert (
            pieces == "half of"
            and isinstance(error, ServerError)
            and "the answer broke off" in str(error)
        )
    assert "does not answer over HTTP" in str(talk(b"")[1])
    pieces, error = talk(events(word("half"), {"error": {"message": "the engine has stopped"}}))
    assert (
        pieces == "half"
        and isinstance(error, ServerError)
        and "the engine has stopped" in str(error)
    )


def test_an_answer_ends_by_its_reason_or_by_the_end_of_the_stream() -> None:
    for answer in (
        events(word("all of "), word("it", "stop")),
        events(word("all of "), word("it"), "[DONE]"),
    ):
        assert talk(answer) == ("all of it", None)


def test_an_answer_that_is_no_stream() -> None:
    assert isinstance(talk(PAGE)[1], ServerError)
    assert "404: no such model" in str(talk(http("404 Not Found", refusal("no such model")))[1])
