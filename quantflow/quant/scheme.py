"""How a linear layer is quantised: in which numbers, how many of them share a scale, and what is
done to the activations.

Shapes: `N` output channels, `K` input channels, `g` group size, `G = K / g` groups a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from quantflow.quant.numbers import NUMBERS, QuantizedTensor

PER_CHANNEL = -1  # a group size: one group spans the whole row


@dataclass(frozen=True)
class Scheme:
    """The scheme of one linear.

    bits: of a code. group_size: input channels that share a scale, or `PER_CHANNEL`.
    symmetric: zero is the middle of the numbers.
    kind: of the numbers, a name in `NUMBERS`. double: the scales are quantised themselves.
    activations: how what the linear reads is rounded; None, not at all, is all there is.
    """

    bits: int
    group_size: int
    symmetric: bool
    kind: str = "integer"
    double: bool = False
    activations: None = None

    @property
    def numbers(self) -> type[QuantizedTensor]:
        """What its weights are stored in."""
        return NUMBERS[self.kind]

    @property
    def strategy(self) -> Literal["channel", "group"]:
        """What shares a scale: a whole row, or a group of its input channels."""
        return "channel" if self.group_size == PER_CHANNEL else "group"

    @property
    def levels(self) -> int:
        """The largest code, `2^bits - 1`."""
        return 2**self.bits - 1

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric grid of integers, `2^(bits-1)`."""
        return 2 ** (self.bits - 1)

    def group_of(self, in_features: int) -> int:
        """Input channels in one group of a row of `in_features`."""
        return in_features if self.group_size == PER_CHANNEL else self.group_size

    def groups(self, in_features: int) -> int:
        """Groups in a row of `in_features`; the caller has checked that the group size divides
        it."""
        return in_features // self.group_of(in_features)

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a packed weight `(N, K)`: codes in whole words of 32 bits, and what each group
        has beside them."""
        n, k = shape
        return (
            n * -(-k * self.bits // 32) * 4
            + n * self.groups(k) * self.numbers.group_bits(self) // 8
        )

    def as_list(self) -> list[Any]:
        """As it is written into JSON; `Scheme(*of)` that is the same again."""
        return [self.bits, self.group_size, self.symmetric, self.kind, self.double]

    def __str__(self) -> str:
        return self.numbers.title(
            self, "channel" if self.strategy == "channel" else f"g{self.group_size}"
        )
