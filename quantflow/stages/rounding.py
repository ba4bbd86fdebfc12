"""What the stages that round the weights have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from quantflow.errors import Problem
from quantflow.recipe import Recipe, Weights
from quantflow.recipe.words import dotted
from quantflow.recipe.written import Entry, Written
from quantflow.stages.base import PlannedStage

if TYPE_CHECKING:  # it takes torch
    from quantflow.quant.scheme import Scheme


class RoundingStage(PlannedStage):
    """A recipe has one of them, which rounds to the numbers that `weights` names."""

    rounds: ClassVar[bool] = True
    # of one that rounds otherwise than to nearest: what it would make of a weight, given the
    # `GridRules` and the stage; `awq` asks before it decides
    rounder: ClassVar[str] = ""

    def scheme(self, asked: Scheme) -> Scheme:
        """The scheme of a linear for which the recipe asks for another."""
        return asked

    @property
    def indexed(self) -> bool:
        """Whether its groups follow an order of the columns of their own (g_idx)."""
        return False

    def parts(self, linears: int, experts: int) -> int:
        return linears

    @classmethod
    def modules(cls) -> tuple[str, ...]:
        places = (place for place in (cls.layer, cls.rounder) if place)
        return tuple(dict.fromkeys(place.partition(":")[0] for place in places))

    @classmethod
    def check(cls, recipe: Written, entry: Entry) -> Iterator[Problem]:
        """Numbers are of a kind that there is, and that the stage rounds to."""
        kind = recipe.weights.get("numbers")
        if not isinstance(kind, str):
            return
        # here, since they bring torch along
        from quantflow.quant.numbers import NUMBERS
        from quantflow.quant.numbers.base import BITS

        place = recipe.source.place(("weights", "numbers"))
        if kind not in NUMBERS:
            yield Problem(place, f"`weights.numbers` is {kind!r}", f"one of {', '.join(NUMBERS)}")
            return
        numbers = NUMBERS[kind]
        if cls.name not in numbers.stages:
            expected = f"a stage {' or '.join(numbers.stages)}"
            yield Problem(place, f"`weights.numbers: {kind}` with {cls.name}", expected)
        unsaid = [] if "bits" in recipe.weights else [(("weights", "bits"), Weights().bits)]
        for steps, bits in [*unsaid, *recipe.of_weights(("bits",))]:
            if bits in BITS and bits not in numbers.widths:
                where = recipe.source.place(steps)
                expected = " or ".join(map(str, numbers.widths))
                yield Problem(where, f"`{dotted(steps)}` is {bits} with {kind}", expected)
        for steps, symmetric in recipe.of_weights(("symmetric",)):
            if symmetric is False and not numbers.zero_points:
                where, problem = recipe.source.place(steps), f"`{dotted(steps)}: false` with {kind}"
                yield Problem(where, problem, "numbers with zero points")


def rounding_stage(recipe: Recipe) -> RoundingStage | None:
    """The one that a recipe has, None where it only measures."""
    return next((stage for stage in recipe.stages if isinstance(stage, RoundingStage)), None)
