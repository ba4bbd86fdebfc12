"""Keys, limits, headers, and what a page of another site can do: nothing."""

from __future__ import annotations

import hmac
import json
import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from quantflow.errors import UserError
from quantflow.serve import connection as connections
from quantflow.serve import guard
from quantflow.serve.app import create_app
from quantflow.serve.config import ServerConfig, keys
from quantflow.serve.connection import Connection
from quantflow.serve.guard import MOST_HEADER_BYTES
from tests.helpers.serving import Running, idle, serving, until
from tests.serve.test_lifecycle import begin, connect, started

KEY, OTHER, ADMIN = "key-of-a-user-0001", "key-of-a-user-0002", "key-of-an-admin-01"
BEARER = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving(
        config=ServerConfig(port=0, keys=(KEY, OTHER), admin_keys=(ADMIN,), max_body=100_000)
    ) as running:
        yield running


def routes(running: Running) -> list[tuple[str, str]]:
    guarded: Any = create_app(running.service)
    return [
        (method, route.path.replace("{model:path}", "x"))
        for route in guarded.app.routes
        for method in route.methods
    ]


def test_every_route_but_the_page_and_health_needs_a_key(locked: Running) -> None:
    found = routes(locked)
    assert {
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/admin/drain"),
    } <= set(found)
    open_paths = {path for method, path in found if locked.send(method, path).status != 401}
    static = {path for path in open_paths if path in ("/", "/docs") or "." in path}
    assert (
        open_paths - static == {"/health", "/ping", "/v1/health"} and "/openapi.json" not in static
    )
    assert locked.get("/nothing").status == 401  # nor can it be found out what there is


@pytest.mark.parametrize(
    "header",
    [
        "",
        KEY,
        "Bearer",
        "Bearer ",
        f"Basic {KEY}",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}x",
        "Bearer " + "x" * 5000,
        "Bearer \xff",
        f"Bearer {ADMIN[:-1]}",
    ],
)
def test_what_is_no_key(locked: Running, header: str) -> None:
    answer = locked.get("/v1/models", authorization=header)
    assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.error["code"] == "invalid_api_key" and KEY not in str(answer)


def test_any_key_opens(locked: Running) -> None:
    for key in (KEY, OTHER, ADMIN):
        assert locked.get("/v1/models", authorization=f"bearer {key}").status == 200


def test_every_key_is_compared_in_constant_time(
    locked: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, seen = hmac.compare_digest, list[tuple[int, int]]()
    monkeypatch.setattr(
        hmac, "compare_digest", lambda a, b: [seen.append((len(a), len(b))), compare(a, b)][1]
    )  # type: ignore
    for key in (KEY, OTHER, ADMIN, "x", KEY[:-1] + "y"):
        seen.clear()
        locked.get("/v1/models", authorization=f"Bearer {key}")
        assert seen == [(32, 32)] * 3  # digests, of one length, and every one whichever fits


def test_only_an_admin_administers(locked: Running) -> None:
    assert locked.post("/admin/sessions/end", {}, **BEARER).status == 401
    assert locked.post("/admin/sessions/end", {}, authorization=f"Bearer {ADMIN}").json == {
        "done": "0 sessions ended"
    }


def test_without_an_admin_key_nothing_is_administered(server: Running) -> None:
    answer = server.post("/admin/drain", {})
    assert (answer.status, answer.error["code"]) == (403, "no_admin_key")
    assert server.get("/health").status == 200


def test_keys_are_read_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\n  {OTHER}  \n")
    assert keys(file, "X", {}) == (KEY, OTHER)
    assert keys(None, "X", {"X": f"{KEY},{OTHER}"}) == (KEY, OTHER)
    assert keys(None, "X", {}) == ()
    for content, said in (("", "no key"), ("short", "short"), ("schlüssel-schlüssel", "ASCII")):
        file.write_text(content)
        with pytest.raises(UserError, match=said):
            keys(file, "X", {})
    with pytest.raises(UserError, match="cannot be read"):
        keys(tmp_path / "none", "X", {})


def test_a_page_of_another_site_cannot_use_the_server(server: Running) -> None:
    """A browser sends such requests without asking: text/plain needs no preflight, and a name of
    the page's own may point to 127.0.0.1."""
    plain = server.post("/v1/completions", {"prompt": "x"}, **{"content-type": "text/plain"})
    assert (plain.status, plain.error["code"]) == (415, "unsupported_media_type")
    rebound = server.get("/v1/models", host="evil.example:80")
    assert (rebound.status, rebound.error["code"]) == (421, "unknown_host")
    for host in ("localhost", "127.0.0.1:23333", "[::1]:80", "LOCALHOST"):
        assert server.get("/v1/models", host=host).status == 200
    asked = server.send(
        "OPTIONS",
        "/v1/completions",
        origin="http://evil.example",
        access_control_request_method="POST",
    )
    assert asked.status in (401, 405) and not any(
        name.startswith("access-control") for name in asked.headers
    )
    assert (
        "access-control-allow-origin"
        not in server.get("/v1/models", origin="http://evil.example").headers
    )


def test_another_site_that_was_allowed() -> None:
    with serving(
        config=ServerConfig(port=0, keys=(KEY,), origins=("https://chat.example",))
    ) as running:
        asked = running.send(
            "OPTIONS",
            "/v1/completions",
            origin="https://chat.example",
            access_control_request_method="POST",
        )
        assert (
            asked.status == 200
            and asked.headers["access-control-allow-origin"] == "https://chat.example"
        )
        assert (
            running.send(
                "OPTIONS",
                "/v1/models",
                origin="https://evil.example",
                access_control_request_method="GET",
            ).status
            == 400
        )
        answer = running.get("/v1/models", origin="https://chat.example", **BEARER)
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        refused = running.get("/v1/models", origin="https://chat.example")
        assert (
            refused.status == 401
            and refused.headers["access-control-allow-origin"] == "https://chat.example"
        )
        # a key is asked for: any name will do
        assert running.get("/v1/models", host="model.example", **BEARER).status == 200


def test_every_answer_carries_the_headers(server: Running) -> None:
    for path in ("/", "/health", "/v1/models", "/nothing", "/metrics"):
        headers = server.get(path).headers
        assert (
            "default-src 'none'" in headers["content-security-policy"]
            and "unsafe" not in headers["content-security-policy"]
        )
        assert (
            headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        )
        assert headers["x-request-id"].startswith("req-") and "server" not in headers


def test_bodies_that_are_too_large(locked: Running) -> None:
    answer = locked.post("/v1/completions", {"prompt": "x" * 100_000}, **BEARER)
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    huge = locked.send("POST", "/v1/completions", b"x", content_length="9" * 30, **BEARER)
    assert huge.status in (400, 413)


def test_bodies_whose_length_is_not_told(locked: Running) -> None:
    """The answer is there for whoever sends all before reading any of it."""
    with locked.socket() as connection:
        lines = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type:"
            f" application/json\r\nauthorization: Bearer {KEY}\r\n"
        )
        connection.sendall(f"{lines}transfer-encoding: chunked\r\n\r\n".encode())
        for _ in range(1000):
            connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert all_of(connection).startswith(b"HTTP/1.1 413 ")


def test_bodies_that_are_too_much_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many connections send a part of one: memory is bounded."""
    monkeypatch.setattr(guard, "MOST_BODIES", 2)
    with serving(config=ServerConfig(port=0, max_body=10_000)) as running:
        held = waiting(running, *[POST.replace(b"999", b"9999") + b" " * 9000] * 2)
        answers = list[int]()

        def refused() -> bool:
            answers.append(running.complete(user="x" * 3000, max_tokens=1).status)
            return answers[-1] == 503

        assert until(refused)
        answer = running.complete(user="x" * 3000, max_tokens=1)
        assert (answer.error["code"], answer.headers["retry-after"]) == ("too_many_bytes", "1")
        # there is room for small ones
        assert running.complete(max_tokens=1).status == 200 and running.get("/health").status == 200
        for connection in held:
            connection.close()
        assert until(lambda: running.complete(user="x" * 3000, max_tokens=1).status == 200)


def all_of(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def talk(running: Running, data: bytes) -> bytes:
    """The whole answer to some bytes."""
    with running.socket() as connection:
        connection.sendall(data)
        return all_of(connection)


def test_headers_that_are_too_large(server: Running) -> None:
    lines = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    assert (
        b" 431 "
        in talk(server, lines + b"x-filler: " + b"x" * MOST_HEADER_BYTES + b"\r\n\r\n").split(
            b"\r\n"
        )[0]
    )
    endless = talk(server, lines + b"x-filler: " + b"x" * 64 * MOST_HEADER_BYTES)  # they never end
    assert endless.startswith(b"HTTP/1.1 431 ") and b"headers_too_large" in endless
    many = b"".join(b"x-%d: y\r\n" % i for i in range(5000))
    assert b" 431 " in talk(server, lines + many + b"\r\n").split(b"\r\n")[0]


def test_headers_behind_a_running_answer_are_limited_too(server: Running) -> None:
    body = b'{"prompt":"x","max_tokens":800,"ignore_eos":true,"stream":true}'
    first = (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type:"
        b" application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    )
    with server.socket() as connection:
        connection.sendall(first + body)
        assert connection.recv(64)
        end = time.monotonic() + 50
        with pytest.raises(ConnectionError):
            while time.monotonic() < end:
                connection.sendall(b"GET / HTTP/1.1\r\nx: " + b"y" * 10_000)
                time.sleep(0.005)


CHUNKED = (
    b" HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding:"
    b" chunked\r\n\r\n"
)


@pytest.mark.parametrize(
    ("lines", "more", "status"),
    [
        (b"GET /health" + CHUNKED + b"0\r\n", b"X:\r\n", b"200"),
        (b"GET /health" + CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n", b"200"),
        (b"POST /tokenize" + CHUNKED + b"0\r\n", b"X:\r\n", b"401"),
        (
            b"POST /tokenize"
            + CHUNKED.replace(b"\r\n", b"\r\nx-api-key: %s\r\n" % KEY.encode(), 1)
            + b"0\r\n",
            b"X:\r\n",
            b"431",
        ),
        (
            b"POST /tokenize"
            + CHUNKED.replace(b"\r\n", b"\r\nx-api-key: %s\r\n" % KEY.encode(), 1)
            + b"1;",
            b"extension",
            b"431",
        ),
        (b"POST /tokenize" + CHUNKED + b"0;", b"extension", b"401"),
    ],
)
def test_trailers_without_end_are_neither_kept_nor_read(
    locked: Running, monkeypatch: pytest.MonkeyPatch, lines: bytes, more: bytes, status: bytes
) -> None:
    monkeypatch.setattr(connections, "LINGER_S", 0.5)
    seen, made = list[Connection](), Connection.connection_made

    def noted(protocol: Connection, transport: Any) -> None:
        seen.append(protocol)
        made(protocol, transport)

    monkeypatch.setattr(Connection, "connection_made", noted)
    with locked.socket() as connection:
        connection.sendall(lines)
        if status != b"431":  # the answer to the others is there before the trailers are
            assert connection.recv(1, socket.MSG_PEEK)
        with suppress(OSError):  # it may be closed before all is sent
            for _ in range(20):
                connection.sendall(more * (2**20 // len(more) // 16))
        assert until(lambda: bool(seen) and seen[0].parting)
        answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert len(seen) == 1 and len(seen[0].headers) <= 4
    assert locked.get("/health").status == 200


def test_a_trailer_is_no_header(locked: Running) -> None:
    given = b'POST /tokenize%s10\r\n{"prompt":"a b"}\r\n0\r\n' % CHUNKED
    with locked.socket() as connection:
        connection.sendall(given + b"x-api-key: %s\r\n\r\n" % KEY.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")
        # and it is kept
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert b"HTTP/1.1 200 " in all_of(connection)


def test_a_body_in_very_small_chunks_is_a_body(locked: Running) -> None:
    lines = CHUNKED.replace(
        b"\r\n", b"\r\nconnection: close\r\nx-api-key: %s\r\n" % KEY.encode(), 1
    )
    body = json.dumps({"prompt": "a " * 10_000}).encode()
    with locked.socket() as connection:  # of chunks of one byte a sixth is body
        connection.sendall(b"POST /tokenize" + lines)
        for start in range(0, len(body), 1000):
            connection.sendall(
                b"".join(b"1\r\n%c\r\n" % byte for byte in body[start : start + 1000])
            )
        connection.sendall(b"0\r\nx-checksum: 5\r\n\r\n")
        assert all_of(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("length", [1, 70_000])
def test_headers_after_a_refused_body_are_limited(locked: Running, length: int) -> None:
    """The body has come to its end after the answer: what follows is another request's."""
    with locked.socket() as connection:
        lines = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(lines + b"content-length: %d\r\n\r\n" % length)
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")
        connection.sendall(b"x" * length)
        time.sleep(0.1)
        with suppress(OSError):
            for _ in range(5):
                connection.sendall(b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 10_000)
                time.sleep(0.02)
        assert b"HTTP/1.1 431 " in all_of(connection)


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /%ff%00 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"GET \xff HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        (
            b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ntransfer-encoding:"
            b" chunked\r\nconnection: close\r\n\r\n"
        ),
    ],
)
def test_what_is_no_http(server: Running, data: bytes) -> None:
    answer = talk(server, data)
    assert answer.startswith(b"HTTP/1.1 4") and b'{"error":' in answer
    assert server.get("/health").status == 200


def test_slow_headers_and_bodies_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADERS_S", 0.3)
    monkeypatch.setattr(guard, "READ_S", 0.3)
    with serving() as running:
        for data in (
            b"",
            b"GET / HT",
            (
                b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type:"
                b" application/json\r\ncontent-length: 9\r\n\r\n{"
            ),
        ):
            with running.socket() as connection:
                connection.settimeout(15)  # less than both were
                connection.sendall(data)
                assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
        with running.socket() as connection:  # a second request on a connection that was kept
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                answer += connection.recv(4096)
            connection.sendall(b"GET /hea")
            assert b" 408 " in connection.recv(4096)


def test_a_body_that_drips_has_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "READ_S", 0.6)
    with serving() as running, running.socket() as connection:
        lines = (
            b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type:"
            b" application/json\r\ncontent-length: 999\r\n\r\n"
        )
        connection.sendall(lines)
        began = time.monotonic()
        connection.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() - began < 25:  # less than it was
            connection.sendall(b"x")
            try:
                answer = connection.recv(4096)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_the_rest_of_a_refused_body_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADERS_S", 0.3)
    with serving() as running, running.socket() as connection:
        connection.sendall(
            b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type:"
            b" text/plain\r\ncontent-length: 999\r\n\r\nx"
        )
        connection.settimeout(15)  # less than it was
        assert all_of(connection).startswith(b"HTTP/1.1 415 ")


def test_an_offer_to_change_the_protocol_is_passed_over(server: Running) -> None:
    """As Java's HttpClient and `curl --http2` make it."""
    offer = {
        "connection": "Upgrade, HTTP2-Settings",
        "upgrade": "h2c",
        "http2-settings": "AAMAAABkAAQAoAAAAAIAAAAA",
    }
    answer = server.post("/tokenize", {"prompt": "The table"}, **offer)
    assert answer.status == 200 and answer.json["count"] > 1


def test_probes_may_ask_for_the_head_alone(server: Running) -> None:
    for path in ("/health", "/", "/docs"):
        answer = server.send("HEAD", path)
        assert answer.status == 200 and answer.body == b""


def test_a_client_that_sends_for_ever_is_not_listened_to_for_ever(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LINGER_S", 0.5)
    end = time.monotonic() + 50
    with server.socket() as connection, pytest.raises(ConnectionError):
        while time.monotonic() < end:
            connection.sendall(b"x" * 65536)


def waiting(running: Running, *sent: bytes) -> list[socket.socket]:
    found = [running.socket() for _ in sent]
    for connection, data in zip(found, sent, strict=True):
        connection.sendall(data)
    return found


POST = (
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type:"
    b" application/json\r\ncontent-length: 999\r\n\r\n"
)


def test_of_more_connections_than_there_is_room_for_the_longest_idle_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "most_connections", lambda: 12)
    monkeypatch.setattr(connections, "RESERVE", 2)
    long = b'{"prompt":"x","max_tokens":300,"ignore_eos":true,"stream":true}'
    stream = POST.replace(b"999", b"%d" % len(long)) + long
    with serving() as running:
        answered = waiting(running, *[stream] * 3)
        assert all(connection.recv(15) == b"HTTP/1.1 200 OK" for connection in answered)
        held: list[socket.socket] = []
        for data in (b"", b"GET / HT", POST + b"{") * 12:
            held += waiting(running, data)
            assert running.get("/health").status == 200
        # the first of them have gone
        assert all(all_of(connection) == b"" for connection in held[:24])
        assert held[-1].send(b"x") == 1
        for connection in answered:  # and nobody who was being answered
            assert all_of(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        for connection in (*held, *answered):
            connection.close()


def test_where_all_connections_are_being_answered_health_still_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "most_connections", lambda: 6)
    monkeypatch.setattr(connections, "RESERVE", 2)
    long = b'{"prompt":"x","max_tokens":900,"ignore_eos":true,"stream":true}'
    with serving(max_batch_size=1) as running:
        step = running.service.llm.engine.step
        running.service.llm.engine.step = lambda: [time.sleep(0.02), step()][1]  # type: ignore[method-assign, func-returns-value]
        answered = waiting(running, *[POST.replace(b"999", b"%d" % len(long)) + long] * 4)
        assert until(lambda: running.service.inside == 4)
        for _ in range(20):
            held = waiting(running, b"", b"")
            assert running.get("/health").status == 200
            refused = running.complete()
            assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (
                503,
                "too_many_connections",
                "1",
            )
            for connection in held:
                connection.close()
        for connection in answered:
            connection.close()
        assert until(lambda: idle(running))
        assert running.complete().status == 200


def test_health_is_answered_when_descriptors_run_out() -> None:
    """In a process that may have no more than 160: five times as many connections that are silent,
    slow, or in the middle of a body."""
    limits = {resource.RLIMIT_NOFILE: 160}
    with started("--drain-timeout", "120", limits=limits) as (process, port):
        stream, held = begin(port, max_tokens=400), list[socket.socket]()
        for number in range(800):
            held.append(socket.create_connection(("127.0.0.1", port), 30))
            held[-1].sendall((b"", b"GET / HT", POST + b"{")[number % 3])
            if number % 40 == 0:
                asked = connect(port, 15)  # less than the others have
                asked.request("GET", "/health")
                assert asked.getresponse().status == 200
        assert stream.read().endswith(b"data: [DONE]\n\n")
        for connection in held:
            connection.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stderr and "out of system resource" not in process.stderr.read()


def test_an_answer_that_nobody_reads_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made, answering = Connection.connection_made, list[Connection]()

    def narrow(protocol: Any, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        made(protocol, transport)
        answering.append(protocol)

    monkeypatch.setattr(Connection, "connection_made", narrow)
    monkeypatch.setattr(connections, "SEND_S", 1.5)
    body = json.dumps({"prompt": "x y " * 200_000}).encode()
    lines = POST.replace(b"/v1/completions", b"/tokenize").replace(b"999", b"%d" % len(body))
    with serving() as running, running.socket() as asleep, running.socket() as awake:
        for connection in (asleep, awake):
            connection.sendall(lines + body)
        whole = b""
        while not whole.endswith(b"}"):  # a twentieth of a megabyte a second would be enough
            whole += awake.recv(2**17)
            time.sleep(0.02)
        assert whole.count(b",") > 400_000
        assert until(lambda: bool(answering) and answering[0].parting)
        with suppress(ConnectionResetError):
            assert not all_of(asleep).endswith(b"}")


def test_who_asks_twice_at_once_and_goes_away_leaves_nothing_behind(server: Running) -> None:
    """Requests in one piece: the last of them alone used to hear of it."""
    long = b'{"prompt":"x","max_tokens":900,"ignore_eos":true}'
    data = POST.replace(b"999", b"%d" % len(long)) + long
    with server.socket() as connection:
        connection.sendall(data + data)
        assert until(lambda: server.service.inside == 1)
    engine = server.service.llm.engine
    before = server.metric("quantflow_generated_tokens_total")
    assert until(lambda: idle(server)) and engine.occupancy().running == 0
    assert server.metric("quantflow_generated_tokens_total") - before < 800


def test_errors_say_nothing_of_the_inside(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("/secret/path is broken")

    monkeypatch.setattr(type(server.service), "cards", broken)
    answer = server.get("/v1/models")
    assert answer.status == 500 and answer.error["code"] == "internal_error"
    assert (
        b"secret" not in answer.body and answer.headers["x-request-id"] in answer.error["message"]
    )
    assert "content-security-policy" in answer.headers


def test_nothing_listens_beyond_loopback_by_default(server: Running) -> None:
    assert ServerConfig().host == "127.0.0.1" and ServerConfig().loopback
    assert (
        not ServerConfig(host="0.0.0.0").loopback
        and ServerConfig(host="localhost").loopback
        and ServerConfig(host="::1").loopback
    )
    own = socket.gethostbyname(socket.gethostname())
    if not own.startswith("127."):
        with pytest.raises(OSError):
            socket.create_connection((own, server.port), timeout=2)
