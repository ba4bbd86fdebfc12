"""From a model directory to a server that answers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

from quantflow.engine.async_llm import AsyncLLM
from quantflow.engine.engine import Engine
from quantflow.engine.request import SamplingParams
from quantflow.errors import Problem, UserError
from quantflow.serve.config import ServerConfig
from quantflow.serve.server import serve
from quantflow.serve.service import Service

WARM_S = 600.0


def start(model: str, config: ServerConfig, note: Callable[[str], None], ready: Callable[[str], None], **options: Any) -> int:
    """Loads, warms up, serves; returns the process's exit code. note: told what happens. ready: told once requests are answered. options:
    those of `EngineConfig`. Raises UserError, ResourceError."""
    began = time.monotonic()
    _check_port(config)
    llm = AsyncLLM(model, **options)
    try:
        note(", ".join(f"{name}: {value}" for name, value in llm.engine.describe().items()))
        llm.call(_warm).result(WARM_S)
        service = Service(llm, config, llm.engine.path.resolve().name)
        seconds = time.monotonic() - began
        return serve(service, lambda address: ready(f"ready: {address} serves {service.name} ({seconds:.1f} s)"))
    finally:
        llm.close()


def _warm(engine: Engine) -> None:
    """One token, so that what is compiled or started at first use is ready; and the chat template's process."""
    engine.submit([0], SamplingParams(max_tokens=1))
    for _ in engine.tokens():
        pass
    if engine.text and engine.text.template:
        engine.text.warm()


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
                Problem(f"{config.host}:{config.port}", reason, "an address of this machine and a free port", "Choose --port")
            ) from error
