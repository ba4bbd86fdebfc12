"""What an outer model calls its layers with, and what stands in for a layer meanwhile."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


@dataclass(frozen=True)
class Call:
    """What a layer is called with beside the hidden states `[B, L, H]`, which came with it.

    per_text: which tensors of it, in the order of `tensors`, have rows for each text; all others
    serve any number of texts.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    per_text: frozenset[int] = frozenset()
    _of: dict[int, Call] = field(default_factory=dict)  # for so many texts

    @property
    def tensors(self) -> list[Tensor]:
        return [v for v in tree_leaves((self.args, self.kwargs)) if isinstance(v, Tensor)]

    def differing(self, other: Call) -> frozenset[int]:
        """Which tensors are others in a call of the same layer."""
        pairs = zip_longest(self.tensors, other.tensors)
        return frozenset(
            n for n, (a, b) in enumerate(pairs) if a is None or b is None or not torch.equal(a, b)
        )

    def of(self, texts: int) -> Call:
        """The same for that many texts, from what one text's layer is called with; the same object
        each time."""
        if texts == 1 or not self.per_text:
            return self
        if texts not in self._of:
            self._of[texts] = self._for(texts)
        return self._of[texts]

    def _for(self, texts: int) -> Call:
        leaves, shape = tree_flatten((self.args, self.kwargs))
        numbers = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for place in (numbers[n] for n in self.per_text if n < len(numbers)):
            leaf: Tensor = leaves[place]
            rest = [1] * (leaf.dim() - 1)
            leaves[place] = (
                leaf.expand(texts, *leaf.shape[1:])
                if len(leaf) == 1
                else leaf.expand(-1, texts, -1)  # positions in time, height and width
                if not leaf.is_floating_point() and leaf.shape[1:-1] == (1,)
                else leaf.repeat(texts, *rest)  # a row for each head of each text
            )
        args, kwargs = tree_unflatten(leaves, shape)
        return Call(self.hidden, args, kwargs)


class Recorder(nn.Module):
    """Stands where a layer stood: `seen` gets what the layer would be called with, and says what it
    hands on. beside: what else a layer hands on, in a tuple; None: it hands on no tuple."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if isinstance(value, str | int | bool) and not name.startswith("_"):
                setattr(self, name, value)  # outer models ask some for their kind of attention
        self.index = index
        self.seen: Callable[[int, Call], Tensor] = lambda index, call: call.hidden
        self.beside: tuple[Any, ...] | None = None
        self._signature = inspect.signature(layer.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        (_, hidden), *rest = self._signature.bind(*args, **kwargs).arguments.items()
        values = dict(rest)  # by their names: the cache is one of them
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                values |= values.pop(name, {})
        hidden = self.seen(self.index, Call(hidden, (), values))
        return hidden if self.beside is None else (hidden, *self.beside)


def stand_ins(model: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """In place of a model's own tensors: numbers that take no room, one row for all."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape[-1:], generator=generator)
        .to(device, dtype)
        .expand(value.shape)
        for name, value in model.named_parameters()
    }
