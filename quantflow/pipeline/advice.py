"""What of a model fits: the best weights, KV cache and tensor parallelism for a size of memory, a
context and a batch.

Everything comes from the config and the shapes; no weight is read. The rule of thumb: precision
first: full precision; memory short: an int8 KV cache; shorter still: weights of fewer bits; both
together for the least memory. The sum is in `memory.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantflow.artifacts.fingerprint import digest
from quantflow.artifacts.store import store_beside
from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.engine.config import SHARE
from quantflow.engine.families import engine_problem
from quantflow.errors import Problem, UserError
from quantflow.formats.recognise import refuse_quantised
from quantflow.pipeline.memory import FORMAT, Candidate, Model, Need, Question
from quantflow.pipeline.plan import weights_key
from quantflow.quant.scheme import Scheme
from quantflow.recipe import BUNDLED
from quantflow.recipe.writer import Draft, name_of
from quantflow.units import ROUNDING, is_number

# in the order that they are tried
GROUPS = {8: (128, 64, 32), 4: (32, 64, 128), 3: (32, 64, 128), 2: (32, 64, 128)}
USUAL_BITS = 4  # fewer only where no number of devices holds these: below, rounding costs much more


@dataclass(frozen=True)
class Fitted:
    """A candidate, what it needs, and what else would fit: the largest batch at the context, the
    longest context at the batch."""

    candidate: Candidate
    need: Need
    largest_batch: int = 0
    longest_context: int = 0


@dataclass(frozen=True)
class Advice:
    """proposal: None where nothing fits. better: the next candidate that would be better, which
    does not fit. least: what needs the least memory on a device. by_ranks: the best of each number
    of devices that anything fits. least_by_ranks: what needs the least there, of each number that
    the model can be cut for. impossible: number of devices -> what keeps a model from being cut for
    them, or groups from being used."""

    question: Question
    proposal: Fitted | None
    better: Fitted | None
    least: Fitted
    by_ranks: dict[int, Fitted]
    least_by_ranks: dict[int, Fitted]
    impossible: dict[int, list[str]]

    def as_dict(self) -> dict[str, Any]:
        def entry(fitted: Fitted | None) -> dict[str, Any] | None:
            if fitted is None:
                return None
            c = fitted.candidate
            return {
                "weights": str(c.scheme) if c.scheme else "full precision",
                "bits": c.bits,
                "group_size": c.scheme.group_size if c.scheme else None,
                "symmetric": c.scheme.symmetric if c.scheme else None,
                "kv": "int8" if c.int8_kv else "full",
                "tp": c.tp,
                "bytes": {
                    **{term.name.lower(): term.bytes for term in fitted.need.terms},
                    "total": fitted.need.total,
                },
                "largest_batch": fitted.largest_batch or None,
                "longest_context": fitted.longest_context or None,
            }

        question = {
            "fit": self.question.fit,
            "context": self.question.context,
            "batch": self.question.batch,
            "device": self.question.device,
        }
        return {
            "question": question,
            "proposal": entry(self.proposal),
            "better": entry(self.better),
            "least": entry(self.least),
            "by_tp": {tp: entry(fitted) for tp, fitted in self.by_ranks.items()},
            "least_by_tp": {tp: entry(fitted) for tp, fitted in self.least_by_ranks.items()},
            "impossible": self.impossible,
        }


def schemes(question: Question, mixture: bool) -> Iterator[Scheme]:
    """The grids that are tried, the better ones first."""
    symmetric = mixture if question.symmetric is None else question.symmetric
    for bits, groups in GROUPS.items():
        for group in groups:
            yield Scheme(bits, group, symmetric)


def advise(checkpoint: Checkpoint, question: Question) -> Advice:
    """What to do. Raises UserError for a question that has no answer: a context longer than the
    model's, a model that cannot be cut so."""
    if absent := engine_problem(checkpoint):
        raise UserError(absent)
    model = Model(checkpoint, question)
    problems = []
    refuse_quantised(checkpoint)
    if question.context > checkpoint.config.context and not checkpoint.config.stretches:
        problems.append(
            Problem(
                "--context",
                str(question.context),
                f"at most the model's {checkpoint.config.context} positions",
            )
        )
    whole = {tp: model.problems(None, tp) for tp in question.ranks}
    if all(whole.values()):
        problems += [Problem(f"--tp {tp}", why) for tp, reasons in whole.items() for why in reasons]
    if problems:
        raise UserError(problems)
    impossible: dict[int, list[str]] = {tp: reasons for tp, reasons in whole.items() if reasons}
    ordered: dict[int, list[Candidate]] = {}
    for tp in question.ranks:
        if not whole[tp]:
            ordered[tp] = [Candidate(None, int8, tp) for int8 in (False, True)]
            ordered[tp] += _quantised(model, tp, impossible)
    needs = {
        c: model.need(c, question.context, question.batch) for row in ordered.values() for c in row
    }
    best = {
        tp: next((c for c in row if needs[c].total <= question.fit), None)
        for tp, row in ordered.items()
    }
    by_ranks = {tp: fitted(model, c) for tp, c in best.items() if c}
    proposal = min(
        by_ranks.values(),
        key=lambda f: (f.candidate.bits < USUAL_BITS, f.candidate.tp),
        default=None,
    )
    better = None
    if proposal:
        row = ordered[proposal.candidate.tp]
        at = row.index(proposal.candidate)
        better = Fitted(row[at - 1], needs[row[at - 1]]) if at else None
    smallest = {tp: min(row, key=lambda c: needs[c].total) for tp, row in ordered.items()}
    least_by_ranks = {tp: Fitted(c, needs[c]) for tp, c in smallest.items()}
    least = min(least_by_ranks.values(), key=lambda f: (f.need.total, f.candidate.tp))
    return Advice(question, proposal, better, least, by_ranks, least_by_ranks, impossible)


def fitted(model: Model, candidate: Candidate) -> Fitted:
    """With the largest batch and the longest context that fit."""
    question = model.question
    need = model.need(candidate, question.context, question.batch)
    room = question.fit - need.weights - need.reserve

    def fits(context: int, batch: int) -> bool:
        return (
            model.kv(candidate, context, batch)
            + model.activations(candidate.tp, context, batch).bytes
            <= room
        )

    config = model.checkpoint.config
    most = 2**40 if config.stretches else config.context
    largest = _largest(lambda batch: fits(question.context, batch), 2**24)
    return Fitted(
        candidate, need, largest, _largest(lambda context: fits(context, question.batch), most)
    )


def _quantised(model: Model, tp: int, impossible: dict[int, list[str]]) -> list[Candidate]:
    """By bits, then by the cache, then by groups, the better first. Of 8 bits only the largest
    groups that can be cut."""
    by_bits: dict[int, list[Scheme]] = {}
    for scheme in schemes(model.question, model.checkpoint.config.experts > 0):
        if scheme.bits == 8 and by_bits.get(8):
            continue
        if reasons := model.problems(scheme, tp):
            why_not = impossible.setdefault(tp, [])
            why_not += [
                text
                for why in reasons
                if (text := f"groups of {scheme.group_size}: {why}") not in why_not
            ]
        else:
            by_bits.setdefault(scheme.bits, []).append(scheme)
    return [
        Candidate(scheme, int8, tp)
        for schemes in by_bits.values()
        for int8 in (False, True)
        for scheme in schemes
    ]


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` for which `fits` holds, 0 for none; it holds for all
    smaller ones then."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Measured:
    """What `quantflow sensitivity` measured. kl_mean: width -> KL divergence in nats a token of the
    whole model in it, rounded to nearest.
    same_weights: whether the weights are known to be this model's; else the config alone is."""

    path: Path
    text: str
    group_size: int
    symmetric: bool
    kl_mean: Mapping[int, float]
    same_weights: bool

    def of(self, scheme: Scheme) -> float | None:
        """None for what was not measured."""
        same = (scheme.group_size, scheme.symmetric) == (self.group_size, self.symmetric)
        return self.kl_mean.get(scheme.bits) if same else None


def measured(checkpoint: Checkpoint, file: Path | None) -> tuple[Measured | None, list[str]]:
    """The measurements in a file, or in one that lies in the model's directory, beside it, or here,
    where that is of this model; and what is wrong with files that were found and cannot be read.
    Raises UserError for a file that was given and is no such."""
    places = (
        [file]
        if file
        else [
            folder / "sensitivity.json"
            for folder in (checkpoint.path, checkpoint.path.parent, Path())
        ]
    )
    unusable = []
    for path in dict.fromkeys(places):
        if not file and not path.exists():
            continue
        try:
            result = _read_measured(checkpoint, path)
            reason = "measurements of another model"
        except _NoMeasure as error:
            result, reason = None, str(error)
            unusable.append(f"{path}: {reason}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            result, reason = (
                None,
                (isinstance(error, OSError) and error.strerror)
                or "no measurements of quantflow sensitivity",
            )
            unusable.append(f"{path}: {reason}")
        if result:
            return result, unusable
        if file:
            raise UserError(
                Problem(
                    "--sensitivity",
                    f"{path}: {reason}",
                    "what `quantflow sensitivity` wrote for this model",
                )
            )
    return None, unusable


class _NoMeasure(Exception):
    """What a file of measurements says cannot have been measured."""


def _read_measured(checkpoint: Checkpoint, path: Path) -> Measured | None:
    """None for another model's. Raises what a damaged file makes its reading raise."""
    record = json.loads(path.read_text(encoding="utf-8"))
    data, model = record["data"], record["model"]
    text = f"{data['windows']} windows of {data['length']} tokens of {data['source']}"
    text.encode()  # half a surrogate pair, which JSON can hold, could not be shown
    for bits, whole in record["uniform"].items():
        if not is_number(whole["measured"], ROUNDING):
            raise _NoMeasure(
                f"a KL divergence of {json.dumps(whole['measured'])[:60]} in {int(bits)} bits"
            )
    kl_mean = {int(bits): float(whole["measured"]) for bits, whole in record["uniform"].items()}
    weights = _known_weights(checkpoint, path)
    measurement = Measured(
        path,
        text,
        int(record["group_size"]),
        bool(record["symmetric"]),
        kl_mean,
        weights is not None,
    )
    same = model["config"] == digest(checkpoint.raw_config) and weights in (None, model["weights"])
    return measurement if same else None


def _known_weights(checkpoint: Checkpoint, beside: Path) -> str | None:
    """What tells the model's weights from others, where the store beside the measurements has their
    hashes; None elsewhere, since no weight is read here."""
    if checkpoint.config_only or not checkpoint.files:
        return None
    digests = store_beside(beside).cached_digests(checkpoint.files)
    return None if digests is None else weights_key(checkpoint, digests.values())


def cache_share(question: Question, fitted: Fitted) -> float | None:
    """The engine's `--cache-max-entry-count` that gives the cache this much, None where its default
    does."""
    left = question.fit - fitted.need.weights - fitted.need.reserve
    share = fitted.need.kv / left
    return None if share <= SHARE[question.device] else min(1.0, math.ceil(share * 100) / 100)


def recipe_draft(checkpoint: Checkpoint, model: str, candidate: Candidate) -> Draft | None:
    """The least recipe that makes the candidate; None for full precision, which needs none."""
    if candidate.scheme is None:
        return None
    scheme, kv = candidate.scheme, candidate.int8_kv
    return Draft(
        name_of(checkpoint.path, f"_w{scheme.bits}{'_kv8' if kv else ''}"),
        model,
        {"data": BUNDLED, "samples": 128, "seqlen": min(2048, checkpoint.config.max_positions)},
        {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric},
        [
            *(["calibrate"] if kv else []),
            "gptq",
            *(["kv_qparams"] if kv else []),
            {"pack": {"format": FORMAT}},
            *([{"shard": {"tp": candidate.tp}}] if candidate.tp > 1 else []),
        ],
        ["demo comes with QuantFlow; text like what the model will be asked is better: data: FILE"],
    )


def settings(candidate: Candidate, stages: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--set` options that give a recipe with these stages the candidate, and stages that it lacks
    for that."""
    if candidate.scheme is None:
        return [], []
    scheme = candidate.scheme
    values = {
        "weights.bits": scheme.bits,
        "weights.group_size": scheme.group_size,
        "weights.symmetric": str(scheme.symmetric).lower(),
    }
    lacking = [
        stage for stage in ("calibrate", "kv_qparams") if candidate.int8_kv and stage not in stages
    ]
    if candidate.tp > 1:
        if "shard" in stages:
            values["stages.shard.tp"] = candidate.tp
        else:
            lacking.append(f"shard: {{tp: {candidate.tp}}}")
    return [f"--set {name}={value}" for name, value in values.items()], lacking
