"""`quantflow serve`: a model over HTTP."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from quantflow.cli.console import RUNNING, console, errors, reporting
from quantflow.cli.options import USUAL, Debug, EngineOptions, ModelDirectory, with_engine_options


class LogLevel(StrEnum):
    error = "error"
    warning = "warning"
    info = "info"
    debug = "debug"


@with_engine_options
def serve(
    model: ModelDirectory,
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen on; 0.0.0.0 is every one of this machine."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")
    ] = 23333,
    engine: EngineOptions = USUAL,
    max_batch_size: Annotated[
        int, typer.Option("--max-batch-size", min=1, help="Texts that are generated at once.")
    ] = 64,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            help="Keys, one a line; else the environment's QUANTFLOW_API_KEY. None: open to all.",
        ),
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(
            "--admin-key-file",
            help="Keys for /admin; else QUANTFLOW_ADMIN_KEY. None: /admin is off.",
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-model-name",
            help="What requests must call the model; may be repeated. None: any name means it.",
        ),
    ] = None,
    max_queue: Annotated[
        int,
        typer.Option("--max-queue", min=0, help="Texts that may wait; more are refused with 429."),
    ] = 256,
    max_body: Annotated[int, typer.Option("--max-body", min=1024, help="Bytes of a request.")] = 4
    * 2**20,
    request_timeout: Annotated[
        float,
        typer.Option(
            "--request-timeout", min=0.1, max=86400.0, help="Seconds that an answer may take."
        ),
    ] = 600.0,
    drain_timeout: Annotated[
        float,
        typer.Option(
            "--drain-timeout",
            min=0.0,
            max=86400.0,
            help="Seconds for running answers after SIGTERM.",
        ),
    ] = 30.0,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            help="Another site whose pages may call this server (CORS); may be repeated.",
        ),
    ] = None,
    no_prefix_cache: Annotated[
        bool,
        typer.Option(
            "--no-prefix-cache",
            help="Compute every prompt anew: nobody can tell by the time what others asked before.",
        ),
    ] = False,
    literal_content: Annotated[
        bool,
        typer.Option(
            "--literal-content",
            help=(
                "What a message spells out (</s>, <|im_end|>) stays text, and is no control token."
            ),
        ),
    ] = False,
    supervised: Annotated[
        bool, typer.Option("--supervised", help="End with exit code 1 when the engine has died.")
    ] = False,
    log_level: Annotated[
        LogLevel, typer.Option("--log-level", help="debug shows every request.")
    ] = LogLevel.info,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP: OpenAI's API, and a chat page."""
    with reporting(debug, RUNNING):
        from quantflow.distribution import missing
        from quantflow.errors import UserError

        if engine.followed():
            return
        try:
            from quantflow.serve.run import start
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("quantflow"):
                raise
            raise UserError(missing("quantflow serve", str(error.name), "serve")) from error
        from quantflow.serve.config import ADMIN_KEY_VARIABLE, KEY_VARIABLE, ServerConfig, keys

        # How to serve.
        config = ServerConfig(
            host=host,
            port=port,
            keys=keys(api_key_file, KEY_VARIABLE),
            admin_keys=keys(admin_key_file, ADMIN_KEY_VARIABLE),
            names=tuple(served_model_name or ()),
            max_queue=max_queue,
            max_body=max_body,
            request_timeout_s=request_timeout,
            drain_timeout_s=drain_timeout,
            origins=tuple(allow_origin or ()),
            literal_content=literal_content,
            supervised=supervised,
            log_level=log_level.value,
        )
        if not config.keys and not config.loopback:
            errors.print(
                f"[bold yellow]warning:[/] {host} can be reached by others, and no key is asked"
                " for: give --api-key-file"
            )
        # Load, warm up, serve.
        code = start(
            model,
            config,
            lambda text: errors.print(text),
            lambda text: console.print(text),
            max_batch_size=max_batch_size,
            prefix_cache=not no_prefix_cache,
            **engine.settings,
        )
    raise typer.Exit(code)
