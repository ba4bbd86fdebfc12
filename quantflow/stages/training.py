"""What the stages that train a layer's rounding have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from quantflow.errors import Problem
from quantflow.recipe import Calibration
from quantflow.recipe.written import Entry, Written
from quantflow.stages.rounding import RoundingStage


class TrainingStage(RoundingStage):
    """It may stand alone, or begin from what another stage has rounded."""

    needs_calibration: ClassVar[bool] = True
    follows: ClassVar[tuple[str, ...]] = ("gptq", "rtn")  # whose grids it trains on
    trains: ClassVar[bool] = True
    told: ClassVar[int] = 20  # parts of a layer's training, as they are done

    batch: int = Field(default=2, ge=1, le=256, description="Windows a step.")
    held_out: int = Field(
        default=8,
        ge=0,
        description=(
            "Windows that are not trained on, and choose the step to keep; at most a quarter."
        ),
    )

    def looks_at(self, calibration: Calibration) -> int:
        return calibration.samples

    @abstractmethod
    def steps(self, windows: int) -> int:
        """Steps a layer, of so many windows; each sees `batch` of them."""

    def parts(self, linears: int, experts: int) -> int:
        return self.told

    @classmethod
    def check(cls, recipe: Written, entry: Entry) -> Iterator[Problem]:
        yield from super().check(recipe, entry)
        for other in recipe.entries:
            stage = recipe.source.kinds[other.name]
            if stage.rounds and not stage.trains and other.name not in cls.follows:
                expected = f"{' or '.join(cls.follows)} before it, or none"
                yield Problem(entry.place, f"{cls.name} beside {other.name}", expected)
            if other.settings.get("act_order") == "dynamic":
                place = recipe.source.place(other.steps("act_order"))
                problem = f"act_order: dynamic before {cls.name}, which trains contiguous groups"
                yield Problem(place, problem, "act_order static or none")
