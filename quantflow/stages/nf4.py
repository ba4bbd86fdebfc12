"""`nf4`: what runs it is in `nearest_layer.py`, the numbers in `quant/numbers/nf4.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from quantflow.errors import Problem
from quantflow.recipe.words import dotted
from quantflow.recipe.written import Entry, Written
from quantflow.stages.rounding import RoundingStage

if TYPE_CHECKING:  # it takes torch
    from quantflow.quant.scheme import Scheme

# weights that share a scale: bitsandbytes' own choice, and all that its readers are tested with
BLOCK = 64


class Nf4(RoundingStage):
    """Round to the nearest of NF4's 16 numbers, in blocks of 64 (QLoRA; what people know as
    `load_in_4bit`). Needs no calibration, and takes neither bits nor group size from `weights`."""

    name: ClassVar[str] = "nf4"
    example: ClassVar[str] = "- nf4: {double_quant: true}"
    layer: ClassVar[str] = "quantflow.stages.nearest_layer:nf4_layer"

    double_quant: bool = Field(
        default=False,
        description="Quantise the blocks' scales too: 4.13 bits a weight rather than 4.5.",
    )

    def scheme(self, asked: Scheme) -> Scheme:
        return replace(
            asked, bits=4, group_size=BLOCK, symmetric=True, kind="nf4", double=self.double_quant
        )

    @classmethod
    def check(cls, recipe: Written, entry: Entry) -> Iterator[Problem]:
        """NF4 has a grid of its own."""
        yield from super().check(recipe, entry)
        if "awq" in recipe.names:
            yield Problem(
                recipe.at("awq"),
                "awq with nf4",
                "awq with rtn or gptq",
                "AWQ searches its scales for a grid of integers",
            )
        for steps, value in recipe.of_weights(("bits", "group_size", "symmetric")):
            if steps == ("weights", "bits") and value == 4:
                continue
            yield Problem(
                recipe.source.place(steps),
                f"`{dotted(steps)}` with nf4",
                "nothing: NF4 has 4 bits, blocks of 64 and a table of its own",
            )
