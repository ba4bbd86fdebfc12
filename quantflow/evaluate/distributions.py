"""KL divergence of models' outputs, some positions at a time: what every measurement here sums.

Shapes: `T` positions, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantflow.decoder.stream import Stream

LOGIT_ELEMENTS = 2**23  # logits computed at once, an upper bound


class Head(Protocol):
    """From hidden states to distributions."""

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""

    def __call__(self, x: Tensor) -> Tensor:
        """Log-probabilities `[T, V]` in float32 of hidden states `[T, H]`."""


@dataclass(frozen=True)
class Output:
    """A model's hidden states after the last layer, of all windows, and the head that reads
    them."""

    states: Stream
    head: Head


@dataclass(frozen=True)
class Compared:
    """Some positions, of all windows one after the other. reference, other: log-probabilities
    `[T, V]`. kl: KL(reference || other) in nats, `[T]`."""

    positions: slice
    reference: Tensor
    other: Tensor
    kl: Tensor


def compared(reference: Output, others: Sequence[Output]) -> Iterator[tuple[int, Compared]]:
    """(which of `others`, how it compares) for all positions, in order. The reference's logits are
    computed once for all others."""
    rows = max(1, LOGIT_ELEMENTS // reference.head.vocabulary)
    for start, states in _rows([output.states for output in (reference, *others)], rows):
        expected = reference.head(states[0])
        likely, positions = expected.exp(), slice(start, start + len(expected))
        for number, other in enumerate(others):
            logprobs = other.head(states[1 + number])
            kl = (likely * (expected - logprobs)).sum(-1)
            if number == len(others) - 1:
                del likely  # each of these is as large as LOGIT_ELEMENTS says
            yield number, Compared(positions, expected, logprobs, kl)
            del logprobs


def mean_divergences(reference: Output, others: Sequence[Output]) -> list[float]:
    """KL(reference || other) in nats a token, the mean over all positions, of each of `others`."""
    parts: list[list[Tensor]] = [[] for _ in others]
    for number, part in compared(reference, others):
        parts[number].append(part.kl)
    return [mean(torch.cat(of_one)) for of_one in parts]


def mean(kl: Tensor) -> float:
    """Of a divergence at every position, summed in float64."""
    return float(kl.double().mean())


def _rows(streams: Sequence[Stream], count: int) -> Iterator[tuple[int, list[Tensor]]]:
    """(the first position, `count` rows of each stream `[count, H]`), across windows; fewer at the
    end."""
    windows, length, _ = streams[0].shape
    first, left = 0, [stream.read(0, 0).flatten(0, 1) for stream in streams]
    for start, stop in streams[0].spans(max(1, count // length)):
        held = [
            torch.cat([rest, stream.read(start, stop).flatten(0, 1)])
            for rest, stream in zip(left, streams, strict=True)
        ]
        most = len(held[0])
        whole = most if stop == windows else most // count * count
        for at in range(0, whole, count):
            yield first + at, [rows[at : at + count] for rows in held]
        first, left = first + whole, [rows[whole:] for rows in held]
