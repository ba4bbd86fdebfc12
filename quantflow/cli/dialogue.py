"""A dialogue in the terminal: questions, answers, and the commands between them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantflow.cli.console import HARMLESS, show
from quantflow.cli.partner import Message, Partner
from quantflow.cli.prompt import QUOTES
from quantflow.errors import OutputError, Problem, QuantFlowError, RequestError


@dataclass
class Chat:
    """One dialogue. write: where what is said goes. parameters: how the partner is to choose
    tokens, by OpenAI's names."""

    partner: Partner
    write: Callable[[str], None]
    system: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    stats: str = "no answer yet"
    _question: str = ""  # the last one, answered or not
    _answered: bool = False

    def turn(self, text: str) -> int:
        """A command, or something that is said to the model. What is wrong with it is shown, and
        changes nothing; its exit code, or 0."""
        try:
            if COMMAND.fullmatch(text):
                self.command(text)
            else:
                self.say(text)
        except QuantFlowError as error:
            show(error.problems)
            return error.exit_code
        return 0

    def say(self, text: str) -> None:
        """One question and its answer. Without one, neither is a part of the dialogue; an answer
        that the user stopped is. Raises QuantFlowError where there is no answer, or half of one."""
        self._question, self._answered = text, False
        asked = [*self._beforehand(), *self.messages, {"role": "user", "content": text}]
        began, first, pieces, stopped = time.monotonic(), 0.0, list[str](), False
        try:
            for piece in self.partner.stream(asked, self.parameters):
                if not first and piece:
                    first = time.monotonic() - began
                pieces.append(piece)
                self.write(piece.translate(HARMLESS))
        except KeyboardInterrupt:
            stopped = True
        except QuantFlowError:
            self.write(" [not finished, and forgotten: /regen asks again]\n" if pieces else "\n")
            raise
        self.write(" [stopped]\n\n" if stopped else "\n\n")
        self._answered = True
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "".join(pieces)},
        ]
        self._measure(time.monotonic() - began, first)

    def _measure(self, seconds: float, first: float) -> None:
        prompt, generated = self.partner.tokens
        speed = (
            f", {(generated - 1) / (seconds - first):.1f} tokens/s"
            if generated > 1 and seconds > first
            else ""
        )
        self.stats = (
            f"prompt {prompt} tokens, answer {generated} tokens, first after {first:.2f} s,"
            f" {seconds:.2f} s in all{speed}"
        )

    def _beforehand(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def command(self, line: str) -> None:
        """What begins with a slash. Raises QuantFlowError."""
        name, _, rest = line.partition(" ")
        name = SYNONYMS.get(name, name)
        if name not in COMMANDS:
            hint = f"A text that begins so stands between {QUOTES}"
            raise RequestError(Problem(name, "no command", f"{', '.join(COMMANDS)} or /bye", hint))
        COMMANDS[name].does(self, rest.strip())

    def set_system(self, text: str) -> None:
        self.system = text or self.system
        self.write(f"{self.system or 'no system prompt'}\n")

    def set_parameter(self, text: str) -> None:
        """`temperature 0.2`; ollama's `parameter temperature 0.2` and `system TEXT` too. Nothing:
        shows what is set."""
        name, _, value = text.removeprefix("parameter ").strip().partition(" ")
        if name == "system":
            self.set_system(value.strip().strip('"'))
            return
        if name:
            if name not in KINDS:
                raise RequestError(Problem("/set", repr(name), ", ".join(KINDS)))
            changed = {**self.parameters, name: _number(name, value.strip())}
            self.partner.check(changed)
            self.parameters = changed
        shown = {name: self.parameters.get(name) for name in ([name] if name else KINDS)}
        self.write(
            "".join(
                f"{name} {'none' if value is None else value}\n" for name, value in shown.items()
            )
        )

    def clear(self, text: str) -> None:
        self.messages, self._question, self._answered = [], "", False
        self.write("a new dialogue\n")

    def regenerate(self, text: str) -> None:
        """The last question once more. Its answer goes only where there is another."""
        if not self._question:
            raise RequestError(Problem("/regen", "nothing has been asked", "a question first"))
        before, answered = self.messages, self._answered
        self.messages = before[:-2] if answered else before[:]
        try:
            self.say(self._question)
        except QuantFlowError:
            self.messages, self._answered = before, answered
            raise

    def save(self, name: str) -> None:
        if not name:
            raise RequestError(Problem("/save", "no file", "its name"))
        file, messages = Path(name), [*self._beforehand(), *self.messages]
        text = "\n".join(f"{m['role']}: {m['content']}\n" for m in messages)
        if file.suffix == ".json":
            text = json.dumps(messages, ensure_ascii=False, indent=1) + "\n"
        try:
            file.write_text(text, encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: a name with a null byte
            raise OutputError(
                Problem(str(file), str(error), "a place that can be written to")
            ) from error
        self.write(f"{len(messages)} messages in {file}\n")

    def tell_stats(self, text: str) -> None:
        self.write(f"{self.stats}\n")

    def help(self, text: str) -> None:
        rows = [(command.usage, command.words) for command in COMMANDS.values()] + [
            ("/bye", "leaves, as Ctrl-D does")
        ]
        self.write("".join(f"  {usage:<18} {words}\n" for usage, words in rows) + KEYS)


@dataclass(frozen=True)
class Command:
    usage: str
    words: str
    does: Callable[[Chat, str], None]


COMMANDS = {
    command.usage.split()[0]: command
    for command in (
        Command(
            "/set NAME VALUE",
            "how tokens are chosen; without NAME: what can be set, and is",
            Chat.set_parameter,
        ),
        Command(
            "/system TEXT",
            "what the model is told beforehand; without TEXT: shows it",
            Chat.set_system,
        ),
        Command("/clear", "begins a new dialogue", Chat.clear),
        Command("/regen", "answers the last question anew", Chat.regenerate),
        Command(
            "/save FILE",
            "writes the dialogue: JSON where the name ends in .json, else text",
            Chat.save,
        ),
        Command("/stats", "tokens and speed of the last answer", Chat.tell_stats),
        Command("/help", "this", Chat.help),
    )
}

SYNONYMS = {"/reset": "/clear", "/?": "/help"}

COMMAND = re.compile(r"/[a-z_?]*(?: .*)?")  # of one line, and no path

KEYS = f"""
  Enter sends. Alt+Enter, Ctrl-J or a \\ before Enter begins a line; or write {QUOTES} before and
  after several lines.
  A paste is not sent before you press Enter. Ctrl-C stops an answer, or forgets what you wrote.
"""

KINDS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "max_tokens": int,
    "repetition_penalty": float,
    "seed": int,
}


def _number(name: str, text: str) -> float | int | None:
    if text == "none" and name in ("max_tokens", "seed"):
        return None
    try:
        return KINDS[name](text)
    except ValueError:
        kind = "a number" if KINDS[name] is float else "an integer"
        raise RequestError(Problem(f"/set {name}", repr(text), kind)) from None
