"""One decoder layer on its way through a recipe's stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantflow.calibration.statistics import KVStatistics
from quantflow.decoder.block import Block, Streams
from quantflow.decoder.walk import Result
from quantflow.models.segments import Segment
from quantflow.quant.grid import GridRules
from quantflow.quant.scheme import Scheme
from quantflow.stages.folding import Folding
from quantflow.stages.rounded import Quantized, Rounder, Unrounded


@dataclass
class LayerWork:
    """What a stage is given of a layer, and what it leaves for the stages behind it and the store.

    stored: the tensors as the checkpoint has them. schemes: of the linears that are to be
    quantised. streams: of all windows, as the layers before have left them; whoever rounds takes
    them through the layer. make_block: a layer that computes with the given tensors. batch: windows
    that go through it together. round_finally: how the stage that rounds does it, where that is not
    to nearest. tell: is told of each part that is done, by its name; advance: of a share of the
    layer.
    """

    stored: Mapping[str, Tensor]
    segments: Sequence[Segment]
    schemes: Mapping[str, Scheme]
    rules: GridRules
    streams: Streams | None
    make_block: Callable[[Mapping[str, Tensor]], Block]
    last: bool  # of the decoder's: nobody reads what leaves it
    batch: int
    device: torch.device
    dtype: torch.dtype
    round_finally: Rounder | None = None
    tell: Callable[[str], None] = lambda part: None
    advance: Callable[[float], None] = lambda share: None

    # What `awq` leaves for rounding: scales, tensors that are stored anew without being quantised,
    # and linear -> blocks of its input's Hessian.
    folding: Folding = field(default_factory=Folding)
    changed: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    # What rounding leaves: the linears, and the extremes of K and V as it took the streams through.
    rounded: dict[str, Quantized] = field(default_factory=dict)
    kv: KVStatistics = field(default_factory=KVStatistics)
    # What else is stored, and reported.
    tensors: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def result(self) -> Result:
        """What the store keeps of the layer."""
        tensors = {**self.changed, **self.tensors}
        for name, linear in self.rounded.items():
            tensors |= {f"{name}.{part}": value for part, value in linear.tensor.parts().items()}
        report = {
            "linears": {name: self.rounded[name].report for name in sorted(self.rounded)},
            "schemes": {name: self.schemes[name].as_list() for name in self.rounded},
        }
        return Result(
            {name: value.cpu().contiguous() for name, value in tensors.items()},
            report | self.report,
        )

    @property
    def unrounded(self) -> Unrounded:
        return Unrounded(self.stored, self.folding, self.schemes, self.rules)

    def names(self, segment: Segment) -> list[str]:
        """The linears of a segment that are to be quantised."""
        return [name for name in segment.names if name in self.schemes]
