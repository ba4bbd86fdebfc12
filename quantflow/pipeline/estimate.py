"""What a plan will cost: memory, disk and time, from shapes alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from quantflow.evaluate.distributions import LOGIT_ELEMENTS
from quantflow.evaluate.divergence import BATCH_TOKENS as EVALUATED_TOGETHER
from quantflow.evaluate.divergence import SAMPLED
from quantflow.pipeline.plan import BATCH_TOKENS, Plan, activation_budget
from quantflow.quant.gptq import ELEMENTS_AT_ONCE
from quantflow.quant.product import MOST_ELEMENTS
from quantflow.stages.awq import Awq
from quantflow.stages.calibrate import Calibrate
from quantflow.stages.evaluate import Evaluate
from quantflow.stages.gptq import Gptq
from quantflow.stages.pack_writer import written_bytes
from quantflow.stages.training import TrainingStage

# The interpreter's buffers and the allocator's slack; with matrix products, oneDNN's compiled
# kernels and packed operands too.
BASE_BYTES, COMPUTING_BYTES = 40 * 2**20, 60 * 2**20
LIBRARY_BYTES = 220 * 2**20  # what a class of transformers imports


@dataclass(frozen=True)
class Estimate:
    """Peak resident bytes above the imports, bytes on disk (store and artifact), and seconds (order
    of magnitude)."""

    memory_bytes: int
    store_bytes: int
    artifact_bytes: int
    seconds: float


def estimate(plan: Plan) -> Estimate:
    """Memory, disk and time, from shapes alone. The terms are those of the sweep, held against
    measured peaks by a test."""
    config, checkpoint = plan.config, plan.checkpoint
    item = 4 if config.dtype == "float32" else 2
    per_layer: Counter[int] = Counter()
    for linear in plan.linears:
        per_layer[linear.layer] += linear.shape[0] * linear.shape[1]
    layer = max(per_layer.values()) * item
    widest = max(n * k for n, k in (p.shape for p in plan.linears))
    largest_outer = max(math.prod(checkpoint.shape_of(n)) for n in checkpoint.outer_names()) * item
    calibration, gptq = plan.recipe.calibration, plan.stage(Gptq)
    compute = 4 if plan.compute_dtype == "float32" else 2
    held = 0
    batch = 0
    row = config.hidden
    if calibration:
        row = checkpoint.row_channels(calibration.seqlen, getattr(torch, plan.compute_dtype))
    if calibration and (plan.stream_windows or plan.stage(Calibrate)):
        tokens = (
            max(plan.stream_windows, calibration.samples if plan.stage(Calibrate) else 0)
            * calibration.seqlen
        )
        stream = tokens * row * compute
        held = 3 * stream if 3 * stream <= activation_budget() else 0
        width = max(config.intermediate, config.dense_intermediate, config.hidden)
        batch_tokens = min(tokens, max(BATCH_TOKENS, calibration.seqlen))
        batch = batch_tokens * (3 * width + 6 * row) * compute
        held += largest_outer
    awq = plan.stage(Awq)
    if awq and calibration:
        width = max(config.intermediate, config.dense_intermediate)
        held += (
            min(awq.max_tokens, calibration.samples * calibration.seqlen)
            * (6 * row + 2 * width)
            * compute
        )
    # Activations are freed before a group is solved, but most of their blocks are too small for the
    # C library to give them back.
    if gptq:
        memory = layer * 5 // 2 + _solver_bytes(plan) + batch + held
        if checkpoint.architecture.library and config.experts:
            # When a mixture's last expert is solved, all before it are rounded: this layer, the
            # next one, what is rounded in its dtype and as codes, and the codes being saved.
            memory = max(memory, layer * 3 + 2 * layer // item + batch + held + _scores(plan))
    elif plan.needs_stream or not plan.rounds:
        memory = layer * 5 // 2 + max(4 * widest, batch) + held
    else:
        # this layer's weights and the next one's, codes, and what is being saved; not all at their
        # largest at once
        memory = layer * 3
    training = [stage for stage in plan.layer_stages if isinstance(stage, TrainingStage)]
    if training and calibration:
        memory = max(memory, held + max(_training_bytes(plan, layer // item, s) for s in training))
    base = BASE_BYTES + (COMPUTING_BYTES if plan.reads_calibration else 0)
    base += LIBRARY_BYTES if checkpoint.architecture.library else 0
    memory = base + max(memory, 2 * largest_outer)
    evaluate = plan.stage(Evaluate)
    evaluated_bytes = 0
    if evaluate:
        tokens = evaluate.windows * evaluate.length
        shown = checkpoint.row_channels(evaluate.length, torch.float32)
        evaluated_bytes = 2 * tokens * shown * 4
        streams = evaluated_bytes if evaluated_bytes <= activation_budget() else 0
        in_layers = (
            3 * layer // item * 4
            + max(EVALUATED_TOGETHER, evaluate.length) * (3 * config.intermediate + 6 * shown) * 4
        )
        in_head = (
            2 * config.vocabulary * config.hidden * 4
            + 6 * min(LOGIT_ELEMENTS, tokens * config.vocabulary) * 4
            # two of each: as read, and beside what was left of the windows before
            + 4 * max(evaluate.length, LOGIT_ELEMENTS // config.vocabulary) * config.hidden * 4
        )
        sampled = config.layers * SAMPLED * config.hidden * 4
        laid_out = 4 * max(
            (n for n in (widest, config.vocabulary * config.hidden) if n <= MOST_ELEMENTS),
            default=0,
        )
        memory = max(
            memory,
            BASE_BYTES + COMPUTING_BYTES + streams + sampled + laid_out + max(in_layers, in_head),
        )
    packed = sum(p.scheme.stored_bytes(p.shape) for p in plan.linears if p.scheme)
    if plan.rounds:
        packed += sum(p.shape[0] * p.shape[1] * item for p in plan.linears if p.scheme is None)
    outputs = sum(written_bytes(prepared.job) for prepared in plan.prepared)
    tokens = (plan.stream_windows * calibration.seqlen) if calibration else 0
    parameters = sum(per_layer.values())
    measured = (
        calibration.samples * calibration.seqlen if calibration and plan.stage(Calibrate) else 0
    )
    flops = 2 * parameters * (1.5 * tokens + measured)
    if gptq:
        flops += sum(
            tokens * p.shape[1] ** 2 * 2 / (3 if p.shape[0] == p.shape[1] else 2)
            # the recursion, and a product and a half a pass
            + (2 + 3 * gptq.refine) * p.shape[0] * p.shape[1] ** 2
            for p in plan.linears
        )
    if calibration:
        for stage in training:
            passes = 3 * stage.steps(calibration.samples) * stage.batch
            flops += 2 * parameters * passes * calibration.seqlen
    rate = 2.5e11 if plan.device == "cpu" else 2e14
    seconds = flops / rate + checkpoint.weight_bytes / 4e8
    stream_bytes = tokens * row * compute
    scratch = max(3 * stream_bytes, evaluated_bytes if evaluated_bytes > activation_budget() else 0)
    return Estimate(int(memory), int(packed + scratch), outputs, seconds)


def _scores(plan: Plan) -> int:
    """Of attention whose keys are of another width than its values: torch then holds the scores of
    all windows that go together, and three copies, in float32."""
    library, calibration = plan.checkpoint.architecture.library, plan.recipe.calibration
    kv = library.trace(plan.config.layers - 1).kv if library else None
    if calibration is None or kv is None or kv[0][1] == kv[1][1]:
        return 0
    tokens = min(plan.stream_windows * calibration.seqlen, max(BATCH_TOKENS, calibration.seqlen))
    return 16 * tokens * plan.config.heads * calibration.seqlen


def _training_bytes(plan: Plan, layer: int, stage: TrainingStage) -> int:
    """Peak of training a layer of so many weights: they, their gradients, two moments, the best so
    far and what rounding keeps of each, in float32; and what the layer keeps of a step's tokens."""
    config, calibration = plan.config, plan.recipe.calibration
    assert calibration is not None
    tokens = stage.batch * calibration.seqlen
    width = max(config.intermediate, config.dense_intermediate)
    return 8 * 4 * layer + tokens * (12 * config.hidden + 6 * width) * 4


def _solver_bytes(plan: Plan) -> int:
    """Peak of solving one group of linears that share an input, over all groups: while the Hessian
    is factorised, four K×K float32 matrices; while rows are rounded, two, the group's weights
    twice, and nine buffers of the rows that are solved together."""
    checkpoint = plan.checkpoint
    groups = {
        (segment.rows, segment.channels)
        for i in range(plan.config.layers)
        for segment in checkpoint.segments(i)
    }
    return max(
        max(16 * k * k, 8 * k * k + 36 * min(ELEMENTS_AT_ONCE, n * k) + 8 * n * k)
        for n, k in groups
    )
