"""`quantflow chat`: a dialogue in the terminal, with a model here or behind a server."""

from __future__ import annotations

import re
import sys
from contextlib import closing, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from quantflow.cli.console import HARMLESS, RUNNING, errors, reporting
from quantflow.cli.dialogue import Chat
from quantflow.cli.options import (
    USUAL,
    Debug,
    EngineOptions,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    with_engine_options,
)
from quantflow.cli.partner import Local, Partner, Remote
from quantflow.cli.prompt import piped, typed


@with_engine_options
def chat(
    target: Annotated[
        str,
        typer.Argument(
            metavar="DIR_OR_URL",
            help="Artifact, checkpoint or hub id; or http://HOST:PORT of a server.",
        ),
    ],
    system: Annotated[
        str, typer.Option("--system", help="What the model is told beforehand.")
    ] = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", min=1, help="Tokens of an answer; by default what the context holds."
        ),
    ] = None,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = 40,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="The same seed gives the same answers.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            help="The server's key, its first line; else the environment's QUANTFLOW_API_KEY.",
        ),
    ] = None,
    engine: EngineOptions = USUAL,
    debug: Debug = False,
) -> None:
    """Chat in the terminal. With a model here, or one behind a server.

    Enter sends; Alt+Enter, Ctrl-J, or a text between triple quotes is for several lines; /help says
    more. Out of a pipe, lines up to an empty one, or the end, are a question.
    """
    with reporting(debug, RUNNING):
        parameters = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        partner: Partner
        if is_address(target):
            from quantflow.serve.config import KEY_VARIABLE, keys

            allowed = keys(api_key_file, KEY_VARIABLE)
            partner = Remote(target, allowed[0] if allowed else None)
        else:
            if engine.followed():
                return
            partner = Local(target, parameters, {**engine.settings, "max_batch_size": 1})
        with closing(partner):
            code = talk(Chat(partner, _write, system, parameters))
        if code:
            sys.exit(code)


def is_address(target: str) -> bool:
    """Whether that is a server's, and no directory's or hub id."""
    return "://" in target or (
        bool(re.fullmatch(r"[\w.-]+:\d+(/.*)?", target)) and not Path(target).exists()
    )


def talk(chat: Chat) -> int:
    """Takes turns until the user leaves. The exit code: a user at a terminal has seen what failed,
    a script hears of the first here."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")
        codes = [chat.turn(turn) for turn in piped(sys.stdin)]
        return next(filter(None, codes), 0)
    errors.print(
        f"{chat.partner.name.translate(HARMLESS)}. Enter sends, /help says more, Ctrl-D leaves."
    )
    for turn in typed():
        with suppress(KeyboardInterrupt):  # a second Ctrl-C, when the answer has stopped already
            chat.turn(turn)
    return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
