"""What a long run tells whoever watches: implemented by the command line, silent by default."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def phase(self, name: str, total: int) -> None:
        """A phase of `total` steps begins."""

    def step(self, detail: str = "") -> None:
        """One step of the phase is done."""

    def note(self, text: str) -> None:
        """Something the user should know now."""


class Silent:
    def phase(self, name: str, total: int) -> None:
        pass

    def step(self, detail: str = "") -> None:
        pass

    def note(self, text: str) -> None:
        pass
