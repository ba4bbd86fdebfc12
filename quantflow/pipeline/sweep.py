"""The sweep: a pass over the decoder that takes each layer in turn through a recipe's layer stages.

There are two: over the full-precision model's stream for the stages that look at it, and over the
stream that the stages before have altered. In that one, `awq` finds scales on a sample of it;
whoever rounds the linears (`gptq` segment by segment, on what the segments before it left of the
stream) carries the stream on; the store keeps the result; the layer is freed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantflow.artifacts.store import Shelf, Store
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
from quantflow.stages.base import PlannedStage, code
from quantflow.stages.rounded import Rounder
from quantflow.stages.rounding import RoundingStage
from quantflow.stages.work import LayerWork


@dataclass(frozen=True)
class Pass:
    """name: of its phase. key: of its results in the store. stages: what each layer goes through,
    in this order. tokens: the windows that go along, none where no stage looks at them. original:
    they go through the model as it is."""

    name: str
    key: str
    stages: tuple[PlannedStage, ...]
    tokens: list[list[int]]
    original: bool


def passes(plan: Plan, calibrate: str, sweep: str, tokens: list[list[int]]) -> Iterator[Pass]:
    """The passes of a plan, by the keys of their results."""
    original, altered = (
        tuple(stage for stage in plan.layer_stages if stage.original is wanted)
        for wanted in (True, False)
    )
    if original:
        yield Pass("calibrate", calibrate, original, tokens, True)
    if plan.rounds:
        yield Pass("quantise", sweep, altered, tokens[: plan.stream_windows], False)


def sweep(plan: Plan, this: Pass, progress: Progress) -> bool:
    """Fills the store with every layer's result of a pass, from the first that is missing. Returns
    whether any was."""
    config, checkpoint, shelf = plan.config, plan.checkpoint, Shelf(plan.store, this.key)
    if shelf.finished(config.layers) == config.layers:
        return False
    progress.phase(this.name, config.layers, "layers")
    device, dtype = torch.device(plan.device), getattr(torch, plan.compute_dtype)
    length = len(this.tokens[0]) if this.tokens else 0
    decoder = open_decoder(checkpoint, length, device) if this.tokens else None
    streams = _open_streams(plan, this, shelf.folder, dtype) if this.tokens else None
    if streams and any(stage.trains for stage in this.stages):
        _open_for_training(plan, this, streams, shelf.folder)
    rules, batch = grid_rules(plan), max(1, BATCH_TOKENS // length) if length else 1
    torch.manual_seed(plan.recipe.seed)

    def begin() -> None:
        if streams and decoder:
            _embed(plan, decoder, streams.x, this.tokens, batch)
            if streams.full:
                _copy(streams.x, streams.full, batch)

    def step(index: int, stored: dict[str, Tensor]) -> Result:
        def make_block(tensors: Mapping[str, Tensor]) -> Block:
            assert decoder is not None
            return decoder.block(index, tensors, dtype)

        schemes = plan.schemes(index)
        parts = sum(stage.parts(len(schemes), config.experts) for stage in this.stages)
        work = LayerWork(
            stored,
            checkpoint.segments(index),
            schemes,
            rules,
            streams,
            make_block,
            last=index + 1 == config.layers,
            batch=batch,
            device=device,
            dtype=dtype,
            round_finally=_rounder(this.stages, rules),
            tell=within_step(progress, parts),
            advance=progress.advance,
        )
        if streams and streams.entry:
            _copy(streams.x, streams.entry, batch)
        for stage in this.stages:
            code(stage.layer)(stage, work)
        return work.result()

    try:
        walk(
            checkpoint.layer,
            config.layers,
            device,
            step,
            shelf,
            _carried(streams),
            begin,
            lambda result: progress.step(_summary(result.report) if result else "in the store"),
        )
    finally:
        if streams:
            streams.close()
    return True


def _open_for_training(plan: Plan, this: Pass, streams: Streams, folder: Path) -> None:
    x = streams.x
    place = room(plan.device, folder).sharing(2 * x.nbytes)
    streams.full = place.stream("full", x.shape, x.dtype)
    if sum(stage.rounds for stage in this.stages) > 1:
        streams.entry = place.stream("entry", x.shape, x.dtype)


def grid_rules(plan: Plan) -> GridRules:
    return GridRules(tuple(getattr(torch, d) for d in plan.scale_dtypes), plan.min_zero)


def _rounder(stages: tuple[PlannedStage, ...], rules: GridRules) -> Rounder | None:
    """How the stage that rounds does it; None where that is to nearest."""
    rounding = next((stage for stage in stages if isinstance(stage, RoundingStage)), None)
    return code(rounding.rounder)(rules, rounding) if rounding and rounding.rounder else None


def _open_streams(plan: Plan, this: Pass, folder: Path, dtype: torch.dtype) -> Streams:
    config = plan.config
    windows, length = len(this.tokens), len(this.tokens[0])
    width = config.heads * config.head_dim
    available = room(plan.device, folder)
    row = plan.checkpoint.row_channels(length, dtype)
    hidden_bytes, context_bytes, inner_bytes = (
        windows * length * channels * dtype.itemsize
        for channels in (row, width, config.intermediate)
    )
    place = available.sharing(hidden_bytes + context_bytes)

    def open_stream(name: str, channels: int) -> Stream:
        return place.stream(name, (windows, length, channels), dtype)

    x = open_stream("x", row)
    if this.original:
        return Streams(x, None, None)
    if plan.checkpoint.architecture.library:  # a hosted block keeps what experts get, no more
        return Streams(x, None, open_stream("inner", config.hidden) if config.experts else None)
    mid = open_stream("context", width)
    if config.experts:
        # All experts read the MLP's input, while `x` moves on under them.
        return Streams(x, mid, open_stream("inner", config.hidden))
    # Keeping what goes into `down` saves computing gate and up twice.
    keep_inner = hidden_bytes + context_bytes + inner_bytes <= available.budget
    return Streams(x, mid, open_stream("inner", config.intermediate) if keep_inner else None)


def _carried(streams: Streams | None) -> dict[str, Stream]:
    """What goes from layer to layer, by name."""
    if streams is None:
        return {}
    return {"x": streams.x, **({"full": streams.full} if streams.full else {})}


@torch.inference_mode()
def _copy(source: Stream, target: Stream, batch: int) -> None:
    for start, stop in source.spans(batch):
        target.write(start, source.read(start, stop))


@torch.inference_mode()
def _embed(plan: Plan, decoder: Decoder, x: Stream, tokens: list[list[int]], batch: int) -> None:
    tensors = {n: plan.checkpoint.tensor(n).to(x.device) for n in decoder.embeds}
    for start, stop in x.spans(batch):
        ids = torch.tensor(tokens[start:stop], device=x.device)
        x.write(start, decoder.embed(tensors, ids, x.dtype))


def _summary(report: dict[str, Any]) -> str:
    errors = [line["error"] for line in report.get("linears", {}).values() if "error" in line]
    return f"output error {sum(errors) / len(errors):.2e}" if errors else ""


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
