"""One pass of a layer over a few tokens, without weights: which linears read the same tensor.

A linear is known by `nn.Linear`, a norm by its one vector of weights, and K and V by the layer's
handing them to its cache.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import Tensor, nn

from quantflow.models.experts import experts_of, routers_of
from quantflow.models.segments import Fold, LinearSpec, Role, Segment

# By which a module knows its layer from others of the same kind.
_PLACE = re.compile(r"_.*|\w*(idx|index|layer_id|layer_number|path)")

# Why a linear is in no segment.
_UNCALLED = "a linear that its layer does not call"
_AGAIN = "a linear that its layer calls more than once"
FEWEST_INPUTS = 16  # of what is quantised: a group of fewer would save nothing
_SMALL = f"a linear of fewer than {FEWEST_INPUTS} inputs"

SeenKV = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class KVCache(transformers.DynamicCache):  # type: ignore[misc]
    """Stands where a layer looks for its cache: `seen` gets K and V `[B, kv_heads, L, D]` and
    returns what attention shall use. They are not kept; states of other kinds of layers are, as the
    model's `config` says."""

    def __init__(self, seen: SeenKV, config: Any) -> None:
        super().__init__(config=config)
        self.seen = seen

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return self.seen(key_states, value_states)


@dataclass(frozen=True, eq=False)
class Trace:
    """segments: a layer's, in execution order, with the norms that feed them. cached: after so many
    of them K and V are cached (None: never). kv: (heads, D) of K and of V as they are cached.
    attention: the module that caches them. routers: what weighs experts and is never quantised.
    left: other linears that are in no segment, and why."""

    segments: tuple[Segment, ...]
    cached: int | None
    kv: tuple[tuple[int, int], tuple[int, int]] | None
    attention: str | None = None
    routers: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)


_Read = tuple[tuple[int, ...], int | None]


class Visits(contextlib.ExitStack):
    """Watches one pass of a layer: which linears read which tensor, and which norms made it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # a tensor, and which expert reads it -> its readers
        self._read: dict[_Read, list[tuple[str, nn.Linear]]] = {}
        self._beside: dict[tuple[int, ...], list[str]] = {}  # routers
        self._experts = {
            name: expert
            for experts in experts_of(layer)
            for expert in range(experts.count)
            for name in experts.names(expert)
        }
        self.routers = routers_of(layer)
        self._linears: list[str] = []
        self._norms: dict[tuple[int, ...], str] = {}
        self._alive: list[Tensor] = []  # else the place of one could become another's
        self._cached: int | None = None
        self._kv: tuple[tuple[int, int], tuple[int, int]] | None = None
        self._attention: str | None = None
        self._inside: list[str] = []  # modules that are being called
        for name, module in layer.named_modules():
            self.callback(module.register_forward_pre_hook(self._enter(name)).remove)
            self.callback(module.register_forward_hook(self._leave).remove)
            own = dict(module.named_parameters(recurse=False))
            if name in self.routers:
                hook = module.register_forward_pre_hook(self._router(name))
            elif isinstance(module, nn.Linear):
                self._linears.append(name)
                hook = module.register_forward_pre_hook(self._linear(name))
            elif "weight" in own and own["weight"].dim() == 1:
                hook = module.register_forward_hook(self._norm(name))
            else:
                continue
            self.callback(hook.remove)

    def _enter(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: self._inside.append(name)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside.pop()

    def _key(self, x: Tensor) -> tuple[int, ...]:
        """The same for a tensor and what is a view of all of it."""
        self._alive.append(x)
        return x.untyped_storage()._cdata, int(x.storage_offset()), x.numel(), x.shape[-1]

    def _linear(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def visit(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(module, nn.Linear)
            key = self._key(args[0]), self._experts.get(name)
            self._read.setdefault(key, []).append((name, module))

        return visit

    def _router(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def visit(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._beside.setdefault(self._key(args[0]), []).append(name)

        return visit

    def _norm(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def visit(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                self._norms[self._key(output)] = name

        return visit

    def cached(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self._cached, self._attention = len(self._read), self._inside[-1]
        self._kv = (k.shape[1], k.shape[-1]), (v.shape[1], v.shape[-1])
        return k, v

    def result(self, cut: Callable[[str], int | None], stored: Callable[[str], str]) -> Trace:
        """cut: of a linear, by its name in the class. stored: a module's name in a checkpoint, of
        that in the class; both relative to the layer."""
        names = Counter(name for readers in self._read.values() for name, _ in readers)
        left = {stored(name): _UNCALLED for name in self._linears if name not in names}
        left |= {stored(name): _AGAIN for name, count in names.items() if count > 1}
        left |= {
            stored(name): _SMALL
            for readers in self._read.values()
            for name, module in readers
            if module.in_features < FEWEST_INPUTS
        }
        taken = (
            (key, [reader for reader in readers if stored(reader[0]) not in left])
            for key, readers in self._read.items()
        )
        read = {key: readers for key, readers in taken if readers}
        if self._cached is not None:
            self._cached = sum(key in read for key in list(self._read)[: self._cached])
        self._read = read
        parents = [readers[0][0].rpartition(".")[0] for readers in self._read.values()]
        last = {parent: number for number, parent in enumerate(parents)}
        segments = []
        for number, ((key, expert), readers) in enumerate(self._read.items()):
            parent = parents[number]
            where = "attention" if parent == self._attention else "mlp"
            specs = tuple(
                LinearSpec(
                    stored(name),
                    (module.out_features, module.in_features),
                    module.bias is not None,
                    cut(name),
                )
                for name, module in readers
            )
            fold = None
            if key in self._norms:
                beside = tuple(stored(name) for name in self._beside.get(key, ()))
                fold = Fold(norm=stored(self._norms[key]), beside=beside)
            role = Role(f"{where}_{'out' if last[parent] == number else 'in'}")
            part = _part(specs)
            if expert is not None:
                part = specs[0].name.rsplit(".", 2)[0]
            segments.append(Segment(role, part, specs, fold, expert))
        routers = tuple(stored(name) for name in self.routers)
        attention = None if self._attention is None else stored(self._attention)
        return Trace(tuple(segments), self._cached, self._kv, attention, routers, left)


def kind_of(layer: nn.Module) -> Hashable:
    """What layers that go alike have in common: shapes, and what their modules know of themselves
    but their place."""
    tensors = tuple((name, tuple(t.shape)) for name, t in layer.state_dict().items())
    settings = tuple(
        (path, name, value)
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, str | int | float) and not _PLACE.fullmatch(name)
    )
    return tensors, settings


def _part(specs: tuple[LinearSpec, ...]) -> str:
    """What engines that fuse a segment's linears call them together: `self_attn.qkv`,
    `mlp.gate_up`."""
    if len(specs) == 1:
        return specs[0].name
    parents = {spec.name.rpartition(".")[0] for spec in specs}
    parent = parents.pop() if len(parents) == 1 else ""
    leaves = [spec.name.rpartition(".")[2].removesuffix("_proj") for spec in specs]
    joined = ("" if all(len(leaf) == 1 for leaf in leaves) else "_").join(leaves)
    return f"{parent}.{joined}" if parent else joined
