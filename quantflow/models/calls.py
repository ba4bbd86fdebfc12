"""What an outer model calls its layers with, and what stands in for a layer meanwhile."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
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
    kwargs: dict[str, Any]
    per_text: frozenset[int] = frozenset()
    _of: dict[int, Call] = field(default_factory=dict)  # for so many texts

    @property
    def tensors(self) -> list[Tensor]:
        return [v for v in tree_leaves(self.kwargs) if isinstance(v, Tensor)]

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

    def filled(self, values: Mapping[int, Tensor]) -> dict[str, Any]:
        """The arguments with other tensors at some places."""
        leaves, shape = tree_flatten(self.kwargs)
        places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for number, value in values.items():
            leaves[places[number]] = value
        kwargs: dict[str, Any] = tree_unflatten(leaves, shape)
        return kwargs

    def _for(self, texts: int) -> Call:
        leaves, shape = tree_flatten(self.kwargs)
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
        return Call(self.hidden, tree_unflatten(leaves, shape))


class Recorder(nn.Module):
    """Stands where a layer stood: `seen` gets what the layer would be called with, and returns what
    it would hand on."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if isinstance(value, str | int | bool) and not name.startswith("_"):
                setattr(self, name, value)  # outer models ask some for their kind of attention
        self.index = index
        self.seen: Callable[[int, Call], Any] = lambda index, call: call.hidden
        self._signature = inspect.signature(layer.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (_, hidden), *rest = self._signature.bind(*args, **kwargs).arguments.items()
        values = dict(rest)  # by their names: the cache is one of them
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                values |= values.pop(name, {})
        return self.seen(self.index, Call(hidden, values))


def stand_ins(
    model: nn.Module, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[str, Tensor]:
    """In place of a model's own tensors: numbers that take no room. Embeddings have other rows for
    other tokens; elsewhere one row is all rows."""
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tensors = {}
    for name, value in model.named_parameters():
        table = id(value) in tables
        numbers = torch.randn(sum(value.shape) if table else value.shape[-1], generator=generator)
        numbers = numbers.to(device, dtype)
        tensors[name] = (
            numbers.as_strided(value.shape, (1, 1)) if table else numbers.expand(value.shape)
        )
    return tensors
