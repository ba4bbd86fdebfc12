"""What `quantflow sensitivity` is to do: its settings, resolved against a checkpoint and a text,
and all that stands against them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

import torch

from quantflow.artifacts.fingerprint import digest
from quantflow.artifacts.store import Store, store_beside
from quantflow.calibration.data import Windows, cut_windows
from quantflow.checkpoints.checkpoint import Checkpoint, resolve_model
from quantflow.checkpoints.tensor_file import ITEM_BYTES
from quantflow.errors import ModelError, Problem, UserError
from quantflow.evaluate.sensitivity import Granularity, Part, Rounding, parts
from quantflow.formats import FORMATS, scale_dtypes
from quantflow.formats.base import ConfigRequest, Format
from quantflow.formats.reader import Weights
from quantflow.formats.recognise import refuse_quantised
from quantflow.formats.weight import Weight, grid_problems, usual_group
from quantflow.machine import device_name, resolve_device
from quantflow.pipeline.identities import computing_code
from quantflow.pipeline.texts import model_documents
from quantflow.quant.grid import GridRules
from quantflow.quant.numbers.base import BITS
from quantflow.quant.scheme import Scheme
from quantflow.tokenizers.load import load_tokenizer, tokenizer_problem

FILE = "sensitivity.json"
RATE = {"cpu": 6e10, "cuda": 3e13}  # float32 operations a second, an order of magnitude
CALIBRATION = 128  # windows for the recipe that is written, where the text has so many
# what its recipes begin with, and are known by
WRITTEN = "Widths chosen by `quantflow sensitivity`"


@dataclass(frozen=True)
class Settings:
    """widths: bits to measure. samples, length, skip: of the windows. output: the JSON file; a
    recipe goes beside it. budget: bytes of all weights as a checkpoint holds them. average_bits: of
    a quantised weight's codes, instead. field: of a row of `data`, with its text."""

    model: str
    data: str
    output: Path = Path(FILE)
    widths: tuple[int, ...] = (2, 3, 4, 8)
    group_size: int = 128
    symmetric: bool = False
    samples: int = 16
    length: int = 512
    skip: int = 0
    granularity: Granularity = "fused"
    device: str = "auto"
    budget: int | None = None
    average_bits: float | None = None
    field: str | None = None

    @property
    def recipe(self) -> Path | None:
        """Where a recipe goes; None where no budget asks for one."""
        return (
            self.output.with_suffix(".yaml")
            if self.budget is not None or self.average_bits is not None
            else None
        )

    def scheme(self, bits: int) -> Scheme:
        return Scheme(bits, self.group_size, self.symmetric)


@dataclass(frozen=True)
class Job:
    """Settings resolved against a checkpoint and a text, which nothing stands against."""

    settings: Settings
    weights: Weights
    parts: tuple[Part, ...]
    windows: Windows
    calibration: int
    device: str

    @property
    def checkpoint(self) -> Checkpoint:
        return self.weights.checkpoint

    @cached_property
    def store(self) -> Store:
        return store_beside(self.settings.output)

    @cached_property
    def kept_bytes(self) -> int:
        """Of all tensors but the linears' weights, as the checkpoint has them."""
        return kept_bytes(self.checkpoint, self.parts)

    def modules(self, part: Part) -> tuple[str, ...]:
        prefix = self.checkpoint.architecture.layer_prefix(part.layer)
        return tuple(f"{prefix}.{name}" for name in part.shapes)

    def whole(self, widths: Mapping[str, int]) -> Rounding:
        """All parts rounded, each to its width."""
        schemes: dict[int, dict[str, Scheme]] = {}
        for part in self.parts:
            schemes.setdefault(part.layer, {}).update(
                dict.fromkeys(part.shapes, self.settings.scheme(widths[part.name]))
            )
        return schemes

    def total_bytes(self, widths: Mapping[str, int]) -> int:
        return self.kept_bytes + sum(
            part.stored_bytes(self.settings.scheme(widths[part.name])) for part in self.parts
        )

    def formats(self, widths: Mapping[str, int]) -> tuple[str, ...]:
        """The packed formats that hold all parts in these widths in one checkpoint, and exactly."""
        weights = [
            Weight(module, shape, self.settings.scheme(widths[part.name]))
            for part in self.parts
            for module, shape in zip(self.modules(part), part.shapes.values(), strict=True)
        ]
        schemes = {weight.module: weight.scheme for weight in weights}
        request = ConfigRequest(
            schemes, [], weights[0].scheme, model_dtype=self.checkpoint.config.dtype
        )

        def holds(form: Format) -> bool:
            alike = {own for module, own in schemes.items() if form.shares_scheme(module)}
            return (
                form.keeps_codes
                and len(alike) < 2
                and not any(form.check(weight) for weight in weights)
                and not form.chances(request)
            )

        return tuple(name for name, form in FORMATS.items() if holds(form))

    def budget(self) -> int | None:
        """Bytes of all weights."""
        if self.settings.average_bits is None:
            return self.settings.budget
        low, high = math.floor(self.settings.average_bits), math.ceil(self.settings.average_bits)
        a, b = (self.total_bytes({part.name: bits for part in self.parts}) for bits in (low, high))
        return a + int((b - a) * (self.settings.average_bits - low))

    @property
    def rules(self) -> GridRules:
        """Scales are exact in every format that the choice may be packed into."""
        return GridRules(
            tuple(getattr(torch, name) for name in scale_dtypes(self.checkpoint.config.dtype))
        )

    def key(self, weights: str) -> str:
        """Identity of what a rounded part gives. Which widths are measured is not in it, nor what
        the parts are: entries are named by those."""
        s, rules = self.settings, self.rules
        code = computing_code(self.checkpoint, "quantflow.evaluate.sensitivity")
        grid = [
            s.group_size,
            s.symmetric,
            [str(dtype) for dtype in rules.scale_dtypes],
            rules.min_zero,
        ]
        device = [self.device, device_name(self.device)]
        return digest(
            [
                "sensitivity",
                weights,
                self.windows.digest,
                self.checkpoint.raw_config,
                *grid,
                *device,
                code,
            ]
        )

    def layer_runs(self) -> int:
        """How often a layer is computed over all windows, the store left out."""
        layers = self.checkpoint.config.layers
        rounded = sum((layers - part.layer) * len(self.settings.widths) for part in self.parts)
        return rounded + layers * (4 + len(self.settings.widths))

    def seconds(self) -> float:
        """An order of magnitude."""
        parameters = sum(part.parameters for part in self.parts) / self.checkpoint.config.layers
        tokens = self.settings.samples * self.settings.length
        head = (
            2
            * len(self.parts)
            * len(self.settings.widths)
            * tokens
            * self.checkpoint.config.vocabulary
            * self.checkpoint.config.hidden
        )
        return (2 * parameters * tokens * self.layer_runs() + head) / RATE[self.device]


def kept_bytes(checkpoint: Checkpoint, of: Sequence[Part]) -> int:
    """Of all tensors but the weights of these parts."""
    linears = {
        f"{checkpoint.architecture.layer_prefix(part.layer)}.{name}.weight"
        for part in of
        for name in part.shapes
    }
    return sum(
        math.prod(shape) * ITEM_BYTES[checkpoint.dtype_of(n)]
        for n, shape in checkpoint.expected.items()
        if n not in linears
    )


def prepare(settings: Settings) -> Job:
    """The job. Raises UserError with every problem that can be known before anything is
    computed."""
    problems = _settings_problems(settings)
    path = resolve_model(settings.model)
    weights = Weights(path)
    checkpoint, config = weights.checkpoint, weights.checkpoint.config
    try:
        refuse_quantised(checkpoint)
    except UserError as error:
        raise ModelError([*problems, *error.problems]) from error
    measured = tuple(parts(checkpoint, settings.granularity))
    if settings.length > config.context and not config.stretches:
        problems.append(
            Problem(
                "--length", str(settings.length), f"at most the model's {config.context} positions"
            )
        )
    problems += _group_problems(checkpoint, measured, settings)
    problems += _output_problems(settings)
    device = resolve_device(settings.device)
    windows, calibration = Windows([], frozenset(), ""), 0
    if problem := tokenizer_problem(checkpoint.tokenizer_path):
        problems.append(problem)
    else:
        try:
            windows, calibration = _text(settings, checkpoint)
        except UserError as error:
            problems += error.problems
    job = Job(settings, weights, measured, windows, calibration, device)
    if not problems:
        problems += _budget_problems(job)
    if problems:
        raise UserError(problems)
    return job


def _settings_problems(settings: Settings) -> list[Problem]:
    problems = []
    if (
        not settings.widths
        or len(set(settings.widths)) < len(settings.widths)
        or not set(settings.widths) <= set(BITS)
    ):
        problems.append(
            Problem(
                "--bits",
                ",".join(map(str, settings.widths)) or "none",
                "different widths from 2 to 8",
            )
        )
    if settings.group_size != -1 and settings.group_size < 4:
        problems.append(
            Problem("--group-size", str(settings.group_size), "-1 (one group a row), or at least 4")
        )
    if settings.granularity not in get_args(Granularity):
        problems.append(
            Problem("--granularity", repr(settings.granularity), " or ".join(get_args(Granularity)))
        )
    if settings.budget is not None and settings.average_bits is not None:
        problems.append(Problem("--budget, --average-bits", "both", "one of the two"))
    bits = settings.average_bits
    if (
        bits is not None
        and settings.widths
        and not min(settings.widths) <= bits <= max(settings.widths)
    ):
        expected = f"from {min(settings.widths)} to {max(settings.widths)}, as --bits has them"
        problems.append(Problem("--average-bits", f"{bits:g}", expected))
    return problems


def _output_problems(settings: Settings) -> list[Problem]:
    """What keeps the files from being written, and whose recipe would be lost."""
    output, recipe = settings.output, settings.recipe
    if output.is_dir():
        return [Problem("--output", f"{output} is a directory", "a file to write")]
    if output.suffix.lower() in (".yaml", ".yml"):
        return [
            Problem(
                "--output",
                f"{output} is named as a recipe",
                "a .json file: the measurements",
                "The recipe goes beside it, as .yaml",
            )
        ]
    if recipe and (recipe.exists() or recipe.is_symlink()) and not _written(recipe):
        hint = "Give --output another name, or move that file"
        return [
            Problem(
                "--output",
                f"{recipe} exists, and `quantflow sensitivity` did not write it",
                "a place for the recipe",
                hint,
            )
        ]
    return []


def _written(recipe: Path) -> bool:
    """Whether a file begins as `recipe_draft` makes recipes begin."""
    try:
        with recipe.open("rb") as stream:
            return stream.readline(1000).startswith(f"# {WRITTEN}".encode())
    except OSError:
        return False


def _group_problems(
    checkpoint: Checkpoint, measured: Sequence[Part], settings: Settings
) -> list[Problem]:
    """One a kind of linear, not one a layer; each says which sizes fit all of them, since there is
    one --group-size."""
    problems: dict[tuple[str, tuple[int, int]], Problem] = {}
    if settings.group_size >= 4:  # a whole row fits any linear
        shared = math.gcd(*(shape[1] for part in measured for shape in part.shapes.values()))
        fitting = sorted(
            {
                usual_group(shared, settings.group_size),
                *(size for size in (64, 32, 16) if shared % size == 0),
            },
            reverse=True,
        )
        sizes = [str(size) for size in fitting if 4 <= size < settings.group_size]
        hint = (
            f"What fits all linears of this model: --group-size {' or '.join([*sizes, '-1'])} (a"
            " group a row)"
        )
        for part in measured:
            prefix = checkpoint.architecture.layer_prefix(part.layer)
            for name, shape in part.shapes.items():
                scheme = Scheme(4, settings.group_size, True)
                for problem in grid_problems(Weight(f"{prefix}.{name}", shape, scheme)):
                    problems.setdefault(
                        (name.rpartition(".")[2], shape), replace(problem, hint=hint)
                    )
    return list(problems.values())


def _text(settings: Settings, checkpoint: Checkpoint) -> tuple[Windows, int]:
    """The windows, and how many of that length the text has for a recipe's calibration."""
    cut = cut_windows(
        load_tokenizer(checkpoint.tokenizer_path),
        model_documents(checkpoint.tokenizer_path, settings.data, field=settings.field),
        count=max(CALIBRATION, settings.samples),
        least=settings.samples,
        length=settings.length,
        skip=settings.skip,
        source=Path(settings.data).name,
    )
    windows = replace(cut, tokens=cut.tokens[: settings.samples])
    if (largest := max(map(max, windows.tokens))) >= checkpoint.config.vocabulary:
        expected = f"ids below the model's vocabulary of {checkpoint.config.vocabulary}"
        hint = "Tokenizer and weights are not of one model"
        raise UserError(
            Problem(f"{checkpoint.path} tokenizer", f"gives token {largest}", expected, hint)
        )
    return windows, len(cut.tokens)


def _budget_problems(job: Job) -> list[Problem]:
    budget, bits = job.settings.budget, min(job.settings.widths)
    least = job.total_bytes({part.name: bits for part in job.parts})
    if budget is None or budget >= least:
        return []
    expected = (
        f"at least {least}, all linears in {bits} bits: the rest of the model is {job.kept_bytes}"
    )
    return [
        Problem(
            "--budget",
            f"{budget} bytes",
            expected,
            "The budget is of all weights, embeddings and head included",
        )
    ]
