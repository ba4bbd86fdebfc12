"""A server in this process, on a free port of the loopback address, and the plainest HTTP
client."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from quantflow.engine.async_llm import AsyncLLM
from quantflow.serve.config import ServerConfig
from quantflow.serve.server import Server
from quantflow.serve.service import Service

DEMO = Path(__file__).parents[2] / "calib_data" / "demo_model"
LMDEPLOY_BODY = {
    "model": "internlm-chat-7b", "messages": "写一首春天的诗", "temperature": 0.7, "top_p": 1,
    "n": 1, "max_tokens": 512, "stop": False, "stream": False, "presence_penalty": 0,
    "frequency_penalty": 0, "user": "string", "repetition_penalty": 1, "renew_session": False,
    "ignore_eos": False,
}  # fmt: skip
NEUTRAL_IN_CHAT = {  # as those send it who give every parameter of chat completions its default
    "priority": 0, "min_tokens": 0, "min_new_tokens": 0, "stop_token_ids": [], "logit_bias": {},
    "skip_special_tokens": True, "include_stop_str_in_output": False, "return_token_ids": False,
    "prompt_logprobs": None, "do_sample": True, "presence_penalty": 0, "frequency_penalty": 0.0,
    "repetition_penalty": 1.0, "n": 1, "stop": [], "ignore_eos": False, "min_p": 0,
    "logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"},
    "parallel_tool_calls": True, "guided_json": None, "best_of": 1,
    "stream_options": {"include_usage": True},
}  # fmt: skip

TOOL_TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}Answer in"
    " <tool_call></tool_call>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{"
    " m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}<|im_end|>\n{%"
    " endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_tools(folder: Path) -> Path:
    """The demo model with a dialogue format that knows tools, which it was not trained for: it
    calls those that it must."""
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    return folder


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """What a stream said, [DONE] left out."""
        lines = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


@dataclass(frozen=True)
class Running:
    address: str
    service: Service

    @property
    def port(self) -> int:
        port = urlsplit(self.address).port
        assert port
        return port

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, data, {"content-type": "application/json", **given})
            response = connection.getresponse()
            return Answer(
                response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
            )
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.send("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.send("POST", path, body, **headers)

    def complete(self, **body: Any) -> Answer:
        return self.post(
            "/v1/completions", {"prompt": "The table", "max_tokens": 8, "temperature": 0, **body}
        )

    def chat(self, **body: Any) -> Answer:
        given = {
            "messages": [{"role": "user", "content": "What is a table?"}],
            "max_tokens": 8,
            "temperature": 0,
        }
        return self.post("/v1/chat/completions", {**given, **body})

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def metric(self, name: str) -> float:
        lines = [
            line
            for line in self.get("/metrics").body.decode().splitlines()
            if line.startswith((f"{name} ", f"{name}{{"))
        ]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@contextmanager
def serving(
    model: Path = DEMO, config: ServerConfig | None = None, **options: Any
) -> Iterator[Running]:
    """options: those of EngineConfig."""
    llm = AsyncLLM(model, device="cpu", **{"cache_bytes": 2**26, "max_batch_size": 8, **options})
    config = config or ServerConfig(port=0)
    ready, address = threading.Event(), list[str]()

    def note(text: str) -> None:
        address.append(text)
        ready.set()

    server = Server(Service(llm, config, model.name), note)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield Running(address[0], server.service)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def request(body: Any, path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    lines = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type:"
        f" application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    return lines.encode() + data


def until(condition: Any, seconds: float = 60.0) -> bool:
    """Whether it comes true: at once on a machine that has nothing else to do, and late on one that
    has."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def idle(running: Running) -> bool:
    now = running.service.llm.engine.occupancy()
    return (now.running, now.waiting, now.used_blocks, running.service.inside) == (0, 0, 0, 0)
