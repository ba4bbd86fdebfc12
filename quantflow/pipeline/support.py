"""Whether a checkpoint is supported: what computes it, what of it a recipe would quantise, what is
kept and why, and what runs the result. All of it from config.json and the headers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.checkpoints.gguf.writer import decoder_problems
from quantflow.engine.families import engine_problem
from quantflow.errors import UserError
from quantflow.formats.engine_classes import CLASSES
from quantflow.formats.engines import LLAMA_CPP, SGLANG, TRANSFORMERS, VLLM
from quantflow.pipeline.linears import other_matrices
from quantflow.pipeline.starter import TARGETS, Target, offer
from quantflow.tokenizers.load import tokenizer_problem

BITS = 4  # of the weights that engines are asked about
_ITEM = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Part:
    """Some of a checkpoint's tensors, and their bytes."""

    tensors: int
    bytes: int


@dataclass(frozen=True)
class Runs:
    """Whether an engine runs what a recipe for 4 bits makes, and how, or why not."""

    engine: str
    answer: Literal["yes", "no", "perhaps"]
    how: str


@dataclass(frozen=True)
class Support:
    """computed_by: what computes its layers while they are quantised. written_as: the class of an
    artifact's config.json. quantised: the decoder's linears. kept: the rest, by the reason.
    problems: what would keep a recipe from running."""

    computed_by: str
    written_as: str
    quantised: Part
    kept: Mapping[str, Part]
    problems: tuple[str, ...]
    engines: tuple[Runs, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def support(checkpoint: Checkpoint) -> Support:
    """What can be done with a checkpoint that is not quantised."""
    library, written_as = checkpoint.architecture.library, _written_as(checkpoint)
    linears = {
        f"{checkpoint.architecture.layer_prefix(i)}.{name}.weight"
        for i in range(checkpoint.config.layers)
        for name in checkpoint.linears(i)
    }
    kept: dict[str, list[str]] = {}
    for name, reason in _kept(checkpoint, linears):
        kept.setdefault(reason, []).append(name)
    problems = [*checkpoint.problems()]
    if not checkpoint.config_only and (problem := tokenizer_problem(checkpoint.tokenizer_path)):
        problems.append(problem)
    return Support(
        f"{library.name} of {library.version}" if library else "QuantFlow's own decoder",
        written_as,
        _part(checkpoint, linears),
        {reason: _part(checkpoint, names) for reason, names in kept.items()},
        tuple(map(str, problems)),
        tuple(_engines(checkpoint, written_as)),
    )


def _written_as(checkpoint: Checkpoint) -> str:
    config = checkpoint.architecture.native_config(checkpoint.raw_config)
    if checkpoint.architecture.library:
        return checkpoint.architecture.library.name
    if classes := config.get("architectures"):
        return str(classes[0])
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]])


def _kept(checkpoint: Checkpoint, linears: set[str]) -> Iterator[tuple[str, str]]:
    """Every tensor that no recipe quantises, by its native name, and why."""
    architecture = checkpoint.architecture
    others = dict(other_matrices(checkpoint))
    outer = {architecture.embedding: "the embedding", architecture.head: "the head"}
    for name in checkpoint.expected:
        module = name.removesuffix(".weight")
        if name in linears:
            continue
        if architecture.layer_of(name) is None:
            yield name, outer.get(module, "outside the decoder's layers")
        else:
            yield name, others.get(module, "norms, biases and other vectors")
    for name, reason in checkpoint.copied.items():
        if name not in checkpoint.expected:
            yield name, reason


def _part(checkpoint: Checkpoint, names: set[str] | list[str]) -> Part:
    there = [name for name in names if checkpoint.config_only or name in checkpoint.sources]
    return Part(
        len(there),
        sum(
            math.prod(checkpoint.shape_of(name)) * _ITEM.get(checkpoint.dtype_of(name), 1)
            for name in there
        ),
    )


def _engines(checkpoint: Checkpoint, written_as: str) -> Iterator[Runs]:
    refused = engine_problem(checkpoint)
    yield (
        Runs("QuantFlow", "no", refused.found)
        if refused
        else Runs("QuantFlow", "yes", "quantflow chat, generate, serve and eval")
    )
    for name, target in TARGETS.items():
        yield _runs(checkpoint, name, target, written_as)


def _runs(checkpoint: Checkpoint, name: str, target: Target, written_as: str) -> Runs:
    try:
        way, scheme = offer(checkpoint, BITS, name)
    except UserError as error:
        return Runs(target.engine, "no", "; ".join(problem.found for problem in error.problems))
    how = f"{way.format}, {scheme}"
    if target.engine == LLAMA_CPP:
        config = checkpoint.architecture.native_config(checkpoint.raw_config)
        if problems := decoder_problems(str(config.get("model_type")), checkpoint.config):
            return Runs(target.engine, "no", "; ".join(problem.found for problem in problems))
        return Runs(target.engine, "yes", how)
    if target.engine == TRANSFORMERS or written_as in CLASSES.get(target.engine, ()):
        return Runs(target.engine, "yes", how)
    if target.engine in (VLLM, SGLANG):
        by = "its transformers backend" if target.engine == VLLM else "its list of models"
        return Runs(target.engine, "perhaps", f"{how}: {by} decides about {written_as}")
    return Runs(target.engine, "no", f"it has no {written_as}")
