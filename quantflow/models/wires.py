"""How the layers of a hosted model hang together, besides by their hidden states."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quantflow.models.calls import Call


class Shared(UserDict[Any, Any]):
    """Stands where layers leave tensors for later ones, tuples of them under keys."""


@dataclass
class Wires:
    """How a layer hangs together with others.

    takes: which tensors of its arguments are parts of the row. shares: arguments in which layers
    leave tensors for later ones -> what lies there for this one, without numbers. hands: what it
    hands on in a tuple behind the hidden states, and the next layer reads: place -> part. template:
    what it hands on, without numbers; None: hidden states alone.
    """

    takes: dict[int, str] = field(default_factory=dict)
    shares: dict[str, dict[Any, tuple[Tensor, ...]]] = field(default_factory=dict)
    hands: dict[int, str] = field(default_factory=dict)
    template: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Wiring:
    """Of all layers, for so many texts of a length. calls: what each is called with. parts: what
    goes in rows beside the hidden states."""

    calls: list[Call] = field(default_factory=list)
    wires: list[Wires] = field(default_factory=list)
    parts: dict[str, Tensor] = field(default_factory=dict)


def named(argument: str, key: Any, number: int) -> str:
    """A part that lies in an argument, by its place there."""
    return f"{argument} {key} {number}"
