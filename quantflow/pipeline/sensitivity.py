"""`quantflow sensitivity`: every part of a model measured at several widths, and widths chosen from
that for a budget of bytes.

What a layer's parts gave is in the store when the next layer begins: a run that was killed goes on
there, and another width, or another budget, measures only what is new.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantflow import __version__
from quantflow.artifacts.fingerprint import digest
from quantflow.artifacts.store import write_atomic, write_json
from quantflow.errors import ModelError, Problem
from quantflow.evaluate.sensitivity import Measure, Part, Rounding
from quantflow.pipeline.plan import weights_key
from quantflow.pipeline.progress import Progress
from quantflow.pipeline.room import room
from quantflow.pipeline.sensitivity_job import WRITTEN, Job, Settings
from quantflow.quant.knapsack import Choice, Option, choose
from quantflow.recipe.overrides import Widths, compact
from quantflow.recipe.writer import Draft, name_of

CHOSEN_ON = "the windows that its widths were chosen on"


@dataclass(frozen=True)
class Measured:
    """kl_mean, stored_bytes: width -> KL divergence in nats a token where this part alone has it,
    and the bytes of its weights."""

    part: Part
    modules: tuple[str, ...]
    kl_mean: Mapping[int, float]
    stored_bytes: Mapping[int, int]


@dataclass(frozen=True)
class Whole:
    """A rounding of the whole model. stored_bytes: of all weights. predicted: the sum of the parts'
    divergences; measured: its own."""

    stored_bytes: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class Mixed(Whole):
    """What the budget bought. widths: part -> bits. average_bits: of a quantised weight. gap: how
    much less, at most, another choice could have predicted."""

    budget: int
    widths: Mapping[str, int]
    average_bits: float
    gap: float


@dataclass(frozen=True)
class Findings:
    settings: Settings
    measured: tuple[Measured, ...]
    uniform: Mapping[int, Whole]
    mixed: Mixed | None
    overrides: Widths | None
    recipe: Path | None
    formats: tuple[str, ...]
    record: Mapping[str, Any]


def run(job: Job, progress: Progress, *, fresh: bool = False) -> Findings:
    """Measures what the store does not have, chooses, measures the choice, and writes the files."""
    job.settings.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    job.store.root.mkdir(parents=True, exist_ok=True)
    with job.store.locked():
        job.store.drop_torn()
        progress.phase("hash", 1)
        weights = weights_key(job.checkpoint, job.store.digests(job.checkpoint.files).values())
        progress.step()
        key = job.key(weights)
        if fresh:
            job.store.forget(key)
        measured = _parts(job, key, progress)
        choice, widths = _chosen(job, measured)
        uniform = {bits: {part.name: bits for part in job.parts} for bits in job.settings.widths}
        divergences = _wholes(
            job, key, [*uniform.values(), *([widths] if widths else [])], progress
        )
    by_part = {m.part.name: m for m in measured}

    def predicted(of: Mapping[str, int]) -> float:
        return sum(by_part[name].kl_mean[bits] for name, bits in of.items())

    of_uniform = zip(uniform.items(), divergences[: len(uniform)], strict=True)
    whole = {b: Whole(job.total_bytes(w), predicted(w), kl) for (b, w), kl in of_uniform}
    mixed = overrides = recipe = None
    if choice and widths:
        parameters = sum(part.parameters for part in job.parts)
        average = sum(part.parameters * widths[part.name] for part in job.parts) / parameters
        mixed = Mixed(
            job.total_bytes(widths),
            predicted(widths),
            divergences[-1],
            job.budget() or 0,
            widths,
            average,
            choice.gap,
        )
        overrides = compact(
            {module: widths[part.name] for part in job.parts for module in job.modules(part)}
        )
        recipe = job.settings.recipe
    record = _record(job, weights, measured, whole, mixed)
    write_json(job.settings.output, record)
    if recipe and mixed and overrides:
        write_atomic(recipe, recipe_draft(job, mixed, overrides, whole).text.encode())
    formats = job.formats(widths) if widths else ()
    return Findings(job.settings, measured, whole, mixed, overrides, recipe, formats, record)


def _measure(job: Job, key: str, step: Callable[[], None]) -> Measure:
    """One whose hidden states lie in files where they are larger than the activation budget."""
    # As many as are open at once: the reference, what is carried on, and every rounding of a layer.
    widths = len(job.settings.widths)
    streams = 2 + max(_most_parts(job) * widths, widths + 1)
    tokens = torch.tensor(job.windows.tokens)
    channels = job.checkpoint.row_channels(tokens.shape[1], torch.float32)
    nbytes = streams * tokens.numel() * channels * 4
    place = room(job.device, job.store.folder(key)).sharing(nbytes)
    return Measure(job.weights, tokens, job.rules, place, step)


def _most_parts(job: Job) -> int:
    return max(
        sum(part.layer == layer for part in job.parts)
        for layer in {part.layer for part in job.parts}
    )


def _parts(job: Job, key: str, progress: Progress) -> tuple[Measured, ...]:
    """Every part at every width, from the store or measured."""
    layers, widths = job.checkpoint.config.layers, job.settings.widths
    known: list[dict[str, float]] = [
        job.store.read_json(key, f"layer-{i:05}") or {} for i in range(layers)
    ]
    every = [(part, bits) for part in job.parts for bits in widths]
    wanted = [
        [
            (part, bits)
            for part, bits in every
            if part.layer == i and _name(part, bits) not in known[i]
        ]
        for i in range(layers)
    ]
    missing = [i for i in range(layers) if wanted[i]]
    if missing:
        steps = 2 * layers - 1 + sum(layers - i for i in missing)
        progress.phase("measure", steps)
        at = ""
        measure = _measure(job, key, lambda: progress.step(at))

        def roundings(index: int) -> list[Rounding]:
            nonlocal at
            at = f"layer {index + 1} of {layers}"
            return [part.rounded(job.settings.scheme(bits)) for part, bits in wanted[index]]

        for index, divergences in measure.layer_by_layer(roundings, missing[0]):
            if divergences:
                _check_finite(
                    [
                        (f"{part.name} in {bits} bits", kl)
                        for (part, bits), kl in zip(wanted[index], divergences, strict=True)
                    ]
                )
                known[index] |= {
                    _name(part, bits): kl
                    for (part, bits), kl in zip(wanted[index], divergences, strict=True)
                }
                job.store.write_json(key, f"layer-{index:05}", known[index])
            if index == missing[-1]:
                break
    return tuple(
        Measured(
            part,
            job.modules(part),
            {bits: known[part.layer][_name(part, bits)] for bits in widths},
            {bits: part.stored_bytes(job.settings.scheme(bits)) for bits in widths},
        )
        for part in job.parts
    )


def _check_finite(divergences: Sequence[tuple[str, float]]) -> None:
    """Raises ModelError for the divergences that are no numbers, before they are stored."""
    hint = "The model's own logits, or those with these weights rounded, are not finite"
    if wrong := [
        Problem(name, f"a KL divergence of {kl}", "a finite number", hint)
        for name, kl in divergences
        if not math.isfinite(kl)
    ]:
        raise ModelError(wrong)


def _name(part: Part, bits: int) -> str:
    return f"{' '.join(part.shapes)} {bits}"


def _chosen(job: Job, measured: Sequence[Measured]) -> tuple[Choice | None, dict[str, int] | None]:
    budget, widths = job.budget(), job.settings.widths
    if budget is None:
        return None, None
    options = [[Option(m.stored_bytes[bits], m.kl_mean[bits]) for bits in widths] for m in measured]
    choice = choose(options, budget - job.kept_bytes)
    assert choice is not None, "the budget was checked"
    return choice, {m.part.name: widths[i] for m, i in zip(measured, choice.options, strict=True)}


def _wholes(
    job: Job, key: str, widths: Sequence[Mapping[str, int]], progress: Progress
) -> list[float]:
    """The divergence of the whole model in each of these, from the store or measured."""
    known: dict[str, float] = job.store.read_json(key, "whole") or {}
    identities = [
        digest([[part.name, w[part.name]] for part in job.parts] + [job.settings.granularity])
        for w in widths
    ]
    new = {
        identity: w for identity, w in zip(identities, widths, strict=True) if identity not in known
    }
    if new:
        progress.phase("whole", 2 * job.checkpoint.config.layers)
        divergences = _measure(job, key, progress.step).whole([job.whole(w) for w in new.values()])
        names = [
            f"the whole model in {' and '.join(map(str, sorted(set(w.values()))))} bits"
            for w in new.values()
        ]
        _check_finite(list(zip(names, divergences, strict=True)))
        known |= dict(zip(new, divergences, strict=True))
        job.store.write_json(key, "whole", known)
    return [known[identity] for identity in identities]


def _record(
    job: Job,
    weights: str,
    measured: Sequence[Measured],
    uniform: Mapping[int, Whole],
    mixed: Mixed | None,
) -> dict[str, Any]:
    s = job.settings
    return {
        "quantflow": __version__,
        "model": {
            "name": job.checkpoint.path.resolve().name,
            "config": digest(job.checkpoint.raw_config),
            "weights": weights,
        },
        "data": {
            "source": job.windows.source,
            "tokens": job.windows.digest,
            "windows": s.samples,
            "length": s.length,
            **({"left_out": job.windows.left_out.as_dict()} if job.windows.left_out else {}),
        },
        "method": "rtn",
        "group_size": s.group_size,
        "symmetric": s.symmetric,
        "granularity": s.granularity,
        "device": job.device,
        "kept_bytes": job.kept_bytes,
        "parts": [
            {
                "name": m.part.name,
                "modules": list(m.modules),
                "parameters": m.part.parameters,
                "kl_mean": {str(b): m.kl_mean[b] for b in s.widths},
                "bytes": {str(b): m.stored_bytes[b] for b in s.widths},
            }
            for m in measured
        ],
        "uniform": {str(bits): asdict(whole) for bits, whole in uniform.items()},
        "mixed": (
            {**asdict(mixed), "widths": dict(mixed.widths), "measured_on": CHOSEN_ON}
            if mixed
            else None
        ),
    }


def recipe_draft(job: Job, mixed: Mixed, widths: Widths, uniform: Mapping[int, Whole]) -> Draft:
    """A recipe with the chosen widths, to run as it is or to take `weights` from."""
    s = job.settings
    formats = job.formats(mixed.widths)
    others = ", ".join(
        f"all in {bits} bits {whole.measured:.4g}" for bits, whole in uniform.items()
    )
    return Draft(
        name_of(job.checkpoint.path, "_mixed"),
        s.model,
        {
            "data": s.data,
            **({"field": s.field} if s.field else {}),
            "samples": job.calibration,
            "seqlen": s.length,
            "skip": s.skip,
        },
        {
            "bits": widths.bits,
            "group_size": s.group_size,
            "symmetric": s.symmetric,
            "ignore": [job.checkpoint.architecture.head],
            "overrides": [{"match": pattern, "bits": bits} for pattern, bits in widths.overrides],
        },
        ["gptq", {"pack": {"format": formats[0] if formats else "huggingface"}}],
        [
            f"{WRITTEN}; `weights` can be taken over into any recipe of this model.",
            (
                f"KL divergence by rounding to nearest, nats a token on {s.samples} windows of"
                f" {s.length} tokens of {job.windows.source}:"
            ),
            (
                f"these widths {mixed.measured:.4g} at {mixed.average_bits:.2f} bits a weight,"
                f" {mixed.stored_bytes} bytes; {others}."
            ),
            f"These are {CHOSEN_ON}; only other text says what they are worth.",
            (
                "Formats that hold these widths together:"
                f" {', '.join(formats) or 'none; huggingface dequantises them'}."
            ),
            (
                "To see what comes of it, add a stage: `- evaluate: {data: FILE}` with text that"
                " calibration has not seen."
            ),
        ],
    )
