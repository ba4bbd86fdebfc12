"""`quantflow chat`: a dialogue in the terminal, with a model here or behind a server."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from quantflow.cli.console import HARMLESS, RUNNING, console, errors, reporting, show, show_notes
from quantflow.cli.options import (
    KV,
    CacheShare,
    Debug,
    Device,
    DeviceOption,
    DialogueName,
    Eager,
    KVOption,
    Mode,
    ModeOption,
    SessionLength,
    TensorParallel,
)
from quantflow.errors import OutputError, Problem, QuantFlowError, RequestError

Message = dict[str, str]

HELP = """\
An empty line sends what you wrote. exit leaves; Ctrl-C stops an answer.
  /system TEXT   what the model is told beforehand; without TEXT: shows it
  /reset         begins a new dialogue
  /save FILE     writes the dialogue: JSON where the name ends in .json, else text
  /stats         tokens and speed of the last answer
  /help"""


class Partner(Protocol):
    """Who answers. tokens: of the last prompt and the last answer."""

    name: str
    tokens: tuple[int, int]

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        """The pieces of an answer. Raises QuantFlowError, and KeyboardInterrupt at a moment when that harms nothing."""
        ...

    def close(self) -> None:
        """There will be no further turn."""
        ...


class Local:
    """A model in this process."""

    def __init__(self, model: str, parameters: dict[str, Any], options: dict[str, Any]) -> None:
        from quantflow.engine.llm import LLM
        from quantflow.engine.request import SamplingParams

        self._params = SamplingParams(**parameters)
        self._llm = LLM(model, **options)
        self._llm.get_prompt("")  # says at once if the model has no dialogue format
        self.name = self._llm.engine.path.resolve().name
        self.tokens = (0, 0)
        errors.print(", ".join(f"{name}: {value}" for name, value in self._llm.engine.describe().items()))
        show_notes(self._llm.engine.notes)

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        prompt = self._llm.engine.tokenizer.dialogue(messages)
        self.tokens = (len(prompt), 0)
        with _flagged() as interrupted:
            for token in self._llm.stream(prompt, self._params):
                self.tokens = (len(prompt), self.tokens[1] + (token.token is not None))
                yield token.text
                if interrupted():
                    raise KeyboardInterrupt

    def close(self) -> None:
        pass


@contextmanager
def _flagged() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted rather than raised in the middle of a step of the engine. The second one is raised."""
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


class Remote:
    """A model behind a server."""

    def __init__(self, address: str, key: str | None, parameters: dict[str, Any]) -> None:
        from quantflow.serve.client import Client

        self._client = Client(address, key)
        self.name = self._client.model()
        self._parameters = {"model": self.name, **{name: value for name, value in parameters.items() if value is not None}}
        self.tokens = (0, 0)

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        self.tokens = (0, 0)
        yield from self._client.stream(messages, self._parameters)
        usage = self._client.usage
        self.tokens = (usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))

    def close(self) -> None:
        self._client.close()


@dataclass
class Chat:
    """One dialogue. write: where what is said goes."""

    partner: Partner
    write: Callable[[str], None]
    system: str = ""
    messages: list[Message] = field(default_factory=list)
    stats: str = "no answer yet"

    def say(self, text: str) -> None:
        """One turn. What the model could not answer is not a part of the dialogue; an answer that was stopped is."""
        asked = [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages, {"role": "user", "content": text}]
        began, first, pieces, stopped = time.monotonic(), 0.0, list[str](), False
        try:
            for piece in self.partner.stream(asked):
                if not first and piece:
                    first = time.monotonic() - began
                pieces.append(piece)
                self.write(piece.translate(HARMLESS))
        except KeyboardInterrupt:
            stopped = True
        except QuantFlowError as error:
            self.write("\n")
            show(error.problems)
            return
        self.write(" [stopped]\n\n" if stopped else "\n\n")
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(pieces)}]
        self._measure(time.monotonic() - began, first)

    def _measure(self, seconds: float, first: float) -> None:
        prompt, generated = self.partner.tokens
        speed = f", {(generated - 1) / (seconds - first):.1f} tokens/s" if generated > 1 and seconds > first else ""
        self.stats = f"prompt {prompt} tokens, answer {generated} tokens, first after {first:.2f} s, {seconds:.2f} s in all{speed}"

    def command(self, line: str) -> None:
        """What begins with a slash. Raises RequestError, OutputError."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/system":
            self.system = rest or self.system
            self.write(f"{self.system or 'no system prompt'}\n")
        elif name == "/reset":
            self.messages.clear()
            self.write("a new dialogue\n")
        elif name == "/save":
            self.save(Path(rest))
        elif name == "/stats":
            self.write(f"{self.stats}\n")
        elif name == "/help":
            self.write(f"{HELP}\n")
        else:
            raise RequestError(Problem(name, "no command", "/system, /reset, /save, /stats, /help or exit"))

    def save(self, file: Path) -> None:
        if not file.name:
            raise RequestError(Problem("/save", "no file", "its name"))
        messages = [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]
        text = "\n".join(f"{m['role']}: {m['content']}\n" for m in messages)
        if file.suffix == ".json":
            text = json.dumps(messages, ensure_ascii=False, indent=1) + "\n"
        try:
            file.write_text(text, encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: a name with a null byte
            raise OutputError(Problem(str(file), str(error), "a place that can be written to")) from error
        self.write(f"{len(messages)} messages in {file}\n")


def turns(read: Callable[[], str]) -> Iterator[str]:
    """What the user says, a turn at a time: lines up to an empty one. Commands and `exit` are turns of one line. read: the next line;
    raises EOFError at the end, KeyboardInterrupt where the line is to be forgotten."""
    lines: list[str] = []
    while True:
        try:
            line = read().encode("utf-8", "replace").decode()  # what is no UTF-8 arrives as surrogates
        except KeyboardInterrupt:
            if not lines:
                errors.print("\nexit leaves")
            lines = []
            continue
        except EOFError:
            if lines:
                yield "\n".join(lines)
            return
        alone = not lines
        if alone and line.strip() in ("exit", "quit", "/exit", "/quit"):
            return
        if alone and line.startswith("/"):
            yield line.strip()
        elif line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []


def chat(
    target: Annotated[str, typer.Argument(metavar="DIR_OR_URL", help="Artifact, checkpoint or hub id; or http://HOST:PORT of a server.")],
    system: Annotated[str, typer.Option("--system", help="What the model is told beforehand.")] = "",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Tokens of an answer; by default what the context holds.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0: the likeliest token each time.")] = 0.8,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens that together have this probability.")] = 0.95,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw from this many tokens; 0: all.")] = 40,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty", help="More than 1: fewer repetitions.")] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same answers.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="The server's key, its first line; else the environment's QUANTFLOW_API_KEY.")
    ] = None,
    mode: ModeOption = Mode.exact,
    kv: KVOption = KV.auto,
    session_len: SessionLength = None,
    cache_max_entry_count: CacheShare = None,
    tp: TensorParallel = 1,
    dialogue: DialogueName = None,
    eager: Eager = False,
    device: DeviceOption = Device.auto,
    debug: Debug = False,
) -> None:
    """Chat in the terminal. With a model here, or one behind a server."""
    with reporting(debug, RUNNING):
        parameters = {
            "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty,
            "seed": seed,
        }  # fmt: skip
        partner: Partner
        if target.startswith(("http://", "https://")):
            from quantflow.serve.config import KEY_VARIABLE, keys

            found = keys(api_key_file, KEY_VARIABLE)
            partner = Remote(target, found[0] if found else None, parameters)
        else:
            from quantflow.engine.follower import follow
            from quantflow.engine.tensor_parallel import follows
            from quantflow.machine import resolve_device

            if follows():  # torchrun has started this one to help the first
                follow(resolve_device(device.value))
                return
            options = {
                "mode": mode.value, "kv": kv.value, "session_len": session_len, "cache_max_entry_count": cache_max_entry_count, "tp": tp,
                "dialogue": dialogue, "device": device.value, "graphs": not eager, "max_batch_size": 1,
            }  # fmt: skip
            partner = Local(target, parameters, options)
        with closing(partner):
            talk(Chat(partner, _write, system))


def talk(chat: Chat) -> None:
    """Reads turns until the user leaves."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 - gives input() its editing keys and history

        console.print(f"{chat.partner.name.translate(HARMLESS)}. {HELP}")
    for turn in turns(lambda: input("> " if interactive else "")):
        if turn.startswith("/"):
            try:
                chat.command(turn)
            except QuantFlowError as error:
                show(error.problems)
        else:
            chat.say(turn)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
