"""`signround`: a layer's rounding, trained by the signs of its gradients.

Cheng et al., SignRound (arXiv 2309.05516), section 3: the rate falls in a straight line from one in
so many iterations, so that a weight can move by half a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantflow.quant.trained import SignedGrid
from quantflow.stages.train_layer import Course, Lesson
from quantflow.stages.work import LayerWork

if TYPE_CHECKING:
    from quantflow.stages.signround import Signround

CHECKS = 10  # of the held-out windows, evenly spaced


def signround_layer(settings: Signround, work: LayerWork) -> None:
    lesson = Lesson(settings, work)
    grids = {
        name: SignedGrid.start(weight, tensor, work.rules)
        for name, weight, tensor in lesson.starts()
    }
    order, steps = torch.Generator().manual_seed(lesson.block.index), settings.iterations
    batches = [
        torch.randperm(len(lesson.seen), generator=order)[: settings.batch].tolist()
        for _ in range(steps)
    ]
    parameters = [parameter for grid in grids.values() for parameter in grid.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1 / steps)
    falling = [1 - step / steps for step in range(steps)]
    course = Course(batches, max(1, steps // CHECKS), optimizer, falling, signed=True)
    lesson.leave(grids, "signround", lesson.learn(grids, course))
