"""The server against hostile clients of every kind at once, beside honest ones, on the demo model,
over loopback.

    PYTHONPATH=.:kernels python benchmarks/serve_hostile.py [--seconds 600] [--only KIND]...
    [--output FILE]

tokenise    4 MB of text to /tokenize, again and again: words, blanks, one long word
lists       126 prompts in a request, one of them bad
leave       32 clients that go away at a random moment
slow        300 connections: headers that drip, bodies that drip, streams that are hardly read
malformed   fuzzed bodies and headers, and what is no HTTP
grammars    a grammar of 60 KB whose string is not closed
brackets    bodies of closing brackets
scores      128 prompts with the log-probabilities of 20 tokens at each place: as many as are
            answered, and more
counted     count_tokens and its like for 4 MB, sent and left
items       lists of a hundred thousand wrong items
honest      requests that want nothing but an answer, and ask again where the queue is full

Hostile and honest clients have a process each, and so has who asks /health, fifty times a second.
It passes where the 99th percentile of /health is under 0.2 s, every honest request is answered, and
afterwards nothing runs, waits, is held or has grown.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from serve import HANG_S, MODEL, ROOT, TEXT, ask, fuzzed, get, metrics, request, resident

BIG = 4 * 2**20 - 2048
HONEST, LEAVE, SLOW, TOKENISE, LISTS, MALFORMED = 4, 32, 300, 2, 2, 4
GRAMMARS, BRACKETS, SCORES, COUNTED, ITEMS = 1, 1, 1, 4, 1
WRONG = 100_000  # items of a list
EVERY_S = 0.02
GOAL_S = 0.2
# bytes, from the end of the first minute, when every kind has been met, to the end
MOST_GROWTH = 64 * 2**20
WARM_S = 60.0
PATIENCE_S = 300.0  # of an honest client, half of what OpenAI's has

Client = Callable[[int, random.Random, Counter[str]], Awaitable[None]]


def status(answer: bytes) -> str:
    return answer[9:12].decode("ascii", "replace") if answer.startswith(b"HTTP/1.1 ") else "none"


async def tokenise(port: int, draw: random.Random, count: Counter[str]) -> None:
    text = draw.choice((TEXT.read_text(encoding="utf-8")[:4000], " ", "a", "1", "\n ", "x y "))
    data = json.dumps(
        {"prompt": text * (BIG // len(text.encode()) + 1)}, ensure_ascii=False
    ).encode()[:BIG]
    count[
        status(
            await ask(
                port,
                request(
                    "/tokenize", data.rsplit(b'"}', 1)[0].decode(errors="ignore").encode() + b'"}'
                ),
            )
        )
    ] += 1


async def lists(port: int, draw: random.Random, count: Counter[str]) -> None:
    prompts: list[list[int]] = [
        [draw.randrange(3, 200) for _ in range(draw.randrange(1, 60))] for _ in range(126)
    ]
    prompts[draw.randrange(126)] = draw.choice(([10**6], [5] * 5000, [2**31 - 1]))
    body = {"prompt": prompts, "max_tokens": 200, "ignore_eos": True, "stream": draw.random() < 0.5}
    count[status(await ask(port, request("/v1/completions", body)))] += 1
    await asyncio.sleep(0.05)


async def leave(port: int, draw: random.Random, count: Counter[str]) -> None:
    path = draw.choice(("/v1/completions", "/v1/chat/completions", "/v1/chat/interactive"))
    name = {
        "/v1/completions": "prompt",
        "/v1/chat/completions": "messages",
        "/v1/chat/interactive": "prompt",
    }[path]
    most = {
        "request_output_len" if "interactive" in path else "max_tokens": draw.choice((4, 64, 400)),
        "ignore_eos": True,
    }
    extra = (
        {"session_id": draw.randrange(50), "interactive_mode": True}
        if "interactive" in path
        else {"n": draw.choice((1, 1, 2, 4))}
    )
    body = {
        name: "The table " * draw.randrange(1, 60),
        "stream": draw.random() < 0.6,
        **most,
        **extra,
    }
    count[status(await ask(port, request(path, body), draw.expovariate(2)))] += 1


async def slow(port: int, draw: random.Random, count: Counter[str]) -> None:
    kind = draw.choice(("headers", "headers", "body", "reader"))
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    stream = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True, "logprobs": 5}
    whole = request("/v1/completions", stream)
    head, body = whole.split(b"\r\n\r\n", 1)
    given = {"headers": head, "body": body, "reader": b""}[kind]
    try:
        async with asyncio.timeout(HANG_S):
            writer.write({"headers": b"", "body": head + b"\r\n\r\n", "reader": whole}[kind])
            for at in range(len(given)):  # its end never comes
                writer.write(given[at : at + 1] if at + 1 < len(given) else b"")
                await writer.drain()
                await asyncio.sleep(0.5)
                if writer.transport.is_closing():
                    break
            while kind == "reader" and await reader.read(64):
                await asyncio.sleep(0.2)
        count[kind] += 1
    except TimeoutError:
        count[f"{kind}, ended by the client"] += 1
    finally:
        writer.transport.abort()


async def malformed(port: int, draw: random.Random, count: Counter[str]) -> None:
    data = (
        fuzzed(draw)
        if draw.random() < 0.5
        else draw.randbytes(draw.randrange(1, 4000)) + b"\r\n\r\n"
    )
    count[status(await ask(port, data, 3.0))] += 1
    await asyncio.sleep(0.02)


async def grammars(port: int, draw: random.Random, count: Counter[str]) -> None:
    kind, opening = draw.choice(
        (("grammar", 'start: "'), ("guided_grammar", 'root ::= "'), ("regex", "["))
    )
    text = opening + draw.choice(("a", "\\\\", "\\n", "/")) * 60_000
    if kind == "regex":
        extra: dict[str, Any] = {
            "response_format": {"type": "regex_schema", "regex_schema": text[:60_000]}
        }
    else:
        extra = {kind: text[:60_000]}
    count[
        status(
            await ask(port, request("/v1/completions", {"prompt": "x", "max_tokens": 4, **extra}))
        )
    ] += 1


async def brackets(port: int, draw: random.Random, count: Counter[str]) -> None:
    data = draw.choice((b"]", b"}", b"]}", b'"]', b"[]", b"[")) * BIG
    count[
        status(await ask(port, request(draw.choice(("/v1/completions", "/tokenize")), data[:BIG])))
    ] += 1


async def scores(port: int, draw: random.Random, count: Counter[str]) -> None:
    prompts = [
        [draw.randrange(3, 200) for _ in range(draw.choice((60, 250, 1000)))]
        for _ in range(draw.choice((20, 100, 128)))
    ]
    body = {"prompt": prompts, "max_tokens": 0, "echo": True, "prompt_logprobs": 20}
    leave_s = draw.choice((None, 1.0))
    count[
        status(await ask(port, request("/v1/completions", body), leave_s))
        + (", left" if leave_s else "")
    ] += 1


async def counted(port: int, draw: random.Random, count: Counter[str]) -> None:
    """One in ten stays for the answer: there must be one."""
    text = draw.choice((" ", "a", "x y ")) * BIG
    said = [{"role": "user", "content": text[: BIG - 200]}]
    path, body = draw.choice(
        (
            ("/v1/messages/count_tokens", {"model": "demo_model", "messages": said}),
            ("/v1/responses/input_tokens", {"model": "demo_model", "input": text[: BIG - 200]}),
            ("/v1/encode", {"input": text[: BIG - 200]}),
            ("/detokenize", {"tokens": [5] * (BIG // 4)}),
        )
    )
    leave_s = None if draw.random() < 0.1 else draw.uniform(0.1, 1.0)
    count[
        status(await ask(port, request(path, body), leave_s))
        + ("" if leave_s is None else ", left")
    ] += 1


async def items(port: int, draw: random.Random, count: Counter[str]) -> None:
    wrong = [draw.choice(("x", {}, [], None, -1, 1.5, True))] * WRONG
    said = [{"role": "user", "content": "x"}]
    path, body = draw.choice(
        (
            ("/v1/completions", {"prompt": wrong}),
            ("/v1/completions", {"prompt": "x", "stop": wrong}),
            ("/v1/chat/completions", {"messages": wrong}),
            ("/v1/chat/completions", {"messages": said, "tools": wrong}),
            ("/v1/messages", {"model": "demo_model", "max_tokens": 4, "messages": wrong}),
            ("/v1/responses", {"model": "demo_model", "input": wrong}),
            ("/detokenize", {"tokens": wrong}),
        )
    )
    count[status(await ask(port, request(path, body)))] += 1


HOSTILE: dict[str, tuple[int, Client]] = {
    "tokenise": (TOKENISE, tokenise),
    "lists": (LISTS, lists),
    "leave": (LEAVE, leave),
    "slow": (SLOW, slow),
    "malformed": (MALFORMED, malformed),
    "grammars": (GRAMMARS, grammars),
    "brackets": (BRACKETS, brackets),
    "scores": (SCORES, scores),
    "counted": (COUNTED, counted),
    "items": (ITEMS, items),
}


async def hostile(port: int, until: float, kinds: Iterable[str]) -> dict[str, Any]:
    counts = {name: Counter[str]() for name in kinds}

    async def client(name: str, work: Client, seed: str) -> None:
        draw = random.Random(seed)
        while time.time() < until:
            try:
                await work(port, draw, counts[name])
            except (OSError, TimeoutError) as error:
                counts[name][type(error).__name__] += 1
                await asyncio.sleep(0.1)

    clients = [
        client(name, work, f"{name} {n}")
        for name in counts
        for many, work in (HOSTILE[name],)
        for n in range(many)
    ]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, until - time.time())):
            await asyncio.gather(*clients)
    return {name: dict(sorted(count.items())) for name, count in counts.items()}


async def honest(port: int, until: float) -> dict[str, Any]:
    """Answered: whole, and as long as was asked for."""
    took, wrong, again = list[float](), list[str](), 0

    async def client(number: int) -> None:
        nonlocal again
        for turn in itertools.count():
            if time.time() >= until:
                return
            stream = (turn + number) % 2 == 0
            body = {
                "prompt": f"Chapter {turn} of {number}",
                "max_tokens": 32,
                "ignore_eos": True,
                "temperature": 0,
                "stream": stream,
            }
            extra = {"stream_options": {"include_usage": True}} if stream else {}
            began = time.time()
            while True:
                try:
                    answer = await ask(port, request("/v1/completions", body | extra), PATIENCE_S)
                except (OSError, TimeoutError) as error:
                    answer = repr(error).encode()
                if status(answer) not in ("429", "503"):
                    break
                again += 1
                await asyncio.sleep(1)
            if (
                status(answer) == "200"
                and b'"completion_tokens":32' in answer
                and (not stream or b"[DONE]" in answer)
            ):
                took.append(time.time() - began)
            else:
                wrong.append(answer[:200].decode("utf-8", "replace"))

    await asyncio.gather(*(client(number) for number in range(HONEST)))
    return {
        "answered": len(took),
        "not_answered": len(wrong),
        "examples": wrong[:5],
        "asked_again": again,
        **quantiles(took),
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=1000, method="inclusive")
    return {"p50_s": cuts[499], "p99_s": cuts[989], "p999_s": cuts[998], "max_s": max(seconds)}


async def watched(port: int, pid: int, seconds: float) -> dict[str, Any]:
    """How long /health takes, and how late this process itself is woken; memory as it goes by."""
    took, late, wrong, sizes = (
        list[float](),
        list[float](),
        Counter[str](),
        list[tuple[float, int]](),
    )
    began = time.monotonic()
    while (now := time.monotonic()) - began < seconds:
        try:
            wrong[status(await get(port, "/health"))] += 1
        except (OSError, TimeoutError) as error:
            wrong[type(error).__name__] += 1
        took.append(time.monotonic() - now)
        if not sizes or now - sizes[-1][0] > 5:
            sizes.append((now, resident(pid)))
        now = time.monotonic()
        await asyncio.sleep(EVERY_S)
        late.append(time.monotonic() - now - EVERY_S)
    warm = [size for at, size in sizes if at - began >= min(WARM_S, seconds / 4)]
    return {
        "asked": len(took),
        "statuses": dict(wrong),
        **quantiles(took),
        "own_delay": quantiles(late),
        "resident_warm": warm[0],
        "resident_most": max(warm),
    }


async def filled(port: int) -> None:
    """Touches every block of the KV cache, 32 contexts of 1024 tokens: what is touched first later
    on would look like growth."""
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 200) for _ in range(1000)] for _ in range(40)]
    answer = await ask(port, request("/v1/completions", {"prompt": prompts, "max_tokens": 1}))
    assert status(answer) == "200"


def delay(pid: int) -> dict[str, float]:
    """Seconds that the loop's thread has run, and those in which it was ready to and had no
    processor, which others had."""
    run, waited, _ = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()
    return {"ran_s": int(run) / 1e9, "waited_s": int(waited) / 1e9}


async def settled(port: int) -> dict[str, float]:
    """What is left, once it is nothing, or after a minute."""
    for _ in range(120):
        counters, load = (
            await metrics(port),
            json.loads((await get(port, "/load")).rsplit(b"\r\n\r\n", 1)[1]),
        )
        names = ("sequences_running", "sequences_waiting", "kv_blocks_used")
        figures = {
            **{name: counters[f"quantflow_{name}"] for name in names},
            "inside": load["server_load"],
            "sessions": counters["quantflow_sessions"],
        }
        if not any(
            value
            for name, value in figures.items()
            if name != "sessions" and (name != "kv_blocks_used" or not figures["sessions"])
        ):
            break
        await asyncio.sleep(0.5)
    return figures


def connections(port: int) -> int:
    """Those that the server still holds."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(
        line.split()[1].endswith(f":{port:04X}") and line.split()[3] in ("01", "08")
        for line in lines
    )  # established, or half closed


def started(role: str, port: int, until: float, kinds: Iterable[str]) -> subprocess.Popen[str]:
    command = [
        sys.executable, str(Path(__file__)), "--role", role, "--port", str(port), "--until",
        str(until),
    ]  # fmt: skip
    command += (word for kind in kinds for word in ("--only", kind))
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def measure(seconds: float, kinds: Sequence[str]) -> dict[str, Any]:
    admin = "the-admin-of-the-test"
    with tempfile.TemporaryFile("w+") as said:
        command = [
            sys.executable, "-m", "quantflow.cli.main", "serve", str(MODEL), "--port", "0",
            "--max-batch-size", "32",
        ]  # fmt: skip
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, "QUANTFLOW_ADMIN_KEY": admin},
            start_new_session=True,
        )
        try:
            assert process.stdout
            port = int(process.stdout.readline().split()[1].rsplit(":", 1)[1])
            asyncio.run(filled(port))
            others = [
                started(role, port, time.time() + seconds, kinds) for role in ("hostile", "honest")
            ]
            health = asyncio.run(watched(port, process.pid, seconds))
            told = [
                json.loads(other.communicate(timeout=HANG_S + PATIENCE_S)[0]) for other in others
            ]
            asyncio.run(
                ask(port, request("/admin/sessions/end", {}, f"authorization: Bearer {admin}"))
            )
            left = asyncio.run(settled(port))
            time.sleep(6)  # for connections that are kept to end
            left["connections"] = connections(port)
            loop = delay(process.pid)
            growth = resident(process.pid) - health["resident_warm"]
            alive = process.poll() is None
        finally:
            process.terminate()
            process.wait(60)
        lines = [line for line in (said.seek(0), said.read())[1].splitlines() if line]
    return {
        "seconds": seconds,
        "health": health,
        "honest": told[1],
        "hostile": told[0],
        "left": left,
        "loop_thread": loop,
        "resident_growth": growth,
        "resident_growth_allowed": MOST_GROWTH,
        "log_lines": len(lines),
        "exit_code": process.returncode,
        "passed": (
            alive
            and health["p99_s"] < GOAL_S
            and health["statuses"].keys() == {"200"}
            and not told[1]["not_answered"]
            and told[1]["answered"] > 0
            and not any(left.values())
            and growth <= MOST_GROWTH
            and process.returncode == 0
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument(
        "--only",
        action="append",
        choices=list(HOSTILE),
        help="a kind of hostile client; again for more",
    )
    parser.add_argument("--role", choices=("hostile", "honest"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    kinds = args.only or list(HOSTILE)
    if args.role:
        role = (
            hostile(args.port, args.until, kinds)
            if args.role == "hostile"
            else honest(args.port, args.until)
        )
        print(json.dumps(asyncio.run(role)))
        return 0
    import fastapi
    import torch
    import uvicorn

    from quantflow.machine import processor

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
        "machine_load_before": os.getloadavg()[0],
        **measure(args.seconds, kinds),
    }
    print(json.dumps(record, indent=1), flush=True)
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
