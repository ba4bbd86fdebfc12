"""Long texts to tokens and back, in processes of their own: a tokenizer may take minutes and
gigabytes for what one request can hold (a million spaces, or characters of which a normaliser makes
eighteen each), and what runs in a library of this process cannot be stopped.

    python -m quantflow.engine.long_text

reads {"tokenizer": …, "templates": …, "seconds": …}, then a question a line; writes an answer a
line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from tokenizers import Tokenizer

from quantflow.engine.child import Child, ChildEnded, ChildSlow
from quantflow.engine.literal import Literal
from quantflow.errors import Problem, RequestError

# characters, or tokens, that are worth another process: less takes a moment, whatever it is
LONG = 2**14
MOST_SECONDS = 10.0  # of the processor, for one question
WAIT_S = 60.0  # on a clock, where others keep the processor
START_S = 30.0
MOST_BYTES = 2 * 2**30  # of memory, beside the tokenizers
# bytes of a question: after more, a process would keep hundreds of MiB that nobody needs
MOST_KEPT = 2**20
MOST_ANSWER = 2**26  # bytes of an answer

# set once nobody waits for what a thread asks
UNWANTED: ContextVar[threading.Event | None] = ContextVar("unwanted", default=None)


@dataclass(frozen=True)
class Encoded:
    """Tokens as they came: counts: of each text. json: their ids, a list of lists; as it is
    written, since a million numbers take this process a while to read, and most are only passed on.
    Empty where they are too many."""

    counts: list[int]
    json: bytes

    @property
    def ids(self) -> list[list[int]]:
        return list(json.loads(self.json))


class LongTexts:
    """templates: where what was said in a dialogue may be literal (see `literal`). For several
    threads; each waits for a process of its own, of which there are as many as were needed at once.
    Methods raise RequestError for what takes too much, and ChildUnwanted where nobody waits for it
    any longer: see `UNWANTED`."""

    def __init__(self, tokenizer: Tokenizer, templates: Sequence[str] | None = None) -> None:
        self._tokenizer, self._templates = tokenizer, templates
        self._idle: SimpleQueue[Child] = SimpleQueue()

    def encode(
        self,
        prompts: Sequence[str],
        *,
        special: bool,
        literal: bool = False,
        most: int | None = None,
    ) -> Encoded:
        """special: with the tokens that open every text. literal: of dialogues that were rendered
        so. most: tokens of one text; where there are more, there are counts alone."""
        question = {"texts": list(prompts), "special": special, "literal": literal, "most": most}
        try:
            line = json.dumps(question, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # half a surrogate pair
            raise RequestError(
                Problem("prompt", "no valid Unicode text", "text that UTF-8 can hold")
            ) from error
        counts, _, ids = self._ask(
            "prompt", f"{sum(map(len, prompts))} characters", line
        ).partition(b"\t")
        return Encoded(json.loads(counts), ids)

    def decode(self, tokens: list[int]) -> bytes:
        """Their text, special ones left out: a JSON string."""
        # Piece by piece: json holds the interpreter lock for as long as a call runs.
        pieces = (
            json.dumps(tokens[at : at + LONG])[1:-1].encode() for at in range(0, len(tokens), LONG)
        )
        return self._ask("tokens", f"{len(tokens)} tokens", b'{"tokens":[%b]}' % b",".join(pieces))

    def _ask(self, where: str, size: str, line: bytes) -> bytes:
        with self._child() as child:
            try:
                if not child.running:
                    setup = {
                        "tokenizer": self._tokenizer.to_str(),
                        "templates": self._templates,
                        "seconds": MOST_SECONDS,
                    }
                    child.start(json.dumps(setup, ensure_ascii=False).encode(), START_S)
                answer = child.ask(line, WAIT_S, UNWANTED.get()).rstrip(b"\n")
            except (ChildSlow, ChildEnded) as error:
                how = f" (its process: {error})" if isinstance(error, ChildEnded) else ""
                problem = (
                    f"{size}, which take the tokenizer more than {MOST_SECONDS:g} s or"
                    f" {MOST_BYTES >> 20} MiB{how}"
                )
                raise RequestError(Problem(where, problem, "fewer at once")) from error
            if len(line) > MOST_KEPT:
                child.end()
        if answer.startswith(b"!"):
            raise RequestError(Problem(where, f"{size}: {json.loads(answer[1:])}", "fewer at once"))
        return answer

    @contextmanager
    def _child(self) -> Iterator[Child]:
        try:
            child = self._idle.get_nowait()
        except Empty:
            child = Child("quantflow.engine.long_text")
        try:
            yield child
        finally:
            self._idle.put(child)


def answer(tokenizer: Tokenizer, literal: Literal | None, line: bytes) -> bytes:
    """What is written for a line that was read: counts, a tab and ids; or a text; or ! and what is
    wrong."""
    asked = json.loads(line)
    try:
        if "tokens" in asked:
            result = json.dumps(
                tokenizer.decode(asked["tokens"], skip_special_tokens=True), ensure_ascii=False
            ).encode()
        else:
            prompts, special, most = asked["texts"], asked["special"], asked["most"]
            if asked["literal"] and literal:
                ids = [literal.encode(text, special=special) for text in prompts]
            else:
                ids = [tokenizer.encode(text, add_special_tokens=special).ids for text in prompts]
            counts = [len(tokens) for tokens in ids]
            shown = [] if most is not None and max(counts, default=0) > most else ids
            result = b"\t".join(
                json.dumps(part, separators=(",", ":")).encode() for part in (counts, shown)
            )
        return (
            result
            if len(result) <= MOST_ANSWER
            else _wrong(f"more than {MOST_ANSWER >> 20} MiB come of it")
        )
    except MemoryError:
        return _wrong(f"it takes more than {MOST_BYTES >> 20} MiB")
    except BaseException as error:  # the library's panics are no Exceptions
        return _wrong(
            "the tokenizer cannot"
            f" ({(str(error).strip() or type(error).__name__).splitlines()[0][:200]})"
        )


def _wrong(text: str) -> bytes:
    return b"!" + json.dumps(text).encode()


def main() -> None:
    import resource

    # a terminal's Ctrl-C is for who started this; its end closes stdin
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)  # who generates goes first
    setup = json.loads(sys.stdin.buffer.readline())
    tokenizer = Tokenizer.from_str(setup["tokenizer"])
    literal = Literal(tokenizer, setup["templates"]) if setup["templates"] is not None else None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + MOST_BYTES, used + MOST_BYTES))
    result = b""
    while True:
        sys.stdout.buffer.write(result + b"\n")
        sys.stdout.buffer.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        # Its signal ends the process, whatever runs in it: nothing of Python's could.
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        result = answer(tokenizer, literal, line)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
