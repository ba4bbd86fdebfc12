"""A recipe resolved against a checkpoint: which linear gets which grid, what is in the store, what
it will cost, what is wrong.

Everything here is known from the config, the safetensors headers and the calibration text's
presence: no weight is read but to tell whether two tensors of the source are copies.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from quantflow.artifacts.fingerprint import digest, file_digest
from quantflow.artifacts.store import Store, store_beside
from quantflow.checkpoints.checkpoint import Checkpoint, resolve_model
from quantflow.checkpoints.weight_files import INDEX
from quantflow.engine.families import engine_problem
from quantflow.errors import Problem, UserError
from quantflow.formats import FORMATS, scale_dtypes
from quantflow.formats.base import Format
from quantflow.formats.recognise import refuse_quantised
from quantflow.machine import resolve_device
from quantflow.models.config import DecoderConfig
from quantflow.pipeline.cached import cache_notes, cache_problems, row_notes
from quantflow.pipeline.grid_problems import grid_problems, unmatched
from quantflow.pipeline.linears import (
    NO_NAMES,
    LinearPlan,
    library_warnings,
    other_matrices,
    planned_linears,
    scheme_of,
)
from quantflow.pipeline.output import output_problems
from quantflow.pipeline.resolve import group_notes, recipe_notes, resolved
from quantflow.pipeline.text_samples import Sample, sample_of, text_problems
from quantflow.pipeline.texts import local_text
from quantflow.quant.scheme import Scheme
from quantflow.recipe import NamesText, Recipe
from quantflow.stages.base import PlannedStage, planned
from quantflow.stages.evaluate import Evaluate
from quantflow.stages.pack import Pack
from quantflow.stages.pack_prepare import Prepared, prepare
from quantflow.stages.rounding import rounding_stage
from quantflow.tokenizers.load import tokenizer_placeholders, tokenizer_problem

T = TypeVar("T")
BATCH_TOKENS = 4096  # tokens that go through a layer together
HELD_BYTES = 512 * 2**20  # activations beyond this live in files (QUANTFLOW_ACTIVATION_BYTES)


@dataclass(frozen=True)
class Account:
    """What becomes of every tensor of the source, by its own name: it is quantised (if only a part
    of it), or kept, or copied from beside the decoder, or left out, for a reason."""

    quantised: set[str]
    kept: set[str]
    copied: Mapping[str, str]
    left_out: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        parts = (self.quantised, self.kept, self.copied, self.left_out)
        return {
            "source": sum(map(len, parts)),
            "quantised": len(self.quantised),
            "kept": len(self.kept),
            "copied": dict(self.copied),
            "left_out": dict(self.left_out),
        }


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against a checkpoint: what `quantize` will do.

    Attributes:
        recipe: The recipe, with what it leaves open decided.
        model: The model, as it was named.
        checkpoint: Its config, and its tensors by name; no weight is in memory.
        output: Where the artifact goes.
        device: `cpu` or `cuda`.
        linears: Every linear of the decoder, its shape `(N, K)`, and its scheme or why it is kept.
        notes: What one should know of the model and of the choices made.
    """

    recipe: Recipe
    model: str
    checkpoint: Checkpoint
    output: Path
    device: str
    linears: tuple[LinearPlan, ...]
    notes: tuple[str, ...]

    def stage(self, kind: type[T]) -> T | None:
        """The recipe's stage of that kind, or None."""
        return next((s for s in self.recipe.stages if isinstance(s, kind)), None)

    @cached_property
    def layer_stages(self) -> tuple[PlannedStage, ...]:
        """Those that work on one decoder layer after the other, in the recipe's order."""
        return tuple(stage for stage in planned(self.recipe) if stage.layer)

    @cached_property
    def packs(self) -> tuple[Pack, ...]:
        return tuple(s for s in self.recipe.stages if isinstance(s, Pack))

    @property
    def tp(self) -> int:
        return max(stage.ranks for stage in planned(self.recipe))

    @property
    def model_place(self) -> str:
        """Where the model is on this machine; of one in the hub's cache its repository, whose
        snapshots are one model's."""
        path = self.checkpoint.path.resolve()
        return str(path.parent.parent if path.parent.name == "snapshots" else path)

    @property
    def config(self) -> DecoderConfig:
        return self.checkpoint.config

    @property
    def compute_dtype(self) -> str:
        """What activations are computed in: bfloat16 for 16-bit models (float16 would overflow
        where bfloat16 does not)."""
        return "float32" if self.config.dtype == "float32" else "bfloat16"

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        """Dtypes in which every scale is exact: packing to another format repeats no layer."""
        return scale_dtypes(self.config.dtype)

    @property
    def rounds(self) -> bool:
        """Whether a stage changes the weights; a recipe of `calibrate` and `kv_qparams` alone only
        measures."""
        return rounding_stage(self.recipe) is not None

    @property
    def needs_stream(self) -> bool:
        """Whether hidden states of the quantised model must be carried from layer to layer."""
        return self.stream_windows > 0

    @property
    def reads_calibration(self) -> bool:
        return self.needs_stream or any(stage.original for stage in self.layer_stages)

    @property
    def stream_windows(self) -> int:
        """Windows that the quantised stream carries: as many as the stage that looks at most of
        them does."""
        calibration = self.recipe.calibration
        if calibration is None or not self.rounds:
            return 0
        return max(s.looks_at(calibration) for s in self.layer_stages if not s.original)

    @cached_property
    def account(self) -> Account:
        """What becomes of the source's tensors."""
        sources, weights = (
            self.checkpoint.sources,
            {f"{p.module}.weight" for p in self.linears if p.scheme is not None},
        )
        quantised = {source.name for native, source in sources.items() if native in weights}
        copied = {sources[native].name: why for native, why in self.checkpoint.copied.items()}
        return Account(
            quantised,
            {source.name for source in sources.values()} - quantised - set(copied),
            copied,
            self.checkpoint.left_out,
        )

    @cached_property
    def others(self) -> dict[str, str]:
        """Matrices of the layers that are no linears and stay as they are, each with the reason."""
        return dict(other_matrices(self.checkpoint))

    @property
    def sections(self) -> dict[str, NamesText]:
        """The parts of the recipe that name a text, whether it is read or not, by their names."""
        texts = {s.name: cast(NamesText, s) for s in self.recipe.stages if s.reads_text}
        calibration = self.recipe.calibration
        return {"calibration": calibration, **texts} if calibration else texts

    @cached_property
    def samples(self) -> dict[str, Sample | UserError]:
        """How each section's text begins, and what is wrong where it cannot be read. A text on the
        hub is not looked at."""
        folder = self.checkpoint.tokenizer_path
        texts = {name: section for name, section in self.sections.items() if local_text(section)}
        return {name: sample_of(folder, section) for name, section in texts.items()}

    @property
    def text_notes(self) -> tuple[str, ...]:
        """What of the sections' texts cannot be used, as far as it was looked at; each in a
        sentence."""
        notes = (
            (name, sample.left_out)
            for name, sample in self.samples.items()
            if isinstance(sample, Sample)
        )
        return tuple(f"{name}: {note}" for name, note in notes if note)

    def schemes(self, layer: int) -> dict[str, Scheme]:
        """Relative name -> scheme of the quantised linears of a layer."""
        return {p.name: p.scheme for p in self._by_layer[layer] if p.scheme is not None}

    @cached_property
    def _by_layer(self) -> dict[int, list[LinearPlan]]:
        layers: dict[int, list[LinearPlan]] = {i: [] for i in range(self.config.layers)}
        for linear in self.linears:
            layers[linear.layer].append(linear)
        return layers

    @cached_property
    def store(self) -> Store:
        return store_beside(self.output)

    @cached_property
    def prepared(self) -> tuple[Prepared, ...]:
        """What each of `packs` writes, the whole checkpoint, and what stands against it. Made once:
        GGUF's reads the vocabulary."""
        rounding = rounding_stage(self.recipe)
        index = rounding is not None and rounding.indexed
        return tuple(
            prepare(
                self.checkpoint,
                self._format(pack),
                {i: self.schemes(i) for i in range(self.config.layers)},
                indexed=lambda _: index,
                max_shard_bytes=pack.max_shard_size,
                ranks=self.tp,
                requantize=pack.requantize,
                default=scheme_of(self.recipe.weights),
            )
            for pack in self.packs
        )

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What is to be known before a run and keeps nothing from it, each in a sentence: patterns
        that leave alone what is not there, and what engines are known not to load of what the packs
        write."""
        unused = (
            unmatched(self, "weights.ignore", pattern, ignores=True)
            for pattern in self.recipe.weights.ignore
        )
        packs = (
            f"pack {warning}" for prepared in self.prepared for warning in prepared.job.warnings
        )
        plain = (
            f"pack {prepared.job.format.name}: {NO_NAMES}: {count} linears are in"
            f" {self.config.dtype}, rounded"
            for prepared in self.prepared
            if (count := sum(map(len, prepared.job.plain.values())))
        )
        unused_patterns = (str(problem) for problem in unused if problem)
        return (*unused_patterns, *packs, *plain, *library_warnings(self.recipe, self.checkpoint))

    def _format(self, pack: Pack) -> Format:
        form = FORMATS[pack.format]
        return form if self.rounds else form.unrounded

    def weights_key(self, digests: Iterable[str]) -> str:
        """What tells the weights from others, from the content hashes of the weight files."""
        return weights_key(self.checkpoint, digests)

    @property
    def measures_engine(self) -> bool:
        """Whether `evaluate` runs the engine."""
        evaluate = self.stage(Evaluate)
        return evaluate is not None and evaluate.engine

    @property
    def min_zero(self) -> int:
        """1 where GPTQ v1, which cannot hold a zero point of 0, is among the formats of an
        asymmetric grid."""
        asymmetric = any(p.scheme is not None and not p.scheme.symmetric for p in self.linears)
        return max(FORMATS[p.format].min_zero for p in self.packs) if asymmetric else 0


def weights_key(checkpoint: Checkpoint, digests: Iterable[str]) -> str:
    """What tells a checkpoint's weights from others, from the content hashes of its files."""
    index = checkpoint.path / INDEX  # it chooses between files that hold the same tensor
    return digest([sorted(digests), file_digest(index) if index.is_file() else ""])


def make_plan(recipe: Recipe, *, device: str = "auto", config_only: bool = False) -> Plan:
    """The plan of a recipe. Raises UserError with every problem that can be known before a weight
    is read."""
    if not recipe.model:
        raise UserError(
            Problem(
                "model", "the recipe names none", "a model directory or hub id", "Pass --model DIR"
            )
        )
    problems: list[Problem] = []
    checkpoint = Checkpoint(resolve_model(recipe.model), config_only=config_only)
    refuse_quantised(checkpoint)
    problems += checkpoint.problems()
    asked, recipe = recipe, resolved(recipe, checkpoint)
    linears = tuple(planned_linears(recipe, checkpoint))
    notes = (
        *checkpoint.notes,
        *group_notes(asked, recipe, linears),
        *recipe_notes(recipe),
        *cache_notes(recipe, checkpoint),
        *row_notes(recipe, checkpoint),
    )
    plan = Plan(
        recipe,
        str(recipe.model),
        checkpoint,
        Path(recipe.output),
        resolve_device(device),
        linears,
        notes,
    )
    problems += cache_problems(recipe, checkpoint)
    problems += grid_problems(plan) + text_problems(plan) + output_problems(plan)
    if plan.measures_engine and (absent := engine_problem(checkpoint)):
        problems.append(replace(absent, where="evaluate.engine"))
    if not config_only:
        if problem := tokenizer_problem(checkpoint.tokenizer_path):
            problems.append(problem)
        problems += tokenizer_placeholders(checkpoint.tokenizer_path)
    if problems:
        raise UserError(problems)
    return plan


def activation_budget() -> int:
    """Bytes of hidden states that are held in memory; more goes to files. Raises UserError."""
    value = os.environ.get("QUANTFLOW_ACTIVATION_BYTES", str(HELD_BYTES))
    if not value.isdecimal():
        raise UserError(Problem("QUANTFLOW_ACTIVATION_BYTES", repr(value), "a number of bytes"))
    return int(value)
