"""What a long run tells whoever watches: implemented by the command line, silent by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """What a long run tells: an object with these four methods hears all of it, in the caller's
    thread."""

    def phase(self, name: str, total: int, unit: str = "steps") -> None:
        """A phase of `total` steps begins. unit: what they are, in the plural: "layers"."""

    def advance(self, share: float, detail: str = "") -> None:
        """A share of a step is done. Shares add up to steps of themselves; `step` ends one whatever
        they say."""

    def step(self, detail: str = "") -> None:
        """One step of the phase is done."""

    def note(self, text: str) -> None:
        """Something the user should know now."""


class Silent:
    def phase(self, name: str, total: int, unit: str = "steps") -> None:
        pass

    def advance(self, share: float, detail: str = "") -> None:
        pass

    def step(self, detail: str = "") -> None:
        pass

    def note(self, text: str) -> None:
        pass


def within_step(progress: Progress, parts: int) -> Callable[[str], None]:
    """Tells that one of `parts` equal parts of the step is done, with its name."""
    return lambda detail: progress.advance(1 / max(1, parts), detail)
