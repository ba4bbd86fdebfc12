"""`evaluate`: what runs it is in `pipeline/measure.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Self

from pydantic import Field

from quantflow.bundled import BUNDLED_NEW, BUNDLED_TEXT
from quantflow.errors import Problem
from quantflow.models.config import DecoderConfig
from quantflow.recipe.values import AS_WRITTEN, AUTO, DATA, FIELD, Length, NonEmpty, Section
from quantflow.recipe.written import Entry, Written
from quantflow.stages.base import PlannedStage

LENGTH = 512  # tokens of a window, where the recipe says auto


class Gates(Section):
    """Limits; a run that misses one keeps its artifact, marks it as failed and exits with 3."""

    kl_mean: float | None = Field(
        default=None,
        gt=0,
        description="Largest mean KL divergence per token to the full-precision model, in nats.",
    )
    kl_p99: float | None = Field(
        default=None,
        gt=0,
        description="Largest 99th percentile of the KL divergence per token, in nats.",
    )
    top1: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Smallest share of tokens with the same most likely successor.",
    )
    perplexity_ratio: float | None = Field(
        default=None,
        ge=1,
        description="Largest perplexity, as a multiple of the full-precision model's.",
    )


class Evaluate(PlannedStage):
    """Compare with the full-precision model, on text that was not used for calibration."""

    name: ClassVar[str] = "evaluate"
    example: ClassVar[str] = (
        "- evaluate: {data: wikitext2, file: ./wikitext2.txt, windows: 32, length: 2048}"
    )
    examples: ClassVar[Mapping[str, str]] = {
        "gates": (
            "- evaluate: {data: demo, gates: {kl_mean: 0.05, kl_p99: 0.5, top1: 0.9,"
            " perplexity_ratio: 1.05}}"
        )
    }
    finish: ClassVar[str] = "quantflow.pipeline.evaluation:evaluate"
    phase: ClassVar[str] = "evaluate"
    reads_text: ClassVar[bool] = True

    data: NonEmpty = Field(
        default=BUNDLED_NEW, description=f"{DATA} demo-new is bundled, other pages than demo's."
    )
    file: NonEmpty | None = Field(
        default=None, description="A local copy of the named data set, read instead of the hub."
    )
    field: NonEmpty | None = Field(default=None, description=FIELD)
    windows: int = Field(default=64, ge=1, description="Windows to take.")
    length: Length = Field(
        default=AUTO,
        json_schema_extra=AS_WRITTEN,
        description="Tokens a window. auto: 512, or what the model has positions for.",
    )
    skip: int = Field(default=0, ge=0, description="Documents left out at the start.")
    engine: bool = Field(
        default=False,
        description="Measure the engine's own kernels and KV cache, not the same in float32.",
    )
    gates: Gates = Field(default=Gates(), description="Limits that the result must keep.")

    @property
    def count(self) -> int:
        return self.windows

    @property
    def tokens(self) -> int:
        return self.length

    def resolved(self, config: DecoderConfig) -> Self:
        if self.length != AUTO:
            return self
        return self.model_copy(update={"length": min(LENGTH, config.max_positions)})

    def notes(self) -> Iterator[str]:
        if not self.file and self.data == BUNDLED_NEW:
            yield (
                f"evaluate reads {BUNDLED_TEXT}, other pages than calibration has: --set"
                " stages.evaluate.data=FILE takes another"
            )

    @classmethod
    def check(cls, recipe: Written, entry: Entry) -> Iterator[Problem]:
        if recipe.complete and recipe.only_measures and not recipe.having("alters"):
            yield Problem(
                entry.place,
                "evaluate where nothing changes the model",
                "a stage that rounds the weights, or `- kv_qparams`",
            )
