"""The linears of a model's decoder, and in which numbers each is to be stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.formats import FORMATS
from quantflow.quant.numbers import NUMBERS
from quantflow.quant.scheme import Scheme
from quantflow.recipe import Recipe, Weights
from quantflow.recipe.overrides import matches
from quantflow.stages.pack import Pack
from quantflow.stages.rounding import rounding_stage

ROUTER = "the router"
# of a format, where a checkpoint holds all experts in one tensor
NO_NAMES = "no loader has names for a single expert of this family"


@dataclass(frozen=True)
class LinearPlan:
    """One linear of the decoder. name: relative to its layer. scheme: None where it stays as it is,
    for `reason`."""

    layer: int
    name: str
    module: str
    shape: tuple[int, int]
    scheme: Scheme | None
    reason: str = ""


def planned_linears(recipe: Recipe, checkpoint: Checkpoint) -> Iterator[LinearPlan]:
    weights = recipe.weights
    rounding = rounding_stage(recipe)
    packed: list[str] = sorted({s.format for s in recipe.stages if isinstance(s, Pack)})
    for i in range(checkpoint.config.layers):
        prefix = checkpoint.architecture.layer_prefix(i)
        nowhere = _held_by_none(checkpoint, i, packed)
        for name, spec in checkpoint.linears(i).items():
            module = f"{prefix}.{name}"
            scheme: Scheme | None = scheme_of(weights)
            reason = ""
            if any(matches(module, pattern) for pattern in weights.ignore):
                scheme, reason = None, "weights.ignore"
            for override in weights.overrides:
                if matches(module, override.match):
                    if override.ignore:
                        scheme, reason = None, f"override {override.match}"
                        continue
                    base = scheme or scheme_of(weights)
                    scheme = replace(
                        base,
                        bits=override.bits or base.bits,
                        group_size=override.group_size or base.group_size,
                        symmetric=(
                            base.symmetric if override.symmetric is None else override.symmetric
                        ),
                    )
                    reason = ""
            if not rounding:
                scheme, reason = None, "no stage rounds the weights"
            if scheme and rounding:
                scheme = rounding.scheme(scheme)
            if scheme and name in nowhere:
                scheme, reason = None, f"{' and '.join(packed)}: {NO_NAMES}"
            yield LinearPlan(i, name, module, spec.shape, scheme, reason)


def _held_by_none(checkpoint: Checkpoint, layer: int, packed: list[str]) -> frozenset[str]:
    """Linears for which none of the formats has a place, where there are formats."""
    if not packed or not all(FORMATS[form].keeps_codes for form in packed):
        return frozenset()
    return frozenset.intersection(*(checkpoint.joined_linears(layer, form) for form in packed))


def library_warnings(recipe: Recipe, checkpoint: Checkpoint) -> Iterator[str]:
    """What is asked of a class of transformers that it does not do, each in a sentence."""
    library = checkpoint.architecture.library
    if library is None:
        return
    sorted_ = any(experts.layout.sorted for experts in library.experts)
    for stage in recipe.stages:
        if getattr(stage, "route", "routed") == "all" and sorted_:
            yield (
                f"{stage.name}, route: all changes nothing: experts of {library.name} are given"
                " their own tokens alone, each weighed by the router"
            )
        if isinstance(stage, Pack) and stage.format == "compressed-tensors" and library.together:
            yield (
                f"pack {stage.format}, {library.version} does not load {library.together[0]}, which"
                " it puts together of what is stored: with quantised weights its loader loses the"
                " parts"
            )


def other_matrices(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Tensors of the layers, of two dimensions or more, that no stage could round, as modules or
    parameters, and why."""
    architecture = checkpoint.architecture
    yield from ((module, "a linear outside the layers") for module in checkpoint.outer_linears)
    for tensor, shape in checkpoint.expected.items():
        layer, module = architecture.layer_of(tensor), tensor.removesuffix(".weight")
        if layer is None or len(shape) < 2:
            continue
        prefix = f"{architecture.layer_prefix(layer)}."
        name, library = module.removeprefix(prefix), architecture.library
        if name in checkpoint.linears(layer):
            continue
        yield (
            module,
            ROUTER
            if library is None or name in checkpoint.routers(layer)
            else library.apart(layer, tensor.removeprefix(prefix)),
        )


def scheme_of(weights: Weights) -> Scheme:
    symmetric = bool(weights.symmetric) or not NUMBERS[weights.numbers].zero_points
    return Scheme(weights.bits, weights.group_size, symmetric, weights.numbers)


def inputs_of_rank(checkpoint: Checkpoint, tp: int, linear: LinearPlan) -> int:
    cut = checkpoint.linears(linear.layer)[linear.name].cut
    return linear.shape[1] // (tp if cut == 1 else 1)
