"""What goes from layer to layer of a hosted model, as one row for each token.

Most layers hand on hidden states alone, `[B, L, H]`. Some models have more: several hidden states
of a token side by side (AltUp), what the outer model makes of the text for each layer (per-layer
inputs), what layers leave for later ones (shared K and V, indices). All of that has a part for each
token, so that it fits into the row of its hidden states, behind them: streams, the store, resuming
and comparing carry rows, and need not know what is in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A tensor of which each token has a part.

    shape: of one text's. texts, tokens: which axis is which. dtype: of numbers; others than the
    row's own are kept in the row as they lie in memory.
    """

    shape: tuple[int, ...]
    texts: int
    tokens: int
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """Of a token."""
        return math.prod(self.shape) // self.shape[self.tokens]

    def channels(self, dtype: torch.dtype) -> int:
        """That it takes of a row of `dtype`."""
        return self.numbers if self.dtype == dtype else self.numbers * (4 // dtype.itemsize)

    def packed(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B, L, channels]`."""
        rows = value.movedim((self.texts, self.tokens), (0, 1))
        rows = rows.reshape(*rows.shape[:2], self.numbers)
        if value.dtype == dtype == self.dtype:
            return rows
        return rows.to(self._stored).contiguous().view(dtype)

    def unpacked(self, rows: Tensor) -> Tensor:
        if rows.dtype != self.dtype:
            rows = rows.contiguous().view(self._stored).to(self.dtype)
        rest = [n for axis, n in enumerate(self.shape) if axis not in (self.texts, self.tokens)]
        value = rows.reshape(*rows.shape[:2], *rest)
        return value.movedim((0, 1), (self.texts, self.tokens)).contiguous()

    @property
    def _stored(self) -> torch.dtype:
        return torch.float32 if self.dtype.is_floating_point else torch.int32


@dataclass(frozen=True)
class Rows:
    """The layout of a row: hidden states first, then the other parts by their names."""

    hidden: Part
    beside: Mapping[str, Part]

    @property
    def plain(self) -> bool:
        """Whether a row is a token's one hidden state."""
        return not self.beside and len(self.hidden.shape) == 3

    def channels(self, dtype: torch.dtype) -> int:
        return sum(part.channels(dtype) for part in (self.hidden, *self.beside.values()))

    def split(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states as layers take them, and the other parts, of rows `[B, L, channels]`."""
        if self.plain:
            return x, {}
        parts = (self.hidden, *self.beside.values())
        hidden, *others = x.split([part.channels(x.dtype) for part in parts], dim=-1)
        beside = zip(self.beside.items(), others, strict=True)
        return (
            self.hidden.unpacked(hidden),
            {name: part.unpacked(rows) for (name, part), rows in beside},
        )

    def join(self, hidden: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        """Rows again, in the dtype of the hidden states."""
        if self.plain:
            return hidden
        parts = [
            (self.hidden, hidden),
            *((self.beside[name], beside[name]) for name in self.beside),
        ]
        return torch.cat([part.packed(value, hidden.dtype) for part, value in parts], dim=-1)

    def empty(self, texts: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The other parts before anybody has made them."""
        return {
            name: torch.zeros(
                [texts if axis == part.texts else n for axis, n in enumerate(part.shape)],
                dtype=part.dtype,
                device=device,
            )
            for name, part in self.beside.items()
        }

    def random(self, generator: torch.Generator) -> Tensor:
        """The rows of one text in float32: random numbers, and no index beyond the first."""
        values = {
            name: torch.randn(part.shape, generator=generator).to(part.dtype)
            if part.dtype.is_floating_point
            else torch.zeros(part.shape, dtype=part.dtype)
            for name, part in {**self.beside, "": self.hidden}.items()
        }
        return self.join(values.pop(""), values)

    def comparable(self, x: Tensor) -> Tensor:
        """Of rows `x`, what can be compared number by number: all but indices."""
        parts = (self.hidden, *self.beside.values())
        split = x.split([part.channels(x.dtype) for part in parts], dim=-1)
        return torch.cat(
            [rows for part, rows in zip(parts, split, strict=True) if part.dtype == x.dtype], dim=-1
        )
