"""`block_ap`: weights, scales and zero points of a layer, trained together by AdamW.

Chen et al., EfficientQAT (arXiv 2407.11062), section 3.2. There one learning rate serves all
weights, and one all scales; here a rate counts in steps of the linear's grid, so that it means the
same for every model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from quantflow.quant.trained import TrainedGrid
from quantflow.stages.train_layer import Course, Lesson
from quantflow.stages.work import LayerWork

if TYPE_CHECKING:
    from quantflow.stages.block_ap import BlockAp

LAST_SHARE = 0.05  # of the learning rate, at the end of its cosine


def block_ap_layer(settings: BlockAp, work: LayerWork) -> None:
    rates = settings.rates(begun=bool(work.rounded))
    lesson = Lesson(settings, work)
    grids = {
        name: TrainedGrid.start(weight, tensor, work.rules)
        for name, weight, tensor in lesson.starts()
    }
    order = torch.Generator().manual_seed(lesson.block.index)
    epochs = (
        torch.randperm(len(lesson.seen), generator=order).split(settings.batch)
        for _ in range(settings.epochs)
    )
    batches = [batch.tolist() for epoch in epochs for batch in epoch]
    optimizer = torch.optim.AdamW(_groups(rates, grids), betas=(0.9, 0.95), weight_decay=0)
    course = Course(
        batches, len(batches) // settings.epochs, optimizer, list(_cosine(len(batches)))
    )
    lesson.leave(grids, "block_ap", lesson.learn(grids, course))


def _groups(
    rates: tuple[float, float], grids: Mapping[str, TrainedGrid]
) -> Iterator[dict[str, Any]]:
    for grid in grids.values():
        step = float(grid.scales.mean())
        yield {"params": [grid.weight], "lr": rates[0] * step}
        yield {"params": [grid.scales], "lr": rates[1] * step}
        if not grid.scheme.symmetric:
            yield {"params": [grid.zeros], "lr": rates[1]}


def _cosine(steps: int) -> Iterator[float]:
    for step in range(steps):
        yield LAST_SHARE + (1 - LAST_SHARE) * (1 + math.cos(math.pi * step / steps)) / 2
