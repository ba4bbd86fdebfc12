"""The server under load and under faults, on the demo model, over loopback.

    PYTHONPATH=.:kernels python benchmarks/serve.py [--output benchmarks/results/serve_cpu.json]
    [--only load,fuzz] [--scale 0.1]

load        32 clients, each request as one answer and as a stream, against `LLM.generate` on the
            same requests
disconnect  10,000 requests, a third of which go away at a random moment: nothing runs, no block
            leaks, memory stays flat
fuzz        20,000 bodies and headers, random and mutated: no 500, no hang, no connection that ends
            without an answer
slow        a reader that takes a long stream a few bytes at a time, and the time that others'
            requests take meanwhile
death       the engine's thread dies: clients get an error, /health turns red, the process ends with
            1 under --supervised

--scale multiplies the numbers of requests. The client is a plain asyncio one in this process, so
that little of the machine goes to it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL, TEXT = ROOT / "calib_data" / "demo_model", ROOT / "calib_data" / "demo_eval.txt"
CLIENTS, NEW, LETTERS = 32, 128, 400
HANG_S = 60.0
ADMIN_KEY = "the-admin-of-the-test"

DIES = """
import threading
from quantflow.engine.engine import Engine
step, count = Engine.step, []
def dying(self):
    if threading.current_thread().name == "quantflow-engine":
        count.append(1)
        if len(count) > 200:
            raise RuntimeError("killed")
    return step(self)
Engine.step = dying
from quantflow.cli.main import main
main()
"""


@contextmanager
def server(
    *options: str, model: Path = MODEL, code: str | None = None, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process and its port."""
    command = [
        sys.executable,
        *(["-c", code] if code else ["-m", "quantflow.cli.main"]),
        "serve",
        str(model),
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [*command, "--max-batch-size", "32", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        if not line.startswith("ready: "):
            raise RuntimeError("the server did not start")
        yield process, int(line.split()[1].rsplit(":", 1)[1])
    finally:
        process.kill()
        process.wait()


def request(path: str, body: Any, *headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        "connection: close",
        *headers,
    ]
    return (
        "\r\n".join([*lines, f"content-length: {len(data)}", "", ""]).encode(
            "utf-8", "surrogateescape"
        )
        + data
    )


async def ask(port: int, data: bytes, leave_s: float | None = None) -> bytes:
    """The whole answer; or what came of it, where the client goes away after a time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = bytearray()
    try:
        async with asyncio.timeout(leave_s if leave_s is not None else HANG_S):
            writer.write(data)
            while part := await reader.read(65536):
                received += part
    except TimeoutError:
        if leave_s is None:
            raise
    except ConnectionError:
        pass  # it was closed before all of it was sent
    finally:
        writer.transport.abort() if leave_s is not None else writer.close()
    return bytes(received)


async def get(port: int, path: str) -> bytes:
    return await ask(
        port, f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
    )


async def metrics(port: int) -> dict[str, float]:
    lines = (await get(port, "/metrics")).split(b"\r\n\r\n", 1)[1].decode().splitlines()
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line and line[0] not in "#" and " " in line
    }


async def crowd(count: int, clients: int, work: Callable[[int], Awaitable[None]]) -> float:
    """Seconds that it takes some clients to do `count` pieces of work."""
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            await work(number)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began


def resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


# --- load


def bodies(count: int) -> list[dict[str, Any]]:
    text = TEXT.read_text(encoding="utf-8")
    starts = [i * LETTERS % (len(text) - LETTERS) for i in range(count)]
    return [
        {
            "prompt": text[s : s + LETTERS],
            "max_tokens": NEW,
            "temperature": 1,
            "seed": i,
            "ignore_eos": True,
        }
        for i, s in enumerate(starts)
    ]


def offline(count: int) -> float:
    """Tokens a second of `LLM.generate`, in a process of its own."""
    code = f"""
import json, sys, time
from quantflow import LLM, SamplingParams
bodies = json.load(sys.stdin)
llm = LLM({str(MODEL)!r}, max_batch_size=32)
llm.generate("x", SamplingParams(max_tokens=4))
params = [SamplingParams(**{{k: v for k, v in b.items() if k != "prompt"}}) for b in bodies]
began = time.perf_counter()
outputs = llm.generate([b["prompt"] for b in bodies], params)
print(sum(len(o.completions[0].token_ids) for o in outputs) / (time.perf_counter() - began))
"""
    given = json.dumps(bodies(count))
    return float(
        subprocess.run(
            [sys.executable, "-c", code],
            input=given,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


def load(scale: float) -> dict[str, Any]:
    count, rounds = max(CLIENTS, int(128 * scale)), 5

    async def online(port: int, stream: bool) -> float:
        tokens = 0

        async def one(number: int) -> None:
            nonlocal tokens
            body = {
                **asked[number],
                "stream": stream,
                **({"stream_options": {"include_usage": True}} if stream else {}),
            }
            answer = await ask(port, request("/v1/completions", body))
            at = answer.rindex(b'"completion_tokens":') + 20
            tokens += int(answer[at : answer.index(b",", at)])

        seconds = await crowd(count, CLIENTS, one)
        assert tokens == count * NEW
        return tokens / seconds

    asked = bodies(count)
    rates: dict[str, list[float]] = {"offline": [], "whole": [], "stream": []}
    # Taken in turn: the machine's speed varies from minute to minute.
    for _ in range(rounds):
        rates["offline"].append(offline(count))
        with server() as (_, port):
            asyncio.run(online(port, True))  # warm
            rates["whole"].append(asyncio.run(online(port, False)))
            rates["stream"].append(asyncio.run(online(port, True)))
            counters = asyncio.run(metrics(port))
    medians = {name: statistics.median(rates) for name, rates in rates.items()}
    ratios = {
        name: statistics.median(r / o for r, o in zip(rates[name], rates["offline"], strict=True))
        for name in ("whole", "stream")
    }
    first = (
        counters["quantflow_time_to_first_token_seconds_sum"]
        / counters["quantflow_time_to_first_token_seconds_count"]
    )
    between = (
        counters["quantflow_inter_token_seconds_sum"]
        / counters["quantflow_inter_token_seconds_count"]
    )
    return {
        "clients": CLIENTS,
        "requests": count,
        "new_tokens": NEW,
        "rounds": rounds,
        "tokens_per_s": medians,
        "of_offline": ratios,
        "all_tokens_per_s": rates,
        "mean_first_token_s": first,
        "mean_inter_token_s": between,
        "goal_of_offline": 0.8,
        "passed": min(ratios.values()) >= 0.8,
    }


# --- disconnect


def disconnect(scale: float) -> dict[str, Any]:
    count = int(10_000 * scale)
    draw = random.Random(1)
    text = TEXT.read_text(encoding="utf-8")
    sizes: list[int] = []
    answered = [0, 0]

    async def run(process: subprocess.Popen[str], port: int) -> tuple[float, dict[str, float]]:
        async def one(number: int) -> None:
            start = draw.randrange(len(text) - 2000)
            body: dict[str, Any] = {
                "max_tokens": draw.choice((1, 4, 16, 64)),
                "temperature": 1,
                "n": draw.choice((1, 1, 1, 2, 4)),
                "ignore_eos": True,
                "stream": draw.random() < 0.6,
            }
            path, prompt = (
                draw.choice(("/v1/completions", "/v1/chat/completions", "/v1/chat/interactive")),
                text[start : start + draw.randrange(20, 800)],
            )
            body |= {"prompt": prompt} if path == "/v1/completions" else {"messages": prompt}
            if path == "/v1/chat/interactive":
                body = {
                    "prompt": prompt,
                    "session_id": draw.randrange(200),
                    "interactive_mode": draw.random() < 0.5,
                    "request_output_len": body["max_tokens"],
                }
            leaves = draw.random() < 1 / 3
            answer = await ask(port, request(path, body), draw.expovariate(10) if leaves else None)
            if not leaves:
                answered[
                    answer.startswith(b"HTTP/1.1 200 ")
                    and (not body.get("stream") or b"[DONE]" in answer)
                ] += 1
            if number % max(1, count // 20) == 0:
                sizes.append(resident(process.pid))

        seconds = await crowd(count, 48, one)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            counters = await metrics(port)
            if (
                counters["quantflow_sequences_running"]
                == counters["quantflow_sequences_waiting"]
                == 0
            ):
                break
            await asyncio.sleep(0.1)
        await ask(port, request("/admin/sessions/end", {}, f"authorization: Bearer {ADMIN_KEY}"))
        await asyncio.sleep(0.5)
        return seconds, await metrics(port)

    with server("--max-queue", "1000", QUANTFLOW_ADMIN_KEY=ADMIN_KEY) as (process, port):
        seconds, counters = asyncio.run(run(process, port))
        grown = max(sizes[-3:]) - max(sizes[len(sizes) // 2 : len(sizes) // 2 + 3])
    left = {
        name: counters[f"quantflow_{name}"]
        for name in ("sequences_running", "sequences_waiting", "kv_blocks_used", "sessions")
    }
    refused = sum(
        v
        for k, v in counters.items()
        if k.startswith("quantflow_http_responses_total") and 'status="409"' in k
    )
    return {
        "requests": count,
        "seconds": seconds,
        "answered": answered[1],
        "not_answered_whole": answered[0],
        "session_busy_409": refused,
        "left": left,
        "resident_mib": [size >> 20 for size in sizes],
        "grown_in_the_second_half_mib": grown / 2**20,
        "passed": not any(left.values()) and grown < 16 * 2**20 and answered[0] <= refused,
    }


# --- fuzz

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
SEEDS: list[tuple[str, Any]] = [
    (
        "/v1/chat/completions",
        {
            "model": "m",
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 2,
            "temperature": 0.7,
            "n": 1,
            "stop": ["a"],
            "stream": True,
            "logprobs": True,
            "top_logprobs": 2,
            "logit_bias": {"5": 1},
            "seed": 1,
            "response_format": {"type": "json_object"},
        },
    ),
    ("/v1/chat/completions", {"messages": "x", "max_tokens": 2, "stop": False}),
    (
        "/v1/chat/completions",
        {
            "messages": "x",
            "max_tokens": 2,
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "parameters": {**SCHEMA, "$defs": {"u": {"enum": [1]}}},
                    },
                }
            ],
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}],
            "max_tokens": 1,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": SCHEMA},
            },
        },
    ),
    (
        "/v1/completions",
        {
            "prompt": ["x", "y"],
            "max_tokens": 2,
            "echo": True,
            "logprobs": 1,
            "best_of": 2,
            "n": 1,
            "min_p": 0.1,
            "top_k": 3,
        },
    ),
    (
        "/v1/completions",
        {
            "prompt": [1, 2, 3],
            "max_tokens": 1,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        },
    ),
    (
        "/v1/chat/interactive",
        {
            "prompt": "x",
            "session_id": 1,
            "interactive_mode": True,
            "request_output_len": 1,
            "stop": ["a"],
            "cancel": False,
        },
    ),
    ("/tokenize", {"prompt": "x", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, -1e-308, "",
    "x", "\x00", "\ud800", "é" * 300, "x" * 5000, [], {}, [[]], [None], {"": None}, [1] * 2000,
    {"a": {"b": {"c": []}}}, "http://127.0.0.1:1/x", "{{ 7*7 }}", "<|im_end|>", "</s>", ["a", 1],
    "NaN", "1", [-1], [10**9],
]  # fmt: skip


def mutate(draw: random.Random, value: Any, depth: int = 0) -> Any:
    """A value of about the same shape, with something odd in it."""
    kind = draw.random()
    if kind < 0.15 or depth > 6:
        return draw.choice(ODD)
    if isinstance(value, dict) and value:
        changed = dict(value)
        key = draw.choice(list(changed))
        if kind < 0.3:
            changed.pop(key)
        elif kind < 0.4:
            changed[
                draw.choice(
                    ("foo", "\ud800", "", "n", "stream", "stop", "prompt", "messages", "__proto__")
                )
            ] = draw.choice(ODD)
        else:
            changed[key] = mutate(draw, changed[key], depth + 1)
        return changed
    if isinstance(value, list) and value:
        found_list = list(value)
        at = draw.randrange(len(found_list))
        if kind < 0.3:
            return found_list * draw.choice((0, 2, 40))
        found_list[at] = mutate(draw, found_list[at], depth + 1)
        return found_list
    return draw.choice(ODD)


def fuzzed(draw: random.Random) -> bytes:
    path, body = draw.choice(SEEDS)
    for _ in range(draw.choice((0, 1, 1, 2, 4))):
        body = mutate(draw, body)
    data = json.dumps(body).encode()
    if draw.random() < 0.15:  # broken JSON
        cut = bytearray(data)
        for _ in range(draw.randrange(1, 6)):
            if cut:
                cut[draw.randrange(len(cut))] = draw.randrange(256)
        data = bytes(cut[: draw.randrange(len(cut) + 1)])
    if draw.random() < 0.03:
        data = draw.choice((b"[", b'{"a":', b'{"messages":[')) * draw.choice((100, 1000, 20000))
    if draw.random() < 0.1:
        path = draw.choice(
            (
                path + "?x=%ff",
                path + "/",
                "/" + "a" * 3000,
                "/%00",
                "/admin/drain",
                "//",
                "/v1/models/%2e%2e",
            )
        )
    headers = []
    for _ in range(draw.choice((0, 0, 0, 1, 3))):
        name = draw.choice(
            (
                "x",
                "authorization",
                "content-type",
                "accept",
                "transfer-encoding",
                "expect",
                "content-encoding",
                "origin",
                "cookie",
                "upgrade",
            )
        )
        value = draw.choice(
            (
                "",
                "x" * 3000,
                "gzip",
                "chunked",
                "100-continue",
                "Bearer x",
                "text/plain",
                "\udcff\udcfe",
                "websocket",
                "multipart/form-data",
            )
        )
        headers.append(f"{name}: {value}")
    raw = request(path, data, *headers)
    if draw.random() < 0.05:  # no HTTP any longer
        cut = bytearray(raw)
        for _ in range(draw.randrange(1, 4)):
            cut[draw.randrange(min(200, len(cut)))] = draw.randrange(256)
        raw = bytes(cut)
    return raw


def fuzz(scale: float) -> dict[str, Any]:
    count = int(20_000 * scale)
    draw = random.Random(7)
    statuses: dict[str, int] = {}
    hangs: list[str] = []
    odd: list[str] = []

    async def run(port: int) -> float:
        async def one(number: int) -> None:
            data = fuzzed(draw)
            try:
                # Some are half a request, for which the server waits: the client closes its end.
                answer = await ask(port, data, 3.0 if number % 20 == 0 else HANG_S)
            except TimeoutError:
                hangs.append(repr(data[:200]))
                return
            answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
            status = (
                answer[9:12].decode("ascii", "replace")
                if answer.startswith(b"HTTP/1.1 ")
                else "none"
            )
            statuses[status] = statuses.get(status, 0) + 1
            if status.startswith("5"):
                odd.append(repr(data[:400]))

        return await crowd(count, 24, one)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = Path(folder) / "model"  # the demo model, as if it knew tools
        shutil.copytree(MODEL, model)
        with (model / "chat_template.jinja").open("a") as template:
            template.write("{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}")
        # Where a request sets no limit, its answer is short.
        process, port = stack.enter_context(server("--session-len", "128", model=model))
        seconds = asyncio.run(run(port))
        health = asyncio.run(get(port, "/health"))
        alive = process.poll() is None and health.startswith(b"HTTP/1.1 200 ")
        counters = asyncio.run(metrics(port))
    return {
        "requests": count,
        "seconds": seconds,
        "statuses": dict(sorted(statuses.items())),
        "server_errors": odd[:20],
        "hangs": hangs[:20],
        "alive_and_well_after": alive,
        "running_after": counters["quantflow_sequences_running"],
        "passed": alive and not hangs and not odd and not counters["quantflow_sequences_running"],
    }


# --- slow


def slow(scale: float) -> dict[str, Any]:
    count = max(10, int(60 * scale))

    async def times(port: int) -> float:
        seconds: list[float] = []
        body = {"prompt": "The table", "max_tokens": 32, "ignore_eos": True, "temperature": 0}

        async def one(number: int) -> None:
            began = time.perf_counter()
            await ask(port, request("/v1/completions", body))
            seconds.append(time.perf_counter() - began)

        await crowd(count, 2, one)
        return statistics.median(seconds)

    async def run(port: int) -> tuple[list[float], list[float]]:
        without, beside = [], []
        for _ in range(3):
            without.append(await times(port))
            body = {
                "prompt": "x",
                "max_tokens": 900,
                "ignore_eos": True,
                "stream": True,
                "logprobs": 5,
                "n": 8,
            }
            readers = []
            for _ in range(8):
                reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
                writer.write(request("/v1/completions", body))
                readers.append((reader, writer))
            while (await metrics(port))["quantflow_generated_tokens_total"] % 1 or (
                await metrics(port)
            )["quantflow_sequences_running"]:
                for reader, _ in readers:
                    await asyncio.wait_for(reader.read(64), 30)
                await asyncio.sleep(0.2)
            beside.append(await times(port))  # all is generated, and hardly any of it has been read
            for _, writer in readers:
                writer.transport.abort()
            await asyncio.sleep(0.5)
        return without, beside

    with server() as (_, port):
        without, beside = asyncio.run(run(port))
    ratio = statistics.median(b / w for w, b in zip(without, beside, strict=True))
    return {
        "readers": 8,
        "median_s_alone": without,
        "median_s_beside_slow_readers": beside,
        "ratio": ratio,
        "passed": ratio < 1.25,
    }


# --- death


def death(scale: float) -> dict[str, Any]:
    async def run(port: int) -> tuple[list[bytes], float, bytes]:
        body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True}
        answers = asyncio.gather(
            *(
                ask(port, request("/v1/completions", {**body, "stream": i % 2 == 0}))
                for i in range(8)
            )
        )
        received = await answers
        began, health = time.monotonic(), b""
        try:
            while time.monotonic() - began < 10:
                health = await get(port, "/health")
                if b" 503 " in health[:20]:
                    break
        except OSError:  # it has ended already
            pass
        return list(received), time.monotonic() - began, health

    with server("--supervised", code=DIES) as (process, port):
        answers, seconds, health = asyncio.run(run(port))
        code = process.wait(20)
    with server(code=DIES) as (process, port):
        _, seconds, health = asyncio.run(run(port))
        stays = process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    told = sum(b"engine_stopped" in answer for answer in answers)
    return {
        "clients": len(answers),
        "clients_told": told,
        "red_after_s": seconds,
        "exit_code_supervised": code,
        "stays_without_the_flag": stays,
        "passed": (
            told == len(answers) and b" 503 " in health[:20] and seconds < 5 and code == 1 and stays
        ),
    }


PARTS: dict[str, Callable[[float], dict[str, Any]]] = {
    "load": load, "disconnect": disconnect, "fuzz": fuzz, "slow": slow, "death": death
}  # fmt: skip


def main() -> int:
    import fastapi
    import torch
    import uvicorn

    from quantflow.machine import processor

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--scale", type=float, default=1.0)
    args = parser.parse_args()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(65536, files[1]), files[1]))
    record: dict[str, Any] = {
        "device": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastapi": fastapi.__version__,
        "uvicorn": uvicorn.__version__,
        "date": str(date.today()),
        "scale": args.scale,
    }
    if args.output and args.output.exists():
        record = {**json.loads(args.output.read_text()), **record}
    for name in args.only.split(","):
        measured = PARTS[name](args.scale)
        record[name] = measured
        print(name, json.dumps(measured, indent=1), flush=True)
        if args.output:
            args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(record[name]["passed"] for name in args.only.split(",")) else 1


if __name__ == "__main__":
    raise SystemExit(main())
