"""From a model directory to a server that answers."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Callable
from typing import Any

from quantflow.engine.async_llm import AsyncLLM
from quantflow.engine.engine import Engine
from quantflow.engine.request import SamplingParams
from quantflow.errors import Problem, ResourceError, UserError
from quantflow.serve.app import CLOSE_S
from quantflow.serve.config import ServerConfig
from quantflow.serve.server import serve
from quantflow.serve.service import Service

WARM_S = 600.0


def start(
    model: str,
    config: ServerConfig,
    note: Callable[[str], None],
    ready: Callable[[str], None],
    **options: Any,
) -> int:
    """Loads, warms up, serves; returns the process's exit code. note: told what happens. ready:
    told once requests are answered. options: those of `EngineConfig`. Raises UserError,
    ResourceError."""
    began = time.monotonic()
    _check_port(config)
    llm = AsyncLLM(model, **options)
    try:
        note(", ".join(f"{name}: {value}" for name, value in llm.engine.describe().items()))
        for odd in llm.engine.notes:
            note(f"note: {odd}")
        _warm(llm)
        if config.literal_content and llm.engine.text:
            _ = llm.engine.text.literal  # whether it can be had
        gc.collect()
        # what is there by now stays: to look through it for garbage takes a third of a second, in
        # which nobody is answered
        gc.freeze()
        service = Service(llm, config, llm.engine.path.resolve().name)
        seconds = time.monotonic() - began
        code = serve(
            service,
            lambda address: ready(f"ready: {address} serves {service.name} ({seconds:.1f} s)"),
        )
    finally:
        ended = llm.close(CLOSE_S)
    if not ended:
        note("the engine hangs and was left behind")
    return code if ended else 1


def _warm(llm: AsyncLLM) -> None:
    """One token, so that what is compiled or started at first use is ready, and a model that cannot
    run is noticed; and the chat template's process. Raises ResourceError."""

    def generate(engine: Engine) -> None:
        engine.submit([0], SamplingParams(max_tokens=1))
        for token in engine.tokens():
            if token.finish and token.finish.failed:
                raise ResourceError(Problem("the first token", token.reason))
        if engine.text:
            engine.text.warm()

    try:
        llm.call(generate).result(WARM_S)
    except TimeoutError:
        raise ResourceError(Problem("the first token", f"not there after {WARM_S:g} s")) from None


def _check_port(config: ServerConfig) -> None:
    """Before minutes are spent on loading."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                Problem(
                    f"{config.host}:{config.port}",
                    reason,
                    "an address of this machine and a free port",
                    "Choose --port",
                )
            ) from error
