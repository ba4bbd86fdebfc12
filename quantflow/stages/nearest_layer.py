"""`rtn` and `nf4`: a layer's linears, each rounded for itself, whatever they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantflow.decoder.block import Block
from quantflow.decoder.stream import Stream
from quantflow.stages.output_error import OutputErrors
from quantflow.stages.rounded import Quantized, nearest_linear
from quantflow.stages.work import LayerWork

if TYPE_CHECKING:
    from quantflow.stages.nf4 import Nf4
    from quantflow.stages.rtn import Rtn


def rtn_layer(settings: Rtn, work: LayerWork) -> None:
    round_each(work, partial(_nearest, work, search=settings.range_search))


def nf4_layer(settings: Nf4, work: LayerWork) -> None:
    round_each(work, partial(_nearest, work, search=False))


def _nearest(work: LayerWork, name: str, *, search: bool) -> Quantized:
    """The linear, rounded to the nearest of its scheme's numbers; on the range of least output
    error where `awq` left what that takes."""
    return nearest_linear(
        work.unrounded.plain(name),
        work.schemes[name],
        work.rules,
        search=search,
        importance=work.importance.get(name),
    )


@torch.inference_mode()
def round_each(work: LayerWork, rounded: Callable[[str], Quantized]) -> None:
    """Takes each of the layer's linears as `rounded` makes it of its name; then the stream goes
    through the whole layer."""
    tensors = {**work.stored, **work.changed} if work.streams else {}
    for segment in work.segments:
        for name in work.names(segment):
            work.rounded[name] = rounded(name)
            if work.streams:
                tensors[f"{name}.weight"] = work.rounded[name].tensor.dequantize(work.dtype)
            work.tell(name)
    if work.streams:
        carry_on(work, work.make_block(tensors), work.streams.x)


def carry_on(work: LayerWork, block: Block, entry: Stream) -> None:
    """Takes the stream, from what enters, through the rounded layer, and adds to its report what
    rounding did to the outputs."""
    assert work.streams is not None
    x, source, rounded = work.streams.x, work.unrounded, work.rounded

    def difference(name: str) -> tuple[Tensor, Tensor] | None:
        if name not in rounded:
            return None
        weight = source.plain(name).float()
        return weight, weight - rounded[name].tensor.dequantize()

    errors = OutputErrors(difference)
    for start, stop in x.spans(work.batch):
        block.tap = None if start else errors  # the first windows are sample enough
        x.write(start, block.forward(entry.read(start, stop), work.kv))
    for name, lines in errors.of_linears.items():
        rounded[name] = replace(rounded[name], report=rounded[name].report | lines)
