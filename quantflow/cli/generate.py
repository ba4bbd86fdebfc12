"""`quantflow generate`: text from a model, on the terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Annotated

import typer

from quantflow.cli.console import RUNNING, errors, reporting, show_notes
from quantflow.cli.options import (
    USUAL,
    Debug,
    EngineOptions,
    Json,
    ModelDirectory,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    with_engine_options,
)

DEFAULT_TOKENS = 256


@with_engine_options
def generate(
    model: ModelDirectory,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]…",
            help="Texts to go on from; - reads one from stdin, and so does none.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="The same as an option. May be repeated.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="The prompt is a question, put in the model's dialogue format."
        ),
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            help="Tokens to generate; by default 256, or what the context still holds.",
        ),
    ] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="The same seed gives the same text.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Text that ends the output. May be repeated.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show the text as it comes.")] = False,
    engine: EngineOptions = USUAL,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Say what the engine does: mode, device, kernels, KV cache."
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Go on from a text. With an artifact, or any checkpoint that QuantFlow reads."""
    with reporting(debug, RUNNING):
        from quantflow.engine.llm import LLM
        from quantflow.engine.request import SamplingParams
        from quantflow.errors import Problem, RequestError

        if engine.followed():
            return
        # How to choose, and what to go on from.
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=tuple(stop or ()),
        )
        arguments = [*(prompts or ()), *(prompt or ())] or ["-"]
        if not (prompts or prompt) and sys.stdin.isatty():
            hint = "quantflow generate DIR PROMPT, or a text through a pipe"
            raise RequestError(
                Problem(
                    "PROMPT", "none given, and stdin is a terminal", "a text to go on from", hint
                )
            )
        if arguments.count("-") > 1:
            raise RequestError(Problem("PROMPT", "stdin more than once", "- once"))
        if stream and (as_json or len(arguments) > 1):
            raise RequestError(
                Problem("--stream", "with --json or several prompts", "one prompt, shown as text")
            )
        sequences = [_stdin() if text == "-" else text for text in arguments]
        # The engine, and the prompts as its tokens.
        llm = LLM(model, **engine.settings)
        if verbose:
            errors.print(
                ", ".join(f"{name}: {value}" for name, value in llm.engine.describe().items())
            )
        show_notes(llm.engine.notes)
        shown = [llm.get_prompt(text) if chat else text for text in sequences]
        # a dialogue format has its own first tokens
        tokens = [llm.encode(text, special=not chat) for text in shown]
        if max_tokens is None:
            room = llm.engine.room - max(map(len, tokens))
            params = replace(params, max_tokens=max(1, min(DEFAULT_TOKENS, room)))
        # Generate, and show it.
        if stream:
            for token in llm.stream(tokens[0], params):
                print(token.text, end="", flush=True)
            print()
            return
        outputs = llm.generate(tokens, params)
        if as_json:
            print(
                json.dumps(
                    [
                        {"prompt": text, **asdict(output.completions[0])}
                        for text, output in zip(sequences, outputs, strict=True)
                    ]
                )
            )
        else:
            for output in outputs:
                print(output.text)


def _stdin() -> str:
    """What came through the pipe, without the line feed that `echo` puts behind it."""
    return sys.stdin.read().removesuffix("\n")
