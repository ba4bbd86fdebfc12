"""Scales folded into a decoder layer: what AWQ found, before anything is rounded.

A linear with weight `W`, column scale `c` and row scale `r` becomes `W * c / r` (by column, by
row); whatever feeds it is divided by `c`, so the layer computes the same function.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Folding:
    """columns, rows: linear -> scale. changed: tensors of the layer that are stored anew (norms,
    biases), in their dtype."""

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, linear: str, stored: Tensor) -> Tensor:
        """The folded weight in float32 (float64 if it is stored so), a fresh tensor."""
        weight = stored.to(
            stored.dtype if stored.dtype == torch.float64 else torch.float32, copy=True
        )
        if linear in self.columns:
            weight *= self.columns[linear]
        if linear in self.rows:
            weight /= self.rows[linear][:, None]
        return weight

    def fold_norm(
        self,
        norm: str,
        tensors: dict[str, Tensor],
        readers: list[str],
        scale: Tensor,
        offset: float = 0.0,
    ) -> None:
        """Divides what the norm multiplies by, `offset` + its weight, by `scale`, and multiplies
        every reader's columns by what it was really divided by, once the weight is *stored*.

        In 16 bits the rounded norm is off by up to 0.4%; the ratio of the old factor to the stored
        one is exact.
        """
        name = f"{norm}.weight"
        old = tensors[name]
        new = ((old.float() + offset) / scale - offset).to(old.dtype)
        before, after = old.double() + offset, new.double() + offset
        usable = (after != 0) & (before != 0) & new.isfinite()
        new = torch.where(usable, new, old)
        ratio = torch.where(usable, before / after, 1.0).to(scale.dtype)
        self.changed[name] = new
        if f"{norm}.bias" in tensors:
            bias = tensors[f"{norm}.bias"]
            self.changed[f"{norm}.bias"] = (bias.to(ratio.dtype) / ratio).to(bias.dtype)
        for reader in readers:
            self.columns[reader] = ratio

    def fold_linear(
        self,
        producer: str,
        consumer: str,
        tensors: dict[str, Tensor],
        scale: Tensor,
        expanded: Tensor,
    ) -> None:
        """Divides the producer's rows (and bias) by `scale` `[N]`, and multiplies the consumer's
        columns by `expanded`."""
        self.rows[producer] = scale
        self.columns[consumer] = expanded
        bias = tensors.get(f"{producer}.bias")
        if bias is not None:
            self.changed[f"{producer}.bias"] = (bias.to(scale.dtype) / scale).to(bias.dtype)
