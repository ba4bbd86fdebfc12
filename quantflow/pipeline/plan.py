"""A recipe resolved against a checkpoint: which linear gets which grid, what is in the store, what
it will cost, what is wrong.

Everything here is known from the config, the safetensors headers and the calibration text's
presence: no weight is read but to tell whether two tensors of the source are copies.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from quantflow.artifacts.artifact import RUN, foreign_files, is_export, read_manifest
from quantflow.artifacts.fingerprint import digest, file_digest
from quantflow.artifacts.store import Store, store_beside
from quantflow.calibration.data import LeftOut
from quantflow.checkpoints.checkpoint import Checkpoint, resolve_model
from quantflow.checkpoints.directory import read_json
from quantflow.checkpoints.weight_files import INDEX
from quantflow.errors import OutputError, Problem, UserError
from quantflow.formats import FORMATS, scale_dtypes
from quantflow.formats.base import Format
from quantflow.formats.recognise import refuse_quantised
from quantflow.formats.weight import LEAST_GROUP, Weight, usual_group
from quantflow.machine import resolve_device
from quantflow.models.config import DecoderConfig
from quantflow.pipeline.texts import local_text, model_documents
from quantflow.quant.numbers import NUMBERS
from quantflow.quant.scheme import Scheme
from quantflow.recipe import AUTO, BUNDLED, BUNDLED_NEW, Calibration, Recipe, Weights
from quantflow.recipe.overrides import matches
from quantflow.stages.awq import Awq
from quantflow.stages.base import PlannedStage
from quantflow.stages.calibrate import Calibrate
from quantflow.stages.evaluate import Evaluate
from quantflow.stages.gptq import Gptq
from quantflow.stages.kv_qparams import KvQparams
from quantflow.stages.pack import Pack
from quantflow.stages.pack_prepare import Prepared, prepare
from quantflow.stages.rounding import RoundingStage
from quantflow.stages.shard import Shard
from quantflow.tokenizers.load import has_tokenizer, tokenizer_placeholders

T = TypeVar("T")
# tokens of a window of calibration, and of evaluation, where the recipe says auto
SEQLEN, LENGTH = 2048, 512
GROUPS = (128, 64, 32)  # sizes that engines have kernels for, the best known first
SAMPLE, LOOKED = 200, 16  # letters of a text that are shown, and documents that are looked at
BATCH_TOKENS = 4096  # tokens that go through a layer together
HELD_BYTES = 512 * 2**20  # activations beyond this live in files (QUANTFLOW_ACTIVATION_BYTES)


@dataclass(frozen=True)
class Sample:
    """begins: how the first document of a text does, as the model will see it; "" where there is
    none. left_out: what of the first rows cannot be used; "" where all can."""

    begins: str
    left_out: str


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


@dataclass(frozen=True)
class Account:
    """What becomes of every tensor of the source, by its own name: it is quantised (if only a part
    of it), or kept, or left out, for a reason."""

    quantised: set[str]
    kept: set[str]
    left_out: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        counts = {"source": len(self.quantised) + len(self.kept) + len(self.left_out)}
        return {
            **counts,
            "quantised": len(self.quantised),
            "kept": len(self.kept),
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
        return tuple(stage for stage in _planned(self.recipe) if stage.layer)

    @cached_property
    def packs(self) -> tuple[Pack, ...]:
        return tuple(s for s in self.recipe.stages if isinstance(s, Pack))

    @property
    def tp(self) -> int:
        shard = self.stage(Shard)
        return shard.tp if shard else 1

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
        return any(stage.rounds for stage in self.recipe.stages)

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
        return max(s.windows(calibration) for s in self.layer_stages if not s.original)

    @cached_property
    def account(self) -> Account:
        """What becomes of the source's tensors."""
        sources, weights = (
            self.checkpoint.sources,
            {f"{p.module}.weight" for p in self.linears if p.scheme is not None},
        )
        quantised = {source.name for native, source in sources.items() if native in weights}
        return Account(
            quantised,
            {source.name for source in sources.values()} - quantised,
            self.checkpoint.left_out,
        )

    @property
    def sections(self) -> dict[str, Calibration | Evaluate]:
        """The parts of the recipe that name a text, whether it is read or not."""
        sections = {"calibration": self.recipe.calibration, "evaluate": self.stage(Evaluate)}
        return {name: section for name, section in sections.items() if section is not None}

    @cached_property
    def samples(self) -> dict[str, Sample | UserError]:
        """How each section's text begins, and what is wrong where it cannot be read. A text on the
        hub is not looked at."""
        samples: dict[str, Sample | UserError] = {}
        for name, section in self.sections.items():
            if local_text(section):
                documents = model_documents(
                    self.checkpoint.tokenizer_path, section.data, section.file, field=section.field
                )
                left_out = LeftOut()
                try:
                    first = list(
                        islice(left_out.sift(documents), section.skip, section.skip + LOOKED)
                    )
                    if not first:
                        left_out.check()
                    samples[name] = Sample(first[0].text[:SAMPLE] if first else "", left_out.note)
                except UserError as error:
                    samples[name] = error
        return samples

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
        gptq, weights = self.stage(Gptq), self.recipe.weights
        index = bool(gptq and gptq.act_order == "dynamic")
        return tuple(
            prepare(
                self.checkpoint,
                self._format(pack),
                {i: self.schemes(i) for i in range(self.config.layers)},
                indexed=lambda _: index,
                max_shard_bytes=pack.max_shard_size,
                ranks=self.tp,
                requantize=pack.requantize,
                default=_scheme(weights),
            )
            for pack in self.packs
        )

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What is to be known before a run and keeps nothing from it, each in a sentence: patterns
        that leave alone what is not there, and what engines are known not to load of what the packs
        write."""
        unused = (
            _unmatched(self, "weights.ignore", pattern, ignores=True)
            for pattern in self.recipe.weights.ignore
        )
        packs = (
            f"pack {warning}" for prepared in self.prepared for warning in prepared.job.warnings
        )
        return (*(str(problem) for problem in unused if problem), *packs)

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


def _planned(recipe: Recipe) -> Iterator[PlannedStage]:
    return (stage for stage in recipe.stages if isinstance(stage, PlannedStage))


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
    linears = tuple(_linears(recipe, checkpoint))
    notes = (*checkpoint.notes, *_group_notes(asked, recipe, linears), *_bundled_notes(recipe))
    plan = Plan(
        recipe,
        str(recipe.model),
        checkpoint,
        Path(recipe.output),
        resolve_device(device),
        linears,
        notes,
    )
    problems += _grid_problems(plan) + _data_problems(plan) + _output_problems(plan)
    if not config_only and not has_tokenizer(checkpoint.tokenizer_path):
        problems.append(
            Problem(
                str(checkpoint.path),
                "no tokenizer",
                "tokenizer.json, tokenizer.model, vocab.json or qwen.tiktoken",
            )
        )
    if not config_only:
        problems += tokenizer_placeholders(checkpoint.tokenizer_path)
    if problems:
        raise UserError(problems)
    return plan


def resolved(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The recipe with the model's numbers where it says `auto`: lengths within its positions, and a
    group that fits all linears; and the first pack's choice of symmetric weights or not."""
    most, changes = checkpoint.config.max_positions, dict[str, object]()
    if recipe.weights.symmetric is None:
        first = next(
            (FORMATS[stage.format] for stage in recipe.stages if isinstance(stage, Pack)), None
        )
        symmetric = first is not None and first.prefers_symmetric(
            experts=bool(checkpoint.config.experts)
        )
        recipe = recipe.model_copy(
            update={"weights": recipe.weights.model_copy(update={"symmetric": symmetric})}
        )
    if recipe.calibration and recipe.calibration.seqlen == AUTO:
        changes["calibration"] = recipe.calibration.model_copy(update={"seqlen": min(SEQLEN, most)})
    changes["stages"] = tuple(
        (
            stage.model_copy(update={"length": min(LENGTH, most)})
            if isinstance(stage, Evaluate) and stage.length == AUTO
            else stage
        )
        for stage in recipe.stages
    )
    if recipe.weights.group_size == AUTO:
        tp = next((stage.tp for stage in recipe.stages if isinstance(stage, Shard)), 1)
        linears = [
            p
            for p in _linears(recipe, checkpoint)
            if p.scheme is not None and p.scheme.group_size == AUTO
        ]
        shared = math.gcd(*(_inputs_of_rank(checkpoint, tp, p) for p in linears))
        changes["weights"] = recipe.weights.model_copy(
            update={"group_size": auto_group(shared) if linears else GROUPS[0]}
        )
    return recipe.model_copy(update=changes)


def auto_group(channels: int) -> int:
    """The largest of the group sizes that engines have kernels for that divides so many input
    channels, else the largest that does and is worth its scales, else -1: the whole row."""
    return next((size for size in GROUPS if channels % size == 0), 0) or usual_group(
        channels, GROUPS[0]
    )


def _group_notes(asked: Recipe, recipe: Recipe, linears: Iterable[LinearPlan]) -> Iterator[str]:
    """Said where `auto` became a group that engines may have no kernels for. recipe: what was
    `asked`, resolved."""
    size = recipe.weights.group_size
    if asked.weights.group_size != AUTO or size in GROUPS:
        return
    odd = min(
        (p for p in linears if p.scheme and p.scheme.group_size == size),
        key=lambda p: math.gcd(p.shape[1], GROUPS[0]),
    )
    why = (
        f"none of {', '.join(map(str, GROUPS))} divides the inputs of all linears ({odd.name} has"
        f" {odd.shape[1]})"
    )
    what = (
        f"{size}, the largest that does"
        if size > 0
        else f"-1, a scale a row: no size from {LEAST_GROUP} up does"
    )
    yield f"weights.group_size auto is {what}; {why}"


def _bundled_notes(recipe: Recipe) -> Iterator[str]:
    calibration = recipe.calibration
    reads = any(isinstance(stage, (Calibrate, Awq, Gptq, KvQparams)) for stage in recipe.stages)
    what = "the bundled text, pages of the documentation of Python, PostgreSQL and SQLite"
    if calibration and reads and not calibration.file and calibration.data == BUNDLED:
        yield (
            f"calibration reads {what}: --set calibration.data=FILE takes text like what the model"
            " will be asked"
        )
    if any(
        isinstance(stage, Evaluate) and not stage.file and stage.data == BUNDLED_NEW
        for stage in recipe.stages
    ):
        yield (
            f"evaluate reads {what}, other pages than calibration has: --set"
            " stages.evaluate.data=FILE takes another"
        )


def _scheme(weights: Weights) -> Scheme:
    symmetric = bool(weights.symmetric) or not NUMBERS[weights.numbers].zero_points
    return Scheme(weights.bits, weights.group_size, symmetric, weights.numbers)


def _linears(recipe: Recipe, checkpoint: Checkpoint) -> Iterator[LinearPlan]:
    weights = recipe.weights
    rounding = next((s for s in recipe.stages if isinstance(s, RoundingStage)), None)
    for i in range(checkpoint.config.layers):
        prefix = checkpoint.architecture.layer_prefix(i)
        for name, spec in checkpoint.linears(i).items():
            module = f"{prefix}.{name}"
            scheme: Scheme | None = _scheme(weights)
            reason = ""
            if any(matches(module, pattern) for pattern in weights.ignore):
                scheme, reason = None, "weights.ignore"
            for override in weights.overrides:
                if matches(module, override.match):
                    if override.ignore:
                        scheme, reason = None, f"override {override.match}"
                        continue
                    base = scheme or _scheme(weights)
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
            yield LinearPlan(i, name, module, spec.shape, scheme, reason)


def _grid_problems(plan: Plan) -> list[Problem]:
    """What stands against the packs: one problem a kind of linear and cause, not one a layer; what
    the formats cannot say of the whole; and overrides that match nothing."""
    by_cause: dict[tuple[str, str], Problem] = {}
    problems: list[Problem] = []
    linears = {linear.module: linear for linear in plan.linears}
    if plan.rounds and not any(linear.scheme for linear in plan.linears):
        problems.append(Problem("weights", "every linear is ignored", "something to quantise"))
    if not plan.rounds:
        plain = [name for name, form in FORMATS.items() if form.holds_plain]
        expected, hint = (
            f"one of {', '.join(plain)}, which hold plain weights",
            "Add `- rtn`, or `- gptq`, to quantise them",
        )
        wrong = [pack for pack in plan.packs if pack.format not in plain]
        problems += [
            Problem(f"pack {pack.format}", "no stage rounds the weights", expected, hint)
            for pack in wrong
        ]
    for pack, prepared in zip(plan.packs, plan.prepared, strict=True):
        for problem in prepared.modules:
            linear = linears[problem.where]
            assert linear.scheme is not None
            # A grid of another kind is one fact, whatever linear it is said of.
            leaf = (
                linear.name.rpartition(".")[2]
                if FORMATS[pack.format].holds_numbers(linear.scheme.kind)
                else ""
            )
            if (leaf, problem.found) not in by_cause:
                hint = "; for instance ".join(
                    filter(
                        None, (problem.hint, _advice(plan, linear, problem, FORMATS[pack.format]))
                    )
                )
                where = f"{linear.module} (pack {pack.format})"
                by_cause[leaf, problem.found] = Problem(
                    where, problem.found, problem.expected, hint
                )
        problems += (problem for problem in prepared.whole if problem not in problems)
        if not prepared.modules:
            if pack.kv_scales:
                problems += _kv_problems(plan, pack)
            if not pack.requantize:
                problems += _chances(plan, pack, prepared)
    problems = [*by_cause.values(), *problems]
    # Of `ignore` the same is a warning: lists that are written for many models name what this one
    # has not, and nothing comes of it.
    unmatched = (
        _unmatched(plan, "weights.overrides match", o.match, ignores=o.ignore)
        for o in plan.recipe.weights.overrides
    )
    problems += filter(None, unmatched)
    if not any(matches(plan.checkpoint.architecture.head, p) for p in plan.recipe.weights.ignore):
        problems.append(
            Problem(
                "weights.ignore",
                "lm_head is not in it",
                "lm_head",
                "QuantFlow quantises the decoder's linears; the head stays as it is",
            )
        )
    return problems


def _unmatched(plan: Plan, where: str, pattern: str, *, ignores: bool) -> Problem | None:
    """What is said of a pattern that matches no linear. ignores: a router or a norm, which nobody
    quantises, may be left alone too."""
    modules = [
        *(linear.module for linear in plan.linears),
        *(_other_modules(plan.checkpoint) if ignores else ()),
    ]
    if any(matches(module, pattern) for module in modules):
        return None
    leaves = dict.fromkeys(module.rpartition(".")[2] for module in modules)
    parent, dot, leaf = pattern.rpartition(".")
    # a router's `gate` is no slip for `gate_proj`
    near = get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    hint = f"Did you mean {f'{parent}{dot}{near[0]}'!r}?" if near else ""
    return Problem(
        f"{where} {pattern!r}",
        "matches no linear of the model",
        f"a pattern such as *.{next(iter(leaves))}",
        hint,
    )


def _other_modules(checkpoint: Checkpoint) -> Iterator[str]:
    """The head, which a tied model has no tensor of, and the modules of all weights: routers, norms
    and embeddings too."""
    yield checkpoint.architecture.head
    yield from (
        name.removesuffix(".weight") for name in checkpoint.expected if name.endswith(".weight")
    )


def _advice(plan: Plan, linear: LinearPlan, problem: Problem, form: Format) -> str:
    """What to write into the recipe; "" where the problem's own hint says it."""
    assert linear.scheme is not None
    leaf, change = linear.name.rpartition(".")[2], "ignore: true"
    if not form.holds_numbers(linear.scheme.kind):
        return ""
    if "group_size" in problem.expected:
        inputs = {
            p.module: _inputs_of_rank(plan.checkpoint, plan.tp, p)
            for p in plan.linears
            if p.scheme is not None
        }
        if form.shares_scheme(linear.module):  # which has no place for overrides
            k = math.gcd(*inputs.values())
            return f"weights.group_size: {usual_group(k, linear.scheme.group_of(k))}"
        channels = inputs[linear.module]
        fitting = replace(
            linear.scheme, group_size=usual_group(channels, linear.scheme.group_of(channels))
        )
        if not form.check(Weight(linear.module, (linear.shape[0], channels), fitting)):
            change = f"group_size: {fitting.group_size}"
    elif "asymmetric" in problem.found:
        change = "symmetric: true"
    return f'weights.overrides: [{{match: "*.{leaf}", {change}}}]'


def _inputs_of_rank(checkpoint: Checkpoint, tp: int, linear: LinearPlan) -> int:
    cut = checkpoint.linears(linear.layer)[linear.name].cut
    return linear.shape[1] // (tp if cut == 1 else 1)


def _kv_problems(plan: Plan, pack: Pack) -> list[Problem]:
    """What keeps KV scales from being written into the checkpoint itself."""
    where, problems = f"pack {pack.format} kv_scales", []
    if pack.kv_scales not in FORMATS[pack.format].kv_scales:
        holding = [name for name, form in FORMATS.items() if pack.kv_scales in form.kv_scales]
        problems.append(
            Problem(
                where,
                f"the format {pack.format}",
                f"{', '.join(holding)}, which has names for them",
            )
        )
    if plan.stage(KvQparams) is None:
        problems.append(
            Problem(where, "no stage kv_qparams", "`- kv_qparams`, which measures K and V")
        )
    return problems


def _chances(plan: Plan, pack: Pack, prepared: Prepared) -> Iterator[Problem]:
    """What the format holds only if the numbers happen to be so."""
    kv = plan.stage(KvQparams)
    granularity = kv.granularity if kv else None
    hint = "Set requantize: true in pack, which reports the error"
    for chance in prepared.job.format.chances(prepared.job.request, granularity):
        yield replace(chance, where=f"pack {pack.format}", hint=hint)


def _data_problems(plan: Plan) -> list[Problem]:
    problems = []
    for where, section in plan.sections.items():
        length = section.seqlen if isinstance(section, Calibration) else section.length
        read = plan.reads_calibration or not isinstance(section, Calibration)
        if read and length > plan.config.context and not plan.config.stretches:
            problems.append(
                Problem(
                    where,
                    f"windows of {length} tokens",
                    f"at most the model's {plan.config.context} positions",
                )
            )
        sample = plan.samples.get(where)
        if isinstance(sample, UserError):
            problems += [problem for problem in sample.problems if problem not in problems]
        elif sample and not sample.begins:
            problem = (
                "no text in it"
                if not section.skip
                else f"no text in it after {section.skip} documents"
            )
            problems.append(Problem(f"{where} {local_text(section)}", problem, "documents"))
    return problems


def _output_problems(plan: Plan) -> list[Problem]:
    try:
        return _place_problems(plan, plan.output.resolve(), plan.checkpoint.path.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a loop of links, a NUL
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        return [
            Problem(
                str(plan.output),
                reason,
                "a directory that QuantFlow may create",
                "Pass --output DIR",
            )
        ]


def _place_problems(plan: Plan, output: Path, model: Path) -> list[Problem]:
    if output == model or model in output.parents:
        return [
            Problem(
                str(plan.output),
                "lies in the model directory",
                "another place",
                "Pass --output DIR",
            )
        ]
    if output in model.parents:
        return [
            Problem(
                str(plan.output),
                "contains the model directory and would replace it",
                "another place",
                "Pass --output DIR",
            )
        ]
    if output.exists() and not output.is_dir():
        return [Problem(str(plan.output), "a file", "a directory that QuantFlow may create")]
    if output.is_dir() and any(output.iterdir()) and not (output / "quantflow.json").is_file():
        return [
            Problem(
                str(plan.output),
                "a directory with other content",
                "an empty or absent one, or an artifact of QuantFlow's",
                "Pass --output DIR",
            )
        ]
    if is_export(output):
        return [
            Problem(
                str(plan.output),
                "what `quantflow export` wrote, which would be lost",
                "another place",
                "Pass --output DIR",
            )
        ]
    if "output" not in plan.recipe.model_fields_set and (other := _other_model(plan, output)):
        problem = f"an artifact of another model, {other}, which would be lost"
        return [
            Problem(
                str(plan.output),
                problem,
                f"one of {plan.recipe.model}, or nothing",
                "Pass --output DIR",
            )
        ]
    if foreign := foreign_files(output):
        shown = ", ".join(foreign[:3]) + (
            f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        )
        return [
            Problem(
                str(plan.output),
                f"an artifact with other files in it ({shown}), which would be lost",
                "only the artifact",
                "Move them away",
            )
        ]
    if plan.store.root.exists() and not plan.store.root.is_dir():
        return [
            Problem(
                str(plan.store.root),
                "a file",
                "a directory for the store",
                "Set QUANTFLOW_STORE to a directory",
            )
        ]
    parent = output
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        return [
            Problem(
                str(plan.output),
                f"{parent} is not writable",
                "a writable place",
                "Pass --output DIR",
            )
        ]
    return []


def _other_model(plan: Plan, output: Path) -> str:
    """The model that the artifact at `output` was made of, if that is another than the plan's; else
    ""."""
    try:
        manifest, record = (
            read_manifest(output),
            read_json(output / RUN) if (output / RUN).is_file() else {},
        )
        digests = plan.store.cached_digests(plan.checkpoint.files)
    except (OSError, UserError):  # which the run replaces
        return ""
    if manifest is None or (
        digests and manifest["source"]["weights"] == plan.weights_key(digests.values())
    ):
        return ""
    # the names of two places may be one
    name, place = manifest["source"]["model"], record.get("model")
    if isinstance(place, str):
        return place if place != plan.model_place else ""
    return (
        name if name != (Path(plan.model).name if Path(plan.model).exists() else plan.model) else ""
    )


def check_output(plan: Plan) -> None:
    """Raises OutputError where the output or the store cannot be written."""
    for folder in (plan.output.absolute().parent, plan.store.root):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".quantflow-probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OutputError(
                Problem(
                    str(folder),
                    error.strerror or str(error),
                    "a writable directory",
                    "Pass --output DIR",
                )
            ) from error


def activation_budget() -> int:
    """Bytes of hidden states that are held in memory; more goes to files. Raises UserError."""
    value = os.environ.get("QUANTFLOW_ACTIVATION_BYTES", str(HELD_BYTES))
    if not value.isdecimal():
        raise UserError(Problem("QUANTFLOW_ACTIVATION_BYTES", repr(value), "a number of bytes"))
    return int(value)
