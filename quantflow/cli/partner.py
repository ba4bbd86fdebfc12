"""Who answers in `quantflow chat`: a model in this process, or one behind a server."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from quantflow.cli.console import errors, show_notes

Message = dict[str, str]

Parameters = Mapping[str, Any]


class Partner(Protocol):
    """Who answers. tokens: of the last prompt and the last answer."""

    name: str
    tokens: tuple[int, int]

    def check(self, parameters: Parameters) -> None:
        """Raises RequestError for sampling parameters that this partner would refuse, as far as it
        is known here."""
        ...

    def stream(self, messages: Sequence[Message], parameters: Parameters) -> Iterator[str]:
        """The pieces of an answer. Raises QuantFlowError, and KeyboardInterrupt at a moment when
        that harms nothing."""
        ...

    def close(self) -> None:
        """There will be no further turn."""
        ...


class Local:
    """A model in this process."""

    def __init__(self, model: str, parameters: Parameters, options: dict[str, Any]) -> None:
        from quantflow.engine.llm import LLM

        self.check(parameters)
        self._llm = LLM(model, **options)
        self._llm.get_prompt("")  # says at once if the model has no dialogue format
        self.name = self._llm.engine.path.resolve().name
        self.tokens = (0, 0)
        errors.print(
            ", ".join(f"{name}: {value}" for name, value in self._llm.engine.describe().items())
        )
        show_notes(self._llm.engine.notes)

    def check(self, parameters: Parameters) -> None:
        from quantflow.engine.request import SamplingParams

        SamplingParams(**parameters)

    def stream(self, messages: Sequence[Message], parameters: Parameters) -> Iterator[str]:
        from quantflow.engine.request import SamplingParams

        prompt = self._llm.engine.tokenizer.dialogue(messages)
        self.tokens = (len(prompt), 0)
        with _flagged() as interrupted:
            for token in self._llm.stream(prompt, SamplingParams(**parameters)):
                self.tokens = (len(prompt), self.tokens[1] + (token.token is not None))
                yield token.text
                if interrupted():
                    raise KeyboardInterrupt

    def close(self) -> None:
        pass


@contextmanager
def _flagged() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted rather than raised in the middle of a step of the engine. The second one is
    raised."""
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

    def __init__(self, address: str, key: str | None) -> None:
        from quantflow.serve.client import Client

        self._client = Client(address, key)
        self.name = self._client.model()
        self.tokens = (0, 0)

    def check(self, parameters: Parameters) -> None:
        pass  # the server says what it does not take

    def stream(self, messages: Sequence[Message], parameters: Parameters) -> Iterator[str]:
        self.tokens = (0, 0)
        stated = {name: value for name, value in parameters.items() if value is not None}
        yield from self._client.stream(messages, {"model": self.name, **stated})
        self.tokens = (self._counted("prompt_tokens"), self._counted("completion_tokens"))

    def _counted(self, name: str) -> int:
        count = self._client.usage.get(name)
        return count if isinstance(count, int) else 0

    def close(self) -> None:
        self._client.close()
