"""The experts of a class of transformers, each matrix a linear of its own.

transformers 5 holds the experts of a layer in tensors of three dimensions, `gate_up_proj`
`[E, 2I, K]` and `down_proj` `[E, K, I]`, some transposed, some with gate and up row by row in turn.
`Experts` stands in that module's place: statistics, rounding and AWQ then see linears as everywhere
else. What is not a product of matrices (how gate and up become one, a norm behind an expert) is
still the class's own code; that the whole computes what the class does is tried out on one expert
before anything is done with a model.

Names. Where the library's table says that a checkpoint holds expert by expert, these linears have
the checkpoint's names, which artifacts have too: every loader knows them. Where the checkpoint
itself holds three dimensions (gpt-oss, Llama 4, GraniteMoE), no loader has a name for one expert:
these have the usual names here, and are `Joined` again when a checkpoint is written, as plain
numbers, quantised values included. A format that keeps codes has no place for them, and a plan says
so, unless the library itself has a list of experts for that format (Llama 4).

Shapes: `E` experts, `T` tokens, `k` experts of a token, `K` channels that experts read, `I` inner.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from quantflow.models.architecture import Source
from quantflow.models.config import ConfigProblem
from quantflow.models.stored_names import StoredNames

TRIED, FEW = 4, 32  # tokens and channels on which linears are held against the class's own code
SAME = 1e-5
# Attributes by which classes know how many experts they have, and how wide their rows are.
_COUNTS, _WIDTHS = (
    ("num_experts", "num_routed_experts", "total_experts"),
    ("hidden_size", "hidden_dim"),
)


@dataclass(frozen=True)
class Layout:
    """How a class holds its experts.

    transposed: inputs before outputs. interleaved: gate and up row by row in turn. bias: with
    `…_bias` beside each. gated: `gate_up_proj`, else `up_proj`. sorted: it is called with each
    expert's tokens, one expert after the other, zero where a token is not its own.
    """

    transposed: bool = False
    interleaved: bool = False
    bias: bool = False
    gated: bool = True
    sorted: bool = False

    @property
    def first(self) -> str:
        """The tensor that makes the inner channels."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def tensors(self) -> tuple[str, ...]:
        names = (self.first, "down_proj")
        return (*names, *(f"{name}_bias" for name in names)) if self.bias else names


# Of classes that do not say it themselves (`use_experts_implementation`).
LAYOUTS = {
    "Llama4TextExperts": Layout(transposed=True, sorted=True),
    "LongcatFlashExperts": Layout(),
}


def layout_of(module: nn.Module) -> Layout | None:
    """None for what is no module of experts, or none that is known."""
    own = vars(module)
    if "is_transposed" in own and "has_gate" in own:
        return Layout(
            own["is_transposed"], not own["is_concatenated"], own["has_bias"], own["has_gate"]
        )
    return LAYOUTS.get(type(module).__name__)


class _Linear(nn.Linear):
    """One that nobody fills with random numbers."""

    def reset_parameters(self) -> None:
        pass


@dataclass(frozen=True)
class Routed:
    """What experts are called with. rows: `[T, K]`. chosen, weights: of each row, `[T, k]`; an
    expert beyond the last is none."""

    rows: Tensor
    chosen: Tensor
    weights: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Its rows and, in each, its place among the row's experts."""
        tokens, places = (self.chosen == expert).nonzero(as_tuple=True)
        return tokens, places


class Experts(nn.Module):
    """Stands where a layer's experts stood.

    path: of the module in its layer. leaves: names of gate (if there is one), up and down. apart:
    checkpoints hold single experts. turned: they hold inputs and outputs the other way round than
    the class, which takes either. count: of experts. everywhere: linears see every token, whatever
    the router says of it.
    """

    def __init__(
        self, fused: nn.Module, layout: Layout, path: str, leaves: tuple[str, ...], apart: bool
    ) -> None:
        super().__init__()
        for name, value in vars(fused).items():
            if isinstance(value, str | int | float | bool) and not name.startswith("_"):
                setattr(self, name, value)  # blocks ask some for how many they are
        self.path, self.layout, self.leaves, self.apart = path, layout, leaves, apart
        self.everywhere = self.turned = False
        self._class: tuple[Any] = (fused,)  # its tensors are none of this module's
        self._call = inspect.signature(type(fused).forward)
        self.count: int
        self.count, outputs, inputs = fused.get_parameter("down_proj").shape
        if layout.transposed:
            outputs, inputs = inputs, outputs
        self.channels, self.inner_channels = outputs, inputs
        for expert in range(self.count):
            self.add_module(str(expert), self._expert())
        if getattr(fused, "has_post_expert_norm", False):
            self.post_expert_norm = fused.post_expert_norm

    def _expert(self) -> nn.Module:
        expert = nn.Module()
        for leaf in self.leaves:
            sizes = (self.channels, self.inner_channels)
            if leaf == self.leaves[-1]:
                sizes = sizes[::-1]
            expert.add_module(leaf, _Linear(*sizes, bias=self.layout.bias, device="meta"))
        return expert

    def names(self, expert: int) -> tuple[str, ...]:
        """Of its linears, relative to the layer."""
        return tuple(f"{self.path}.{expert}.{leaf}" for leaf in self.leaves)

    def tensor_of(self, linear: str) -> str | None:
        """The class's tensor that holds one of these linears; both relative to the layer."""
        path, _, leaf = linear.rpartition(".")
        if path.rpartition(".")[0] != self.path:
            return None
        return f"{self.path}.{'down_proj' if leaf == self.leaves[-1] else self.layout.first}"

    # What the class computes

    def routed(self, *args: Any, **kwargs: Any) -> Routed:
        bound = self._call.bind(None, *args, **kwargs).arguments
        _, rows, *routing = bound.values()
        if not self.layout.sorted:
            return Routed(rows, *routing)
        own = torch.arange(self.count, device=rows.device).repeat_interleave(
            len(rows) // self.count
        )
        if rows.device.type != "meta":
            own = own.where(rows.any(-1), self.count)
        return Routed(rows, own[:, None], torch.ones_like(rows[:, :1]))

    def inner(self, expert: int, rows: Tensor) -> Tensor:
        """What the expert's `down` reads, `[..., I]`."""
        (fused,), linears = self._class, self.get_submodule(str(expert))
        first = [linears.get_submodule(leaf)(rows) for leaf in self.leaves[:-1]]
        if not self.layout.gated:
            inner: Tensor = fused.act_fn(first[0])
            return inner
        gate, up = first
        if self.layout.sorted or not hasattr(fused, "_apply_gate"):
            inner = fused.act_fn(gate) * up
        elif self.layout.interleaved:
            inner = fused._apply_gate(torch.stack((gate, up), -1).flatten(-2))
        else:
            inner = fused._apply_gate(torch.cat((gate, up), -1))
        return inner

    def outer(self, expert: int, inner: Tensor) -> Tensor:
        """What the expert makes of what its `down` reads."""
        y: Tensor = self.get_submodule(str(expert)).get_submodule(self.leaves[-1])(inner)
        if norm := self._modules.get("post_expert_norm"):
            y = norm(y)
        return y

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        routed = self.routed(*args, **kwargs)
        rows = routed.rows
        out = torch.zeros_like(rows)
        for expert in range(self.count):
            if rows.device.type == "meta":  # nobody is there to be routed
                self.outer(expert, self.inner(expert, rows))
                continue
            tokens, places = routed.of(expert)
            if self.everywhere and not self.layout.sorted:  # all that is given is its own
                y = self.outer(expert, self.inner(expert, rows))[tokens]
            elif len(tokens):
                y = self.outer(expert, self.inner(expert, rows[tokens]))
            else:
                continue
            y = y * routed.weights[tokens, places, None]
            out = out.index_add(0, tokens, y.to(out.dtype))
        return out

    # What it is stored as

    def parts(self, tensor: str, shape: tuple[int, ...] | None = None) -> dict[str, Source]:
        """The experts' tensors, relative to the layer, in the class's `tensor`; none where that has
        another shape in a checkpoint."""
        own, stored = self.shape(tensor), self.stored_shape(tensor)
        if own in (shape, stored):
            return self._parts(tensor, own) if shape in (None, own) else {}
        return self._parts(tensor, stored, turned=True) if shape in (None, stored) else {}

    @property
    def named_in(self) -> frozenset[str]:
        """Quantisation methods for which the library puts a list of experts in this class's
        place."""
        patch = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(self._class[0]).__name__, {})
        return frozenset(str(method.value) for method in patch.get("quantization_methods", ()))

    def shape(self, tensor: str) -> tuple[int, ...]:
        return tuple(self._class[0].get_parameter(tensor).shape)

    def stored_shape(self, tensor: str) -> tuple[int, ...]:
        """In a checkpoint."""
        count, *sizes = self.shape(tensor)
        return (count, *(sizes[::-1] if self.turned else sizes))

    def _parts(
        self, tensor: str, shape: tuple[int, ...], *, turned: bool = False
    ) -> dict[str, Source]:
        bias = tensor.endswith("_bias")
        transposed = self.layout.transposed != turned and not bias
        outputs, every = 1 + transposed, slice(None)
        half = shape[outputs] // 2
        places = {self.leaves[-1]: every}
        if tensor.startswith(self.layout.first):
            parts = [slice(half), slice(half, None)] if self.layout.gated else [every]
            if self.layout.interleaved:
                parts = [slice(0, None, 2), slice(1, None, 2)]
            places = dict(zip(self.leaves[:-1], parts, strict=True))
        return {
            f"{self.path}.{expert}.{leaf}.{'bias' if bias else 'weight'}": Source(
                "",
                shape,
                (expert, every, place) if transposed else (expert, place),
                vector=bias,
                transposed=transposed,
            )
            for expert in range(shape[0])
            for leaf, place in places.items()
        }

    def check(self, name: str) -> None:
        """Raises ConfigProblem unless one expert, taken apart, computes what the class's own code
        does, on random numbers and a few channels. name: of the model's class."""
        (fused,) = self._class
        random = torch.Generator().manual_seed(0)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random) / FEW**0.5

        first = (4 if self.layout.gated else 2) * FEW
        outputs = {self.layout.first: (first, FEW), "down_proj": (FEW, 2 * FEW)}
        whole = {}
        for tensor in self.layout.tensors:
            shape: tuple[int, ...] = outputs[tensor.removesuffix("_bias")]
            shape = shape[::-1] if self.layout.transposed else shape
            if tensor.endswith("_bias"):
                shape = outputs[tensor.removesuffix("_bias")][:1]
            whole[tensor] = numbers(1, *shape)
        norm = {
            n: numbers(FEW)
            for n, _ in fused.named_parameters()
            if n.startswith("post_expert_norm.")
        }
        apart = {
            f"experts{part.removeprefix(self.path)}": source.taken_from(value)
            for tensor, value in whole.items()
            for part, source in self._parts(tensor, tuple(value.shape)).items()
        }
        rows, weights = numbers(TRIED, FEW), numbers(TRIED, 1).abs()
        args = (rows,) if self.layout.sorted else (rows, torch.zeros(TRIED, 1).long(), weights)
        computed = functional_call(
            OneExpert(self, 0), apart | {f"experts.{n}": t for n, t in norm.items()}, rows
        )
        sizes = {n: v for n, v in vars(fused).items() if n in (*_COUNTS, *_WIDTHS)}
        try:
            vars(fused).update({n: 1 if n in _COUNTS else FEW for n in sizes})
            expected = functional_call(fused, whole | norm, args)
        except Exception as error:  # whatever a class does with one expert alone
            raise ConfigProblem(f"experts of {name} cannot be tried out one by one") from error
        finally:
            vars(fused).update(sizes)
        if not self.layout.sorted:
            computed = computed * weights
        off = float((computed - expected).norm() / expected.norm())
        if not off <= SAME:
            raise ConfigProblem(
                f"an expert of {name}, its matrices taken apart, is off by {off:.1e} from what"
                f" {type(fused).__name__} of transformers computes"
            )


class OneExpert(nn.Module):
    """One of the experts, for `functional_call` with its tensors alone."""

    def __init__(self, experts: Experts, expert: int) -> None:
        super().__init__()
        self.experts, self.expert = experts, expert

    def forward(self, rows: Tensor, whole: bool = True) -> Tensor:
        """What it makes of the rows or, unless `whole`, what its last linear reads."""
        inner = self.experts.inner(self.expert, rows)
        return self.experts.outer(self.expert, inner) if whole else inner


def take_apart(
    layers: list[nn.Module], prefix: str, names: StoredNames, model: str
) -> list[Experts]:
    """Puts `Experts` in the place of what `layers` hold in three dimensions, and returns them.
    layers: those at `prefix` in a model of the class `model`. Raises ConfigProblem for what cannot
    be taken apart."""
    taken: list[Experts] = []
    for index, layer in enumerate(layers):
        for path, module in list(layer.named_modules()):
            layout = layout_of(module)
            if layout is None or not all(
                isinstance(getattr(module, name, None), nn.Parameter) for name in layout.tensors
            ):
                continue
            parts = _stored(f"{prefix}.{index}.{path}", module, layout, names, model)
            usual = ("gate_proj", "up_proj", "down_proj")[not layout.gated :]
            experts = Experts(module, layout, path, parts or usual, bool(parts))
            held = [f"{prefix}.{index}.{path}.{tensor}" for tensor in layout.tensors]
            experts.turned = all(map(names.turned, held))
            parent, _, leaf = path.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, experts)
            if not taken:  # one speaks for all
                experts.check(model)
            taken.append(experts)
    return taken


def _stored(
    place: str, module: nn.Module, layout: Layout, names: StoredNames, model: str
) -> tuple[str, ...]:
    """What the checkpoint calls an expert's linears; nothing where it has no names for them.
    Raises ConfigProblem where it holds all in another order than the class."""
    leaves: list[str] = []
    for tensor in layout.tensors:
        held = f"{place}.{tensor}"
        shape = (1, *module.get_parameter(tensor).shape[1:])
        parts = names.taken_apart(held, torch.empty(shape, device="meta"))
        if parts == {names.stored(held): shape} and names.as_it_is(held):
            continue
        if names.turned(held):
            continue
        if any(len(part) > 2 for part in parts.values()) or layout.bias:
            raise ConfigProblem(
                f"a checkpoint of {model} holds {tensor} in another order than its class, which the"
                " pipeline does not follow"
            )
        leaves += [part.removesuffix(".weight").rpartition(".")[2] for part in parts]
    return tuple(leaves)


def experts_of(layer: nn.Module) -> Iterator[Experts]:
    return (module for module in layer.modules() if isinstance(module, Experts))


def routers_of(layer: nn.Module) -> tuple[str, ...]:
    """Modules with a matrix that weighs experts, or what is beside them: in a block of experts, as
    many outputs as there are experts, or one; and what is called a gate or a router there."""
    routers = []
    for experts in experts_of(layer):
        block = experts.path.rpartition(".")[0]
        own = f"{block}." if block else ""
        for name, module in layer.named_modules():
            weight = module._parameters.get("weight")
            if weight is None or weight.dim() != 2 or not name.startswith(own):
                continue
            inside = name.removeprefix(own)
            called = any(word in ("gate", "router") for word in inside.split("."))
            # `total_experts`: with those that do nothing
            counts = (experts.count, getattr(experts, "total_experts", experts.count), 1)
            if f"{name}.".startswith(f"{experts.path}."):
                continue
            if called or (block and "." not in inside and weight.shape[0] in counts):
                routers.append(name)
    return tuple(routers)
