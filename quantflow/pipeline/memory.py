"""The sum of what a model needs on a device: weights, KV cache, activations and a reserve.

Everything comes from the config and the shapes; no weight is read. Letters: `B` batch, `C` context,
`T` tokens of a step, `H` hidden, `I` intermediate, `V` vocabulary.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.engine.config import EngineConfig, default_step_tokens
from quantflow.engine.kv_cache import KVFormat, block_bytes
from quantflow.engine.load import rank_config
from quantflow.engine.ops import SPLIT
from quantflow.errors import ModelError, Problem
from quantflow.formats import FORMATS
from quantflow.formats.weight import Weight, grid_problems, rank_shape
from quantflow.quant.scheme import Scheme
from quantflow.recipe.overrides import matches

RANKS = (1, 2, 4, 8)
RESERVE = 0.05  # of the size: the driver's context, and what an allocator cannot hand out
BLOCK = EngineConfig.block_size
GRID_BITS = 24  # of a group: a scale of 16, a zero point of 8
WHOLE_ROWS = Scheme(8, -1, True)  # for ranks alone: it fits any linear
FORMAT = "compressed-tensors"  # it holds every width and group size that is proposed


@dataclass(frozen=True)
class Question:
    """fit: bytes of one device's memory. context: tokens of a text. batch: texts at once. device:
    `cuda` or `cpu`, whose layouts and step sizes are counted. ranks: tensor-parallel degrees to
    consider. symmetric: of the grids; None: symmetric for mixtures alone, whose experts
    compressed-tensors holds in no other way. ignore: patterns of linears that stay as they are."""

    fit: int
    context: int
    batch: int
    device: str = "cuda"
    ranks: tuple[int, ...] = RANKS
    symmetric: bool | None = None
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """scheme: None for full precision. int8_kv: with calibrated parameters where there is a recipe
    to calibrate them, else a scale a token and head."""

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
class Term:
    """Bytes, and where they come from. made: a formula that says so. parts: what they are the sum
    of or, with `largest`, the largest of."""

    name: str
    bytes: int
    made: str = ""
    parts: tuple[Term, ...] = ()
    largest: bool = False


@dataclass(frozen=True)
class Need:
    """On one device: weights, KV, activations and reserve."""

    terms: tuple[Term, Term, Term, Term]

    @property
    def weights(self) -> int:
        return self.terms[0].bytes

    @property
    def kv(self) -> int:
        return self.terms[1].bytes

    @property
    def activations(self) -> int:
        return self.terms[2].bytes

    @property
    def reserve(self) -> int:
        return self.terms[3].bytes

    @property
    def total(self) -> int:
        return sum(term.bytes for term in self.terms)


@dataclass(frozen=True)
class Model:
    """The sizes of a checkpoint, for one question."""

    checkpoint: Checkpoint
    question: Question

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.checkpoint.config.dtype)

    @cached_property
    def linears(self) -> Counter[tuple[str, tuple[int, int], int | None, bool]]:
        """(name in the layer, of expert 0 for all, shape, the dimension that ranks cut, whether it
        may be quantised) -> how many."""
        checkpoint, counts = (
            self.checkpoint,
            Counter[tuple[str, tuple[int, int], int | None, bool]](),
        )
        for index in range(checkpoint.config.layers):
            for name, spec in checkpoint.linears(index).items():
                module = f"{checkpoint.architecture.layer_prefix(index)}.{name}"
                quantised = not any(matches(module, pattern) for pattern in self.question.ignore)
                counts[re.sub(r"\d+(?=\.)", "0", name), spec.shape, spec.cut, quantised] += 1
        return counts

    def weights(self, scheme: Scheme | None, tp: int) -> int:
        """Bytes on one rank."""
        return self.weight_term(scheme, tp).bytes

    def weight_term(self, scheme: Scheme | None, tp: int) -> Term:
        """Of one rank: the linears cut, the rest whole; norms in float32, as the engine keeps
        them."""
        item, linears, others, parameters = self.dtype.itemsize, 0, self.others(tp), 0
        for (_, shape, cut, quantised), count in self.linears.items():
            n, k = rank_shape(shape, tp, cut)
            if scheme and not quantised:
                others += count * n * k * item
                continue
            parameters += count * math.prod(shape)
            linears += count * (
                held_bytes((n, k), scheme, self.question.device) if scheme else n * k * item
            )
        grid = f"{8 * item} bits"
        if scheme:
            bits = held_bits(scheme, self.question.device)
            grid = f"{bits} bits + {GRID_BITS} / {scheme.group_size} for scale and zero point"
        made = f"{parameters:.4g} in linears × ({grid}) / 8{_share(tp)}"
        parts = (Term("linears", linears, made), Term("all else", others))
        return Term("weights", linears + others, parts=parts)

    def others(self, tp: int) -> int:
        """Bytes of all that is no linear's weight, on one rank."""
        checkpoint, architecture, item, total = (
            self.checkpoint,
            self.checkpoint.architecture,
            self.dtype.itemsize,
            0,
        )
        layers = range(checkpoint.config.layers)
        linears = {
            f"{architecture.layer_prefix(index)}.{name}.weight"
            for index in layers
            for name in checkpoint.linears(index)
        }
        for name, shape in checkpoint.expected.items():
            if name not in linears:
                ranks = tp if len(shape) == 1 and checkpoint.cut(name) is not None else 1  # a bias
                total += math.prod(shape) // ranks * (4 if "norm" in name else item)
        return total

    def kv(self, candidate: Candidate, context: int, batch: int) -> int:
        """Bytes on one rank."""
        return self.kv_term(candidate, context, batch).bytes

    def kv_term(self, candidate: Candidate, context: int, batch: int) -> Term:
        """Whole blocks of every text. The engine keeps the tokens that a sliding window has left
        behind."""
        config, calibrated = self.checkpoint.config, candidate.scheme is not None
        part, form = (
            rank_config(config, candidate.tp),
            KVFormat(candidate.int8_kv, ({},) if candidate.int8_kv and calibrated else ()),
        )
        # scales and zero points, K and V
        parameters = 8 * part.layers * part.kv_heads * (1 + part.head_dim) if form.parameters else 0
        blocks = batch * -(-context // BLOCK)
        item = "1 byte" if candidate.int8_kv else f"{self.dtype.itemsize} bytes"
        scales = (
            " + 8 bytes of scales a token and head" if candidate.int8_kv and not calibrated else ""
        )
        made = (
            f"2 × {config.layers} layers × {config.kv_heads} KV heads × {config.head_dim} × {item}"
            f" × {blocks * BLOCK} tokens"
        )
        return Term(
            "KV",
            blocks * block_bytes(part, form, self.dtype, BLOCK) + parameters,
            made + _share(candidate.tp) + scales,
        )

    def activations(self, tp: int, context: int, batch: int) -> Term:
        """What a step allocates at once, upper estimates: in a layer, for the partial results of a
        decode's attention, in the head. They are not there together: the largest counts.

        A layer: residual stream, normalised input, output and a padded copy, 4H; the MLP's two
        inner products, what is made of them and a copy, 4I; or q, k, v and attention's output.
        Partial results: float32, for every split of the keys, whose number is rounded up to a power
        of two. The head: the logits of the batch twice, and a row in float32 while it is sampled.
        """
        config, item = self.checkpoint.config, self.dtype.itemsize
        tokens = default_step_tokens(self.question.device, batch, BLOCK)
        width = max(config.width(i) for i in range(config.layers)) // tp
        queries, kv = config.heads // tp * config.head_dim, config.kv_heads // tp * config.head_dim
        # other activations are computed in float32
        mlp = 4 * width * item + (0 if config.activation == "silu" else 12 * width)
        layer = tokens * (
            (4 + (config.experts > 0)) * config.hidden * item
            + max(mlp, 2 * (queries + kv) * item)
            + 8 * config.head_dim
        )
        splits = 1 << (-(-context // SPLIT) - 1).bit_length()
        parts = splits * batch * queries * 4 if self.question.device == "cuda" else 0
        head = batch * config.vocabulary * 2 * item + 32 * config.vocabulary
        terms = (
            Term(f"a layer of {tokens} tokens", layer),
            Term("a decode's partial results", parts),
            Term(f"{batch} rows of logits", head),
        )
        return Term("activations", max(term.bytes for term in terms), parts=terms, largest=True)

    def need(self, candidate: Candidate, context: int, batch: int) -> Need:
        reserve = Term(
            "reserve",
            int(RESERVE * self.question.fit),
            f"{RESERVE:.0%} of the size, for the driver and the allocator",
        )
        weights, kv = (
            self.weight_term(candidate.scheme, candidate.tp),
            self.kv_term(candidate, context, batch),
        )
        return Need((weights, kv, self.activations(candidate.tp, context, batch), reserve))

    def window_saves(self, candidate: Candidate) -> int:
        """Bytes of the KV cache that an engine which drops what sliding windows have left behind
        would not need."""
        config, question = self.checkpoint.config, self.question
        tokens = [
            min(config.window(i) or question.context, question.context)
            for i in range(config.layers)
        ]
        full = self.kv(candidate, question.context, question.batch)
        return full - full * sum(tokens) // (question.context * config.layers)

    def problems(self, scheme: Scheme | None, tp: int) -> list[str]:
        """What keeps the model from being cut into ranks, or quantised in groups, so."""
        try:
            rank_config(self.checkpoint.config, tp)
        except ModelError as error:
            return [f"{p.found}; expected {p.expected}" for p in error.problems]
        problems: list[Problem] = []
        for name, shape, cut, quantised in self.linears:
            weight = Weight(name, shape, scheme or WHOLE_ROWS, ranks=tp, cut=cut)
            if scheme and quantised:
                problems += FORMATS[FORMAT].check(weight)
            else:
                problems += grid_problems(replace(weight, scheme=WHOLE_ROWS))
        return list(dict.fromkeys(f"{p.where}: {p.found}; expected {p.expected}" for p in problems))


def held_bytes(shape: tuple[int, int], scheme: Scheme, device: str) -> int:
    """Bytes of a quantised weight `(N, K)` in the engine: codes, and a 16-bit scale and a zero
    point of 8 bits for each group. A CPU's products take codes of 4 bits or of 8."""
    n, k = shape
    return n * -(-k * held_bits(scheme, device) // 8) + n * scheme.groups(k) * GRID_BITS // 8


def held_bits(scheme: Scheme, device: str) -> int:
    """Bits that a code takes in the engine."""
    bits = scheme.bits if scheme.bits <= 4 else 8
    return max(bits, 4) if device == "cpu" else bits


def _share(tp: int) -> str:
    return f" / {tp} devices" if tp > 1 else ""
