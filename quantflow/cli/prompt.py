"""What the user of a dialogue says, a turn at a time: typed at a terminal, or out of a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

LEAVE = ("exit", "quit", "/exit", "/quit", "/bye")
QUOTES = '"""'


def piped(lines: Iterable[str]) -> Iterator[str]:
    """Lines up to an empty one, or the end, are a turn. A command, or a word that leaves, is a turn
    of one line."""
    turn: list[str] = []
    for line in lines:
        line = printable(line).rstrip("\r\n")
        if not turn and line.strip() in LEAVE:
            return
        if not turn and line.startswith("/"):
            yield line.strip()
        elif line.strip():
            turn.append(line)
        elif turn:
            yield "\n".join(turn)
            turn = []
    if turn:
        yield "\n".join(turn)


def typed(**places: Any) -> Iterator[str]:
    """What is typed, up to Enter. Ends with Ctrl-D at an empty prompt, or a word that leaves.
    places: `input` and `output`, for tests."""
    session = _session(**places)
    while True:
        try:
            text = unquoted(printable(session.prompt()))
        except EOFError:
            return
        except KeyboardInterrupt:  # before there was a prompt to press it at
            continue
        if text.strip() in LEAVE:
            return
        if text.strip():
            yield text


def printable(text: str) -> str:
    """What is no UTF-8 arrives as surrogates, which no tokenizer and no server takes."""
    return text.encode("utf-8", "replace").decode()


def unfinished(text: str) -> bool:
    """Whether quotes that open a text of several lines are still to be closed."""
    return text.lstrip().startswith(QUOTES) and text.count(QUOTES) % 2 == 1


def unquoted(text: str) -> str:
    """The text without the quotes around it, if those are all, or have lines of their own."""
    bare = text.strip()
    lines = bare.split("\n")
    quoted = bare.startswith(QUOTES) and bare.endswith(QUOTES) and bare.count(QUOTES) == 2
    if quoted or (len(lines) > 2 and lines[0] == lines[-1] == QUOTES):
        return bare[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text.strip("\n")


def _session(**places: Any) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    # Where stdout is a file, the prompt goes to stderr: the file has the answers alone.
    places.setdefault("output", create_output(always_prefer_tty=True))
    return PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        placeholder=[("class:placeholder fg:ansibrightblack", "Ask something, or /help")],
        key_bindings=_keys(),
        enable_suspend=True,
        **places,
    )


def _keys() -> KeyBindings:
    """What differs from a shell's: Enter sends, unless quotes are open or the line ends with a
    backslash. A paste is text, however many lines it has: the terminal says where it begins and
    ends, and no Enter in it is one that was pressed."""
    from prompt_toolkit.application import run_in_terminal
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if (
            buffer.document.current_line_before_cursor.endswith("\\")
            and buffer.document.is_cursor_at_the_end
        ):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        elif unfinished(buffer.text):
            buffer.newline(copy_margin=False)
        elif buffer.text.strip():
            buffer.validate_and_handle()

    @keys.add("c-j")
    @keys.add("escape", "enter")
    def line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c")
    @keys.add("<sigint>")
    def forget(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset(append_to_history=True)  # the arrow upwards brings it back
        else:
            run_in_terminal(lambda: print("Ctrl-D or /bye leaves; /help says more."))

    return keys
