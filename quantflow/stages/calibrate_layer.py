"""`calibrate`: statistics of every linear's input and output, and of K and V, in the full-precision
model.

What LMDeploy's `lite calibrate` records, as safetensors: `{module}.input.max`,
`{module}.output.absmean`, …, `key.max`, ….
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantflow.calibration.statistics import ChannelStatistics, KVStatistics
from quantflow.decoder.block import Block
from quantflow.decoder.stream import Stream
from quantflow.models.segments import Role
from quantflow.stages.route import expert_tokens

if TYPE_CHECKING:
    from quantflow.stages.calibrate import Calibrate
    from quantflow.stages.work import LayerWork


class LayerStatistics:
    """A tap on a decoder layer. Linears that read the same tensor share one record of it."""

    def __init__(self, count: Callable[[str, int], None] = lambda name, rows: None) -> None:
        self._count = count
        self.inputs: dict[str, ChannelStatistics] = {}
        self.outputs: dict[str, ChannelStatistics] = {}
        self.kv = KVStatistics()
        self._last: tuple[Tensor, ChannelStatistics] | None = None

    def __call__(self, name: str, x: Tensor, y: Tensor) -> None:
        self._count(name, x.shape[:-1].numel())
        if self._last is not None and self._last[0] is x:
            self.inputs.setdefault(name, self._last[1])
        else:
            record = self.inputs.setdefault(name, ChannelStatistics())
            record.add(x)
            self._last = (x, record)
        self.outputs.setdefault(name, ChannelStatistics()).add(y)

    def result(self) -> dict[str, Tensor]:
        statistics = self.kv.result()
        for kind, records in (("input", self.inputs), ("output", self.outputs)):
            for name, record in records.items():
                statistics.update(
                    {
                        f"{name}.{kind}.{statistic}": value
                        for statistic, value in record.result().items()
                    }
                )
        return statistics


def calibrate_layer(
    layer: Block,
    stream: Stream,
    batch: int,
    step: Callable[[float], None] = lambda share: None,
    count: Callable[[str, int], None] = lambda name, rows: None,
) -> dict[str, Tensor]:
    """The statistics of one layer; `stream` moves on through it in place. step: is told the share
    of the windows that is through. count: a linear's rows."""
    statistics = LayerStatistics(count)
    layer.tap = statistics
    for start in range(0, stream.windows, batch):
        stop = min(start + batch, stream.windows)
        stream.write(start, layer.forward(stream.read(start, stop), statistics.kv))
        step((stop - start) / stream.windows)
    return {name: value.cpu().contiguous() for name, value in statistics.result().items()}


@torch.inference_mode()
def calibrate(settings: Calibrate, work: LayerWork) -> None:
    assert work.streams is not None
    block, x = work.make_block(work.stored), work.streams.x
    block.everywhere = settings.route == "all"
    tokens: Counter[tuple[str, int]] = Counter()
    experts = {
        s.names[0]: (s.part, s.expert)
        for s in work.segments
        if s.expert is not None and s.role is Role.mlp_in
    }
    tokens.update(dict.fromkeys(experts.values(), 0))

    def count(name: str, rows: int) -> None:
        if name in experts:
            tokens[experts[name]] += rows

    work.tensors |= calibrate_layer(block, x, work.batch, work.advance, count)
    work.report |= expert_tokens(tokens)
