"""The sweep: one pass over the decoder that takes each layer in turn through all layer stages.

For a layer: load it; let `awq` find scales on a sample of the quantised stream and fold them;
quantise its linears group by group in execution order, each group's Hessian taken from the stream
as the groups before it left it (GPTQ's true-sequential mode, which also makes one forward of every
linear enough); carry the stream on; store the result; free the layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantflow.artifacts.store import Shelf, Store
from quantflow.calibration.statistics import KVStatistics
from quantflow.checkpoints.tensor_file import TensorFile
from quantflow.decoder.block import Block, Decoder, Streams
from quantflow.decoder.decoder import open_decoder
from quantflow.decoder.stream import Stream
from quantflow.decoder.walk import Result, walk
from quantflow.errors import Problem, QuantFlowError
from quantflow.pipeline.plan import BATCH_TOKENS, Plan
from quantflow.pipeline.progress import Progress, within_step
from quantflow.pipeline.room import room
from quantflow.quant.grid import GridRules
from quantflow.quant.numbers import QuantizedTensor
from quantflow.quant.scheme import Scheme
from quantflow.stages.awq import Awq
from quantflow.stages.awq_layer import AwqResult, search_layer
from quantflow.stages.calibrate import Calibrate
from quantflow.stages.calibrate_layer import calibrate_layer
from quantflow.stages.gptq import Gptq
from quantflow.stages.kv_qparams import KvQparams
from quantflow.stages.output_error import OutputErrors
from quantflow.stages.quantize import (
    Quantized,
    Unrounded,
    gptq_rounder,
    gptq_segment,
    nearest_segment,
)
from quantflow.stages.rtn import Rtn


@dataclass(frozen=True)
class _Context:
    plan: Plan
    store: Store
    device: torch.device
    dtype: torch.dtype
    rules: GridRules
    decoder: Decoder | None
    batch: int  # windows that go through a layer together
    progress: Progress

    def layer(self, index: int, stored: dict[str, Tensor]) -> Block:
        assert self.decoder is not None
        return self.decoder.block(index, stored, self.dtype)


def grid_rules(plan: Plan) -> GridRules:
    return GridRules(tuple(getattr(torch, d) for d in plan.scale_dtypes), plan.min_zero)


def sweep(
    plan: Plan,
    store: Store,
    keys: tuple[str, str],
    tokens: list[list[int]],
    progress: Progress,
    lap: Callable[[str], None],
) -> None:
    """Fills the store with every layer's result, from the first that is missing. keys: (of the
    calibration, of the sweep). lap: is told the name of each of the two passes when it is over."""
    config, recipe = plan.config, plan.recipe
    calibrate_key, sweep_key = keys
    length = len(tokens[0]) if tokens else 0
    device = torch.device(plan.device)
    context = _Context(
        plan,
        store,
        device,
        getattr(torch, plan.compute_dtype),
        grid_rules(plan),
        open_decoder(plan.checkpoint, length, device) if tokens else None,
        max(1, BATCH_TOKENS // length) if tokens else 1,
        progress,
    )
    torch.manual_seed(recipe.seed)
    if (
        plan.stage(Calibrate)
        and store.finished_layers(calibrate_key, config.layers) < config.layers
    ):
        progress.phase("calibrate", config.layers, "layers")
        _pass(context, calibrate_key, tokens, _calibrate, inner=False)
        lap("calibrate")
    if plan.rounds and store.finished_layers(sweep_key, config.layers) < config.layers:
        progress.phase("quantise", config.layers, "layers")
        _pass(context, sweep_key, tokens[: plan.stream_windows], _quantise, inner=True)
        lap("quantise")


SEARCHES = 3  # of AWQ in a layer, beside one for each expert's `down`
LayerStep = Callable[[_Context, int, dict[str, Tensor], Streams | None], Result]


def _pass(
    context: _Context, key: str, tokens: list[list[int]], step: LayerStep, *, inner: bool
) -> None:
    """Takes the windows through all layers, from the first that the store has no result of."""
    plan, progress = context.plan, context.progress
    shelf = Shelf(context.store, key)
    streams = (
        _open_streams(context, shelf.folder, len(tokens), len(tokens[0]), inner) if tokens else None
    )

    def begin() -> None:
        if streams:
            _embed(context, streams.x, tokens)

    try:
        walk(
            plan.checkpoint.layer,
            plan.config.layers,
            context.device,
            lambda index, stored: step(context, index, stored, streams),
            shelf,
            {"x": streams.x} if streams else {},
            begin,
            lambda result: progress.step(_summary(result.report) if result else "in the store"),
        )
    finally:
        if streams:
            streams.close()


def _open_streams(
    context: _Context, folder: Path, windows: int, length: int, inner: bool
) -> Streams:
    config = context.plan.config
    width = config.heads * config.head_dim
    available = room(context.plan.device, folder)
    hidden_bytes, context_bytes, inner_bytes = (
        windows * length * channels * context.dtype.itemsize
        for channels in (config.hidden, width, config.intermediate)
    )
    place = available.sharing(hidden_bytes + context_bytes)

    def open_stream(name: str, channels: int) -> Stream:
        return place.stream(name, (windows, length, channels), context.dtype)

    x = open_stream("x", config.hidden)
    if not inner:
        return Streams(x, None, None)
    mid = open_stream("context", width)
    if config.experts:
        # All experts read the MLP's input, while `x` moves on under them.
        return Streams(x, mid, open_stream("inner", config.hidden))
    # Keeping what goes into `down` saves computing gate and up twice.
    keep_inner = hidden_bytes + context_bytes + inner_bytes <= available.budget
    return Streams(x, mid, open_stream("inner", config.intermediate) if keep_inner else None)


@torch.inference_mode()
def _embed(context: _Context, x: Stream, tokens: list[list[int]]) -> None:
    checkpoint = context.plan.checkpoint
    decoder = context.decoder
    assert decoder is not None
    tensors = {n: checkpoint.tensor(n).to(context.device) for n in decoder.embeds}
    for start, stop in x.spans(context.batch):
        ids = torch.tensor(tokens[start:stop], device=context.device)
        x.write(start, decoder.embed(tensors, ids, context.dtype))


def _summary(report: dict[str, Any]) -> str:
    errors = [line["error"] for line in report.get("linears", {}).values() if "error" in line]
    return f"output error {sum(errors) / len(errors):.2e}" if errors else ""


@torch.inference_mode()
def _calibrate(
    context: _Context, index: int, stored: dict[str, Tensor], streams: Streams | None
) -> Result:
    assert streams is not None
    return Result(
        calibrate_layer(
            context.layer(index, stored), streams.x, context.batch, context.progress.advance
        )
    )


@torch.inference_mode()
def _quantise(
    context: _Context, index: int, stored: dict[str, Tensor], streams: Streams | None
) -> Result:
    """One layer through awq, gptq, rtn or nf4, and kv_qparams' observation."""
    plan = context.plan
    schemes = plan.schemes(index)
    awq = plan.stage(Awq)
    searched = SEARCHES + max(1, plan.config.experts) if awq else 0
    # a linear that is done counts as much as a search
    tell = within_step(context.progress, len(schemes) + searched)
    scales = (
        _search_scales(context, index, stored, streams, schemes, awq, tell)
        if awq and streams
        else AwqResult()
    )
    changed = dict(scales.folding.changed)
    for linear in (n for n in scales.folding.columns if n not in schemes):
        # A router, or a linear that stays in 16 bits, reads the scaled norm too.
        name = f"{linear}.weight"
        changed[name] = scales.folding.weight(linear, stored[name]).to(stored[name].dtype)
    kv, source = KVStatistics(), Unrounded(stored, scales.folding, schemes, context.rules)
    done = _round(context, index, source, changed, streams, scales, kv, tell)
    tensors = dict(changed)
    for name, result in done.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in result.tensor.parts().items()}
    if plan.stage(KvQparams):
        tensors.update({f"kv.{name}": value for name, value in kv.result().items()})
    report = {
        "linears": {name: done[name].report for name in sorted(done)},
        "awq": scales.report,
        "schemes": {n: s.as_list() for n, s in schemes.items()},
    }
    return Result({n: t.cpu().contiguous() for n, t in tensors.items()}, report)


def _round(
    context: _Context,
    index: int,
    source: Unrounded,
    changed: dict[str, Tensor],
    streams: Streams | None,
    scales: AwqResult,
    kv: KVStatistics,
    tell: Callable[[str], None],
) -> dict[str, Quantized]:
    """The layer's linears, segment by segment; the streams go along. Where rounding looks at what a
    segment reads (GPTQ), they go segment by segment too, over the rounded weights, and else through
    the whole layer at the end."""
    plan, gptq, rtn = context.plan, context.plan.stage(Gptq), context.plan.stage(Rtn)
    tensors = {**source.tensors, **changed} if streams else {}
    block = context.layer(index, tensors) if gptq and streams else None
    passage = block.passage(streams, context.batch, kv) if block and streams else None
    held = block.tensors if block else tensors
    done: dict[str, Quantized] = {}
    for segment in plan.checkpoint.segments(index):
        names = [n for n in segment.names if n in source.schemes]
        if gptq and passage:
            rounded = gptq_segment(
                source,
                names,
                segment.channels,
                partial(passage.rows, segment),
                gptq,
                context.device,
            )
        else:
            rounded = nearest_segment(
                source, names, search=bool(rtn and rtn.range_search), importance=scales.importance
            )
        for name, result in rounded:
            done[name] = result
            if streams:
                held[f"{name}.weight"] = result.tensor.dequantize(context.dtype)
            tell(name)
        if passage:
            passage.advance(segment, feeds=index + 1 < plan.config.layers)
    if streams and not passage:
        done |= _measure(context, context.layer(index, tensors), streams.x, source, done, kv)
    return done


def _measure(
    context: _Context,
    layer: Block,
    x: Stream,
    source: Unrounded,
    done: Mapping[str, Quantized],
    kv: KVStatistics,
) -> dict[str, Quantized]:
    """Takes `x` through a layer that was rounded without looking at it, and adds to its report what
    that did to the outputs."""

    def difference(name: str) -> tuple[Tensor, Tensor] | None:
        if name not in done:
            return None
        weight = source.plain(name).float()
        return weight, weight - done[name].tensor.dequantize()

    errors = OutputErrors(difference)
    for start, stop in x.spans(context.batch):
        layer.tap = None if start else errors  # the first windows are sample enough
        x.write(start, layer.forward(x.read(start, stop), kv))
    return {
        name: replace(done[name], report=done[name].report | lines)
        for name, lines in errors.found.items()
    }


def _search_scales(
    context: _Context,
    index: int,
    stored: dict[str, Tensor],
    streams: Streams,
    schemes: dict[str, Scheme],
    awq: Awq,
    tell: Callable[[str], None],
) -> AwqResult:
    windows, length = streams.x.windows, streams.x.shape[1]
    count = min(windows, max(1, awq.max_tokens // length))
    picked = [i * windows // count for i in range(count)]
    sample = torch.cat([streams.x.read(i, i + 1) for i in picked])
    gptq = context.plan.stage(Gptq)
    round_finally = gptq_rounder(context.rules, gptq) if gptq else None
    clip = awq.clip and gptq is None  # GPTQ searches its own ranges
    layer = context.layer(index, stored)
    return search_layer(
        layer,
        stored,
        sample,
        schemes,
        context.rules,
        grid=awq.grid,
        clip=clip,
        round_finally=round_finally,
        step=lambda group: tell(f"scales of {group}"),
    )


class SweepReader:
    """The results of a finished sweep, a layer at a time."""

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key
        self._files: dict[int, TensorFile] = {}

    def file(self, index: int) -> TensorFile:
        if index not in self._files:
            self._files[index] = TensorFile(self.store.layer(self.key, index))
        return self._files[index]

    def report(self, index: int) -> dict[str, Any]:
        return json.loads(self.file(index).metadata["report"])

    def linear(self, index: int | None, name: str, in_features: int) -> QuantizedTensor:
        assert index is not None  # a recipe quantises the layers alone
        file = self.file(index)
        scheme = Scheme(*json.loads(file.metadata["report"])["schemes"][name])
        parts = {
            n.removeprefix(f"{name}."): file.read(n)
            for n in file.tensors
            if n.startswith(f"{name}.")
        }
        return scheme.numbers.from_parts(scheme, parts, in_features)

    def changed(self, index: int | None, name: str) -> Tensor | None:
        """A tensor that the sweep changed without quantising it (a norm, a bias, a router), or None
        where it is the checkpoint's."""
        if index is None:
            return None
        file = self.file(index)
        return file.read(name) if name in file.tensors else None

    def kv(self, index: int) -> dict[str, Tensor]:
        file = self.file(index)
        return {n.removeprefix("kv."): file.read(n) for n in file.tensors if n.startswith("kv.")}


class MeasuredReader(SweepReader):
    """What `calibrate` alone leaves: no tensor is changed, and the extremes of K and V are the
    full-precision model's."""

    def report(self, index: int) -> dict[str, Any]:
        return {"linears": {}, "awq": []}

    def changed(self, index: int | None, name: str) -> Tensor | None:
        return None

    def kv(self, index: int) -> dict[str, Tensor]:
        file = self.file(index)
        return {n: file.read(n) for n in file.tensors if n.startswith(("key.", "value."))}


def check_complete(reader: SweepReader, plan: Plan) -> None:
    """Raises QuantFlowError unless every linear of the plan is in the store: quantised, or listed
    as left alone."""
    for index in range(plan.config.layers):
        names = reader.file(index).tensors
        missing = [n for n in plan.schemes(index) if f"{n}.codes" not in names]
        if missing:
            raise QuantFlowError(
                Problem(f"layer {index}", f"{', '.join(missing)} was planned but not quantised")
            )
