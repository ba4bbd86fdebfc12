"""A server for the fuzzer, in this process and without a socket: bodies go to its routes, bytes to
its HTTP protocol.

What may not happen is an AssertionError: an answer of 500 or more, an error in another shape than
its route's, no answer in time, and anything of a request that is still there once it is over.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from quantflow.engine.async_llm import AsyncLLM
from quantflow.serve.app import create_app
from quantflow.serve.config import ServerConfig
from quantflow.serve.connection import Connection, Connections
from quantflow.serve.service import Service

DEMO = Path(__file__).parents[2] / "calib_data" / "demo_model"
# Every route that takes a body.
PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/chat/interactive", "/generate", "/tokenize",
    "/detokenize", "/v1/encode", "/v1/responses", "/v1/responses/input_tokens", "/v1/messages",
    "/v1/messages/count_tokens",
)  # fmt: skip
FILES = {f"{path[1:]}.json": path for path in PATHS}
CONTEXT = 192  # tokens, so that an answer without a limit is short
WAIT_S = 60.0  # on a clock: a machine that has other work may be slow
TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}Answer in"
    " <tool_call></tool_call>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{"
    " m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}<|im_end|>\n{%"
    " endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Harness:
    """The demo model with a template that has tools, behind the whole application."""

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="quantflow-fuzz-")) / "model"
        shutil.copytree(DEMO, folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        llm = AsyncLLM(
            folder, device="cpu", cache_bytes=2**22, session_len=CONTEXT, max_batch_size=4
        )
        shutil.rmtree(folder.parent)
        self.loop = asyncio.new_event_loop()
        self.service = Service(llm, ServerConfig(), "fuzzed")
        self.app = create_app(self.service)
        self.config = uvicorn.Config(
            self.app,
            ws="none",
            lifespan="off",
            log_config=None,
            proxy_headers=False,
            server_header=False,
        )
        self.config.load()

    def check_empty(self) -> None:
        """Whether all that a request held has been given back."""

        async def empty() -> None:
            async with asyncio.timeout(WAIT_S):
                while self.service.inside or await asyncio.wrap_future(
                    self.service.llm.call(lambda engine: engine.has_work)
                ):
                    await asyncio.sleep(0.001)

        self.loop.run_until_complete(empty())
        assert self.service.health == "ok", self.service.health


@cache
def harness() -> Harness:
    return Harness()


def check_error(status: int, kind: str, body: bytes) -> None:
    """What every answer that is an error looks like. The shape is OpenAI's; of Anthropic's, which
    has `type` outside, too."""
    assert status < 500, f"{status}: {body[:500]!r}"
    if status >= 400:
        assert kind == "application/json", kind
        error = json.loads(body)["error"]
        assert (
            isinstance(error["message"], str)
            and error["message"]
            and isinstance(error["type"], str)
        ), body[:500]
        assert max(map(len, error["message"].split()), default=0) <= 80, body[:500]


# --- bodies


def request(place: Path) -> None:
    """Each body that there is goes to its route."""
    for file in sorted(place.rglob("*.json")):
        path = FILES[str(file.relative_to(place))]
        status, headers, body = harness().loop.run_until_complete(_post(path, file.read_bytes()))
        check_error(status, headers.get(b"content-type", b"").decode(), body)
        _check_stream(headers, body)
        harness().check_empty()


def _check_stream(headers: dict[bytes, bytes], body: bytes) -> None:
    """An event is JSON, whichever names it has."""
    if headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        for line in body.decode().split("\n"):
            if line.startswith("data: ") and line != "data: [DONE]":
                found = json.loads(line[6:])
                assert (
                    "error" not in found
                    or found["error"] is None
                    or found["error"].get("code") != "internal_error"
                ), line[:500]


async def _post(path: str, body: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    given: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        if given:
            return given.pop()
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [
        (b"host", b"localhost"),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
    ]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "headers": headers, "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip
    async with asyncio.timeout(WAIT_S):
        await harness().app(scope, receive, send)
    start, parts = sent[0], sent[1:]
    assert start["type"] == "http.response.start" and not parts[-1].get("more_body"), sent
    return (
        start["status"],
        dict(start["headers"]),
        b"".join(part.get("body", b"") for part in parts),
    )


# --- bytes


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closed = bytearray(), False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 80)}.get(name, default)

    def write(self, data: Any) -> None:
        if not self.closed:
            self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = write_eof = close

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


def headers(place: Path) -> None:
    """The bytes arrive in two pieces, and the client goes away where nothing more comes of them."""
    data = (place / "request.http").read_bytes()
    wire = harness().loop.run_until_complete(_arrive(data))
    for status, kind, body in answers(bytes(wire.written)):
        check_error(status, kind, body)
    harness().check_empty()


async def _arrive(data: bytes) -> Wire:
    state, wire, loop = ServerState(), Wire(), asyncio.get_running_loop()
    every = Connections()
    protocol = Connection(
        every, config=harness().config, server_state=state, app_state={}, _loop=loop
    )
    protocol.connection_made(wire)
    half = len(data) // 2
    for piece in (data[:half], data[half:]):
        if piece and not wire.closed:
            protocol.data_received(piece)
            await _quiet(state, wire)
    protocol.connection_lost(None)
    async with asyncio.timeout(WAIT_S):
        while state.tasks:
            await asyncio.wait(state.tasks)
    assert not state.connections and not every.open and not every.waiting, (
        "a connection is still counted"
    )
    return wire


async def _quiet(state: ServerState, wire: Wire) -> None:
    """Until no request runs, or those that do wait for more to arrive."""
    patience = 20
    while state.tasks and patience:
        before = len(wire.written)
        await asyncio.wait(state.tasks, timeout=0.002)
        patience = 20 if harness().service.inside or len(wire.written) > before else patience - 1


HEAD = re.compile(rb"HTTP/1\.1 (\d{3})[^\r\n]*\r\n((?:[!#-'*+.0-9A-Z^-z|~-]+:[^\r\n]*\r\n)*)\r\n")


def answers(data: bytes) -> list[tuple[int, str, bytes]]:
    """Status, content type and body of each answer in what a server wrote; the last may have been
    cut off."""
    found = []
    while data:
        head = HEAD.match(data)
        assert head, f"no answer's head: {data[:200]!r}"
        status, data = int(head[1]), data[head.end() :]
        fields = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in head[2].splitlines())
        }
        if status < 200:
            continue
        if fields.get(b"transfer-encoding") == b"chunked":
            body, data = _chunks(data)
        elif data.startswith(b"HTTP/1.1 "):  # to a HEAD
            body = b""
        else:
            length = int(fields.get(b"content-length", len(data)))
            body, data = data[:length], data[length:]
            if len(body) < length:
                break
        if body or status < 400:
            found.append((status, fields.get(b"content-type", b"").decode(), body))
    return found


def _chunks(data: bytes) -> tuple[bytes, bytes]:
    found = b""
    while True:
        size, end, rest = data.partition(b"\r\n")
        if not end:
            return found, b""
        length = int(size, 16)
        found, data = found + rest[:length], rest[length + 2 :]
        if not length:
            return found, data
