"""What of a model fits: the best weights, KV cache and tensor parallelism for a size of memory, a context and a batch.

Everything comes from the config and the shapes; no weight is read. The rule of thumb: precision first: full precision; memory short: an
int8 KV cache; shorter still: weights of fewer bits; both together for the least memory. Letters: `B` batch, `C` context, `T` tokens of a
step, `H` hidden, `I` intermediate, `V` vocabulary.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from quantflow.artifacts.fingerprint import digest
from quantflow.engine.engine import SHARE, STEP_TOKENS, EngineConfig
from quantflow.engine.kv_cache import KVFormat, block_bytes
from quantflow.engine.load import rank_config
from quantflow.errors import ModelError, Problem, UserError
from quantflow.formats import FORMATS
from quantflow.formats.base import grid_problems, rank_shape
from quantflow.models.architecture import linear_shapes
from quantflow.models.checkpoint import Checkpoint
from quantflow.models.sharding import parallel_dimension
from quantflow.quant.grid import Scheme
from quantflow.recipe.overrides import matches

RANKS = (1, 2, 4, 8)
GROUPS = {8: (128, 64, 32), 4: (32, 64, 128), 3: (32, 64, 128), 2: (32, 64, 128)}  # in the order that they are tried
USUAL_BITS = 4  # fewer only where no number of devices holds these: below, rounding costs much more
RESERVE = 0.05  # of the size: the driver's context, and what an allocator cannot hand out
BLOCK = EngineConfig.block_size
GRID_BITS = 24  # of a group: a scale of 16, a zero point of 8
SPLIT = 512  # keys that one program of a decode's attention takes
FORMAT = "compressed-tensors"  # it holds every width and group size that is proposed


@dataclass(frozen=True)
class Question:
    """fit: bytes of one device's memory. context: tokens of a text. batch: texts at once. device: `cuda` or `cpu`, whose layouts and step
    sizes are counted. ranks: tensor-parallel degrees to consider. symmetric: of the grids; None: symmetric for mixtures alone, whose
    experts compressed-tensors holds in no other way. ignore: patterns of linears that stay as they are."""

    fit: int
    context: int
    batch: int
    device: str = "cuda"
    ranks: tuple[int, ...] = RANKS
    symmetric: bool | None = None
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """scheme: None for full precision. int8_kv: with calibrated parameters where there is a recipe to calibrate them, else a scale a token
    and head."""

    scheme: Scheme | None
    int8_kv: bool
    tp: int

    @property
    def bits(self) -> int:
        return self.scheme.bits if self.scheme else 16

    def __str__(self) -> str:
        if self.scheme is None:
            return f"full precision{', int8 KV' if self.int8_kv else ''}"
        return f"{self.scheme}, {'int8' if self.int8_kv else 'full'} KV"


@dataclass(frozen=True)
class Need:
    """Bytes on one device."""

    weights: int
    kv: int
    activations: int
    reserve: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations + self.reserve


@dataclass(frozen=True)
class Fitted:
    """A candidate, what it needs, and what else would fit: the largest batch at the context, the longest context at the batch."""

    candidate: Candidate
    need: Need
    largest_batch: int = 0
    longest_context: int = 0


@dataclass(frozen=True)
class Advice:
    """proposal: None where nothing fits. better: the next candidate that would be better, which does not fit. least: what needs the least
    memory on a device. by_ranks: the best of each number of devices that anything fits. impossible: number of devices -> what keeps a
    model from being cut for them, or groups from being used."""

    question: Question
    proposal: Fitted | None
    better: Fitted | None
    least: Fitted
    by_ranks: dict[int, Fitted]
    impossible: dict[int, list[str]]

    def as_dict(self) -> dict[str, Any]:
        def told(fitted: Fitted | None) -> dict[str, Any] | None:
            if fitted is None:
                return None
            c = fitted.candidate
            return {
                "weights": str(c.scheme) if c.scheme else "full precision", "bits": c.bits,
                "group_size": c.scheme.group_size if c.scheme else None, "symmetric": c.scheme.symmetric if c.scheme else None,
                "kv": "int8" if c.int8_kv else "full", "tp": c.tp, "bytes": {**asdict(fitted.need), "total": fitted.need.total},
                "largest_batch": fitted.largest_batch or None, "longest_context": fitted.longest_context or None,
            }  # fmt: skip

        question = {
            "fit": self.question.fit,
            "context": self.question.context,
            "batch": self.question.batch,
            "device": self.question.device,
        }
        return {
            "question": question, "proposal": told(self.proposal), "better": told(self.better), "least": told(self.least),
            "by_tp": {tp: told(fitted) for tp, fitted in self.by_ranks.items()}, "impossible": self.impossible,
        }  # fmt: skip


@dataclass(frozen=True)
class Model:
    """The sizes of a checkpoint, for one question."""

    checkpoint: Checkpoint
    question: Question

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.checkpoint.config.dtype)

    @property
    def stretches(self) -> bool:
        """Whether contexts beyond the trained positions are served."""
        return self.checkpoint.config.rope.kind in ("dynamic", "qwen")

    @cached_property
    def linears(self) -> Counter[tuple[str, tuple[int, int], int, bool]]:
        """(name in the layer, of expert 0 for all, shape, the dimension that ranks cut, whether it may be quantised) -> how many."""
        architecture, config, found = (
            self.checkpoint.architecture,
            self.checkpoint.config,
            Counter[tuple[str, tuple[int, int], int, bool]](),
        )
        for index in range(config.layers):
            for name, shape in linear_shapes(architecture, config, index).items():
                module = f"{architecture.layer_prefix(index)}.{name}"
                quantised = not any(matches(module, pattern) for pattern in self.question.ignore)
                found[re.sub(r"\d+(?=\.)", "0", name), shape, parallel_dimension(name, architecture.layer), quantised] += 1
        return found

    def weights(self, scheme: Scheme | None, tp: int) -> int:
        """Of one rank: the linears cut, the rest whole; norms in float32, as the engine keeps them."""
        item, total = self.dtype.itemsize, self.others(tp)
        for (_, shape, cut, quantised), count in self.linears.items():
            n, k = rank_shape(shape, tp, cut)
            total += count * (held_bytes((n, k), scheme, self.question.device) if scheme and quantised else n * k * item)
        return total

    def others(self, tp: int) -> int:
        """Bytes of all that is no linear's weight, on one rank."""
        checkpoint, architecture, item, total = self.checkpoint, self.checkpoint.architecture, self.dtype.itemsize, 0
        layers = {index: linear_shapes(architecture, checkpoint.config, index) for index in range(checkpoint.config.layers)}
        linears = {f"{architecture.layer_prefix(index)}.{name}.weight" for index, shapes in layers.items() for name in shapes}
        for name, shape in checkpoint.expected.items():
            if name not in linears:
                ranks = tp if len(shape) == 1 and checkpoint.cut(name) is not None else 1  # a bias
                total += math.prod(shape) // ranks * (4 if "norm" in name else item)
        return total

    def kv(self, candidate: Candidate, context: int, batch: int) -> int:
        """Whole blocks of every text. The engine keeps the tokens that a sliding window has left behind."""
        part, calibrated = rank_config(self.checkpoint.config, candidate.tp), candidate.scheme is not None
        form = KVFormat(candidate.int8_kv, ({},) if candidate.int8_kv and calibrated else ())
        parameters = 8 * part.layers * part.kv_heads * (1 + part.head_dim) if form.parameters else 0  # scales and zero points, K and V
        return batch * -(-context // BLOCK) * block_bytes(part, form, self.dtype, BLOCK) + parameters

    def activations(self, tp: int, context: int, batch: int) -> dict[str, int]:
        """What a step allocates at once, upper estimates: in a layer, for the partial results of a decode's attention, in the head. They
        are not there together: the largest counts.

        A layer: residual stream, normalised input, output and a padded copy, 4H; the MLP's two inner products, what is made of them and a
        copy, 4I; or q, k, v and attention's output. Partial results: float32, for every 512 keys. The head: the logits of the batch twice,
        and a row in float32 while it is sampled.
        """
        config, item = self.checkpoint.config, self.dtype.itemsize
        tokens = max(STEP_TOKENS[self.question.device], batch + BLOCK)
        width = max(config.width(i) for i in range(config.layers)) // tp
        queries, kv = config.heads // tp * config.head_dim, config.kv_heads // tp * config.head_dim
        mlp = 4 * width * item + (0 if config.activation == "silu" else 12 * width)  # other activations are computed in float32
        layer = tokens * ((4 + (config.experts > 0)) * config.hidden * item + max(mlp, 2 * (queries + kv) * item) + 8 * config.head_dim)
        parts = -(-context // SPLIT) * batch * queries * 4 if self.question.device == "cuda" else 0
        head = batch * config.vocabulary * 2 * item + 32 * config.vocabulary
        return {f"a layer of {tokens} tokens": layer, "a decode's partial results": parts, f"{batch} rows of logits": head}

    def need(self, candidate: Candidate, context: int, batch: int) -> Need:
        kv, activations = self.kv(candidate, context, batch), max(self.activations(candidate.tp, context, batch).values())
        return Need(self.weights(candidate.scheme, candidate.tp), kv, activations, int(RESERVE * self.question.fit))

    def fitted(self, candidate: Candidate) -> Fitted:
        """With the largest batch and the longest context that fit."""
        question = self.question
        need = self.need(candidate, question.context, question.batch)
        room = question.fit - need.weights - need.reserve

        def fits(context: int, batch: int) -> bool:
            return self.kv(candidate, context, batch) + max(self.activations(candidate.tp, context, batch).values()) <= room

        most = 2**40 if self.stretches else self.checkpoint.config.max_positions
        largest = _largest(lambda batch: fits(question.context, batch), 2**24)
        return Fitted(candidate, need, largest, _largest(lambda context: fits(context, question.batch), most))

    def window_saves(self, candidate: Candidate) -> int:
        """Bytes of the KV cache that an engine which drops what sliding windows have left behind would not need."""
        config, question = self.checkpoint.config, self.question
        tokens = [min(config.window(i) or question.context, question.context) for i in range(config.layers)]
        full = self.kv(candidate, question.context, question.batch)
        return full - full * sum(tokens) // (question.context * config.layers)

    def problems(self, scheme: Scheme | None, tp: int) -> list[str]:
        """What keeps the model from being cut into ranks, or quantised in groups, so."""
        try:
            rank_config(self.checkpoint.config, tp)
        except ModelError as error:
            return [f"{p.found}; expected {p.expected}" for p in error.problems]
        found: list[Problem] = []
        for name, shape, cut, quantised in self.linears:
            if scheme and quantised:
                found += FORMATS[FORMAT].check(name, shape, scheme, act_order_index=False, tp=tp, tp_dim=cut)
            else:
                found += grid_problems(name, shape, Scheme(8, -1, True), tp, cut, False, kinds=("integer",))
        return list(dict.fromkeys(f"{p.where}: {p.found}; expected {p.expected}" for p in found))


def held_bytes(shape: tuple[int, int], scheme: Scheme, device: str) -> int:
    """Bytes of a quantised weight `(N, K)` in the engine: codes, and a 16-bit scale and a zero point of 8 bits for each group. A CPU's
    products take codes of 4 bits or of 8."""
    n, k = shape
    return n * -(-k * held_bits(scheme, device) // 8) + n * scheme.groups(k) * GRID_BITS // 8


def held_bits(scheme: Scheme, device: str) -> int:
    """Bits that a code takes in the engine."""
    bits = scheme.bits if scheme.bits <= 4 else 8
    return max(bits, 4) if device == "cpu" else bits


def schemes(question: Question, mixture: bool) -> Iterator[Scheme]:
    """The grids that are tried, the better ones first."""
    symmetric = mixture if question.symmetric is None else question.symmetric
    for bits, groups in GROUPS.items():
        for group in groups:
            yield Scheme(bits, group, symmetric)


def advise(checkpoint: Checkpoint, question: Question) -> Advice:
    """What to do. Raises UserError for a question that has no answer: a context longer than the model's, a model that cannot be cut so."""
    model = Model(checkpoint, question)
    problems = []
    if checkpoint.quantization:
        raise ModelError(Problem(str(checkpoint.path), "already quantised", "the full-precision checkpoint: its config.json is enough"))
    if question.context > checkpoint.config.max_positions and not model.stretches:
        problems.append(Problem("--context", str(question.context), f"at most the model's {checkpoint.config.max_positions} positions"))
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
    needs = {c: model.need(c, question.context, question.batch) for row in ordered.values() for c in row}
    best = {tp: next((c for c in row if needs[c].total <= question.fit), None) for tp, row in ordered.items()}
    by_ranks = {tp: model.fitted(c) for tp, c in best.items() if c}
    proposal = min(by_ranks.values(), key=lambda f: (f.candidate.bits < USUAL_BITS, f.candidate.tp), default=None)
    better = None
    if proposal:
        row = ordered[proposal.candidate.tp]
        at = row.index(proposal.candidate)
        better = Fitted(row[at - 1], needs[row[at - 1]]) if at else None
    least = min(needs, key=lambda c: (needs[c].total, c.tp))
    return Advice(question, proposal, better, Fitted(least, needs[least]), by_ranks, impossible)


def _quantised(model: Model, tp: int, impossible: dict[int, list[str]]) -> list[Candidate]:
    """By bits, then by the cache, then by groups, the better first. Of 8 bits only the largest groups that can be cut."""
    by_bits: dict[int, list[Scheme]] = {}
    for scheme in schemes(model.question, model.checkpoint.config.experts > 0):
        if scheme.bits == 8 and by_bits.get(8):
            continue
        if reasons := model.problems(scheme, tp):
            said = impossible.setdefault(tp, [])
            said += [text for why in reasons if (text := f"groups of {scheme.group_size}: {why}") not in said]
        else:
            by_bits.setdefault(scheme.bits, []).append(scheme)
    return [Candidate(scheme, int8, tp) for found in by_bits.values() for int8 in (False, True) for scheme in found]


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` for which `fits` holds, 0 for none; it holds for all smaller ones then."""
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
    """What `quantflow sensitivity` found. kl_mean: width -> KL divergence in nats a token of the whole model in it, rounded to nearest."""

    path: Path
    text: str
    group_size: int
    symmetric: bool
    kl_mean: Mapping[int, float]

    def of(self, scheme: Scheme) -> float | None:
        """None for what was not measured."""
        same = (scheme.group_size, scheme.symmetric) == (self.group_size, self.symmetric)
        return self.kl_mean.get(scheme.bits) if same else None


def measured(checkpoint: Checkpoint, given: Path | None) -> Measured | None:
    """The measurements in a file, or in one that lies in the model's directory, beside it, or here, where that is of this model. Raises
    UserError for a file that was given and is no such."""
    places = [given] if given else [folder / "sensitivity.json" for folder in (checkpoint.path, checkpoint.path.parent, Path())]
    for path in places:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            data = record["data"]
            text = f"{data['windows']} windows of {data['length']} tokens of {data['source']}"
            kl_mean = {int(bits): float(whole["measured"]) for bits, whole in record["uniform"].items()}
            found = Measured(path, text, int(record["group_size"]), bool(record["symmetric"]), kl_mean)
            if record["model"]["config"] == digest(checkpoint.raw_config):
                return found
            reason = "measurements of another model"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or "no measurements of quantflow sensitivity"
        if given:
            raise UserError(Problem("--sensitivity", f"{path}: {reason}", "what `quantflow sensitivity` wrote for this model"))
    return None


def cache_share(question: Question, fitted: Fitted) -> float | None:
    """The engine's `--cache-max-entry-count` that gives the cache this much, None where its default does."""
    left = question.fit - fitted.need.weights - fitted.need.reserve
    share = fitted.need.kv / left
    return None if share <= SHARE[question.device] else min(1.0, math.ceil(share * 100) / 100)


def recipe_text(checkpoint: Checkpoint, name: str, model: str, candidate: Candidate) -> str:
    """The least recipe that makes the candidate; "" for full precision, which needs none."""
    if candidate.scheme is None:
        return ""
    scheme, length = candidate.scheme, min(2048, checkpoint.config.max_positions)
    lines = [
        f"name: {name}_w{scheme.bits}{'_kv8' if candidate.int8_kv else ''}",
        f"model: {model}",
        f"calibration: {{data: c4, samples: 128, seqlen: {length}}}   # or a file of your own",
        f"weights: {{bits: {scheme.bits}, group_size: {scheme.group_size}, symmetric: {str(scheme.symmetric).lower()}}}",
        "stages:",
        *(["  - calibrate"] if candidate.int8_kv else []),
        "  - gptq",
        *(["  - kv_qparams"] if candidate.int8_kv else []),
        f"  - pack: {{format: {FORMAT}}}",
        *([f"  - shard: {{tp: {candidate.tp}}}"] if candidate.tp > 1 else []),
    ]
    return "\n".join(lines) + "\n"


def settings(candidate: Candidate, stages: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--set` options that give a recipe with these stages the candidate, and stages that it lacks for that."""
    if candidate.scheme is None:
        return [], []
    scheme = candidate.scheme
    values = {"weights.bits": scheme.bits, "weights.group_size": scheme.group_size, "weights.symmetric": str(scheme.symmetric).lower()}
    lacking = [stage for stage in ("calibrate", "kv_qparams") if candidate.int8_kv and stage not in stages]
    if candidate.tp > 1:
        if "shard" in stages:
            values["stages.shard.tp"] = candidate.tp
        else:
            lacking.append(f"shard: {{tp: {candidate.tp}}}")
    return [f"--set {name}={value}" for name, value in values.items()], lacking
