"""Decode steps as CUDA graphs: recorded once for a size, then started by one call, where eagerly a
layer takes a dozen launches.

A decode of a small model takes less time on a GPU than Python takes to launch its kernels one by
one. A graph replays the launches with the addresses that it was recorded with: so what changes from
step to step is copied into buffers that stay where they are, and the number of rows and of
attention's splits is rounded up to one that was recorded. Rows too many store nothing, and no row
reads another's: in exact mode a step has the same bits with a graph and without.

Shapes: `R` rows, one token of a sequence each; `D` head_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantflow.engine.model import Inputs, Mixture, Model, Rotary
from quantflow.engine.ops import KVCache
from quantflow.engine.scheduler import Work

Recorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Records what a function launches: the tensor that it returns, and what computes it anew, in
place."""

NOWHERE = -1  # the slot of a row too many
MOST_POSITIONS = 2**16  # whose rotary angles are held: 33 MB at D = 128


class CudaRecorder:
    """Records into CUDA graphs, which share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None  # of a type that torch keeps to itself

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # What other threads do with the GPU meanwhile is theirs.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        self._pool = graph.pool()
        return result, graph.replay


def sizes(most: int) -> list[int]:
    """Numbers of rows that graphs are recorded for, up to `most` and with it: a step's rows are
    rounded up to the next."""
    return sorted({size for size in (1, 2, 4, *range(8, most, 8)) if size < most} | {most})


def obstacle(model: Model) -> str:
    """Why a model's decodes cannot be recorded; "" where they can."""
    if any(isinstance(layer.mlp, Mixture) for layer in model.layers):
        return "a mixture of experts asks the GPU which experts its tokens go to"
    if model.ops.ranks:
        return "tensor parallelism"
    return ""


def why_eager(model: Model, *, graphs: bool) -> str:
    """Why a model's decodes are not recorded; "" where they are. graphs: whether that is wished."""
    if not model.ops.cuda:
        return "no GPU"
    return obstacle(model) if graphs else "asked for"


class DecodeGraphs:
    """The recorded decodes of one model over its caches. rows: the most sequences in a step;
    context: the longest."""

    def __init__(
        self,
        model: Model,
        caches: list[KVCache],
        rotary: Rotary,
        block_size: int,
        rows: int,
        context: int,
        record: Recorder,
    ) -> None:
        self.model, self.caches, self.rotary, self.block_size = model, caches, rotary, block_size
        self._record, self._sizes = record, sizes(rows)
        device, config = model.ops.device, model.config
        # Token, position, slot, and context: the number of keys that a row's query sees.
        self._rows = torch.zeros(rows, 4, dtype=torch.int64, device=device)
        self._table = torch.zeros(rows, -(-context // block_size), dtype=torch.int32, device=device)
        self._blocks: list[list[int]] = []  # what the table holds
        # cos and sin: of all positions, where they are the same for every sequence and no more than
        # a few megabytes; else each row's.
        self._shared = rotary.shared(context) if context <= MOST_POSITIONS else None
        shape = (rotary.kinds, 2, rows, config.head_dim // 2)
        own = rotary.kinds and self._shared is None
        self._angles = torch.zeros(shape, device=device) if own else None
        self._recorded: dict[tuple[int, int], tuple[Tensor, Callable[[], None]]] = {}
        self.failure = ""  # why a recording failed: then all decodes are eager again

    def takes(self, step: list[Work]) -> bool:
        """Whether a step is a decode that fits."""
        return (
            not self.failure
            and len(step) <= self._sizes[-1]
            and all(work.count == 1 for work in step)
        )

    def run(self, step: list[Work]) -> Tensor:
        """What the head reads, `[R, H]`, for a step that is taken."""
        rows = next(size for size in self._sizes if size >= len(step))
        self._fill(step, rows)
        splits = self.model.ops.splits(max(work.start + 1 for work in step))
        size = (rows, 1 << (splits - 1).bit_length())
        if size not in self._recorded:
            # The first step of a size runs as it is, so that its kernels are compiled; a recording
            # launches nothing.
            result = self._forward(*size)
            try:
                self._recorded[size] = self._record(lambda: self._forward(*size))
            except RuntimeError as error:  # the step is done, and the next one can do without
                self.failure = str(error).partition("\n")[0]
                logging.getLogger(__name__).warning(
                    "decodes could not be recorded as CUDA graphs (%s); they run eagerly",
                    self.failure,
                )
            return result[: len(step)]
        result, replay = self._recorded[size]
        replay()
        return result[: len(step)].clone()  # the next replay writes over it

    def _fill(self, step: list[Work], rows: int) -> None:
        blocks = [work.sequence.blocks for work in step]
        starts = [work.start for work in step]
        spare = rows - len(step)
        slots = [
            own[p // self.block_size] * self.block_size + p % self.block_size
            for own, p in zip(blocks, starts, strict=True)
        ]
        tokens = [work.sequence.tokens[work.start] for work in step]
        filled = [[t, p, slot, p + 1] for t, p, slot in zip(tokens, starts, slots, strict=True)] + [
            [0, 0, NOWHERE, 1]
        ] * spare
        self._rows[:rows].copy_(_on_host(filled, torch.int64, self._rows.device), non_blocking=True)
        if blocks != self._blocks:  # a sequence takes a block once in `block_size` steps
            most = max(map(len, blocks))
            table = _on_host(
                [own + [0] * (most - len(own)) for own in blocks], torch.int32, self._table.device
            )
            self._table[: len(step), :most].copy_(table, non_blocking=True)
            self._blocks = [list(own) for own in blocks]
        if self._angles is not None:
            current = self.rotary.rows(
                [(work.sequence.request.rope_length, work.start, 1) for work in step]
            )
            for kind, parts in zip(self._angles, current, strict=True):
                for angles, part in zip(kind, parts, strict=True):
                    angles[: len(step)].copy_(part)

    def _forward(self, rows: int, splits: int) -> Tensor:
        tokens, positions, slots, contexts = self._rows[:rows].T.contiguous().unbind()
        current: tuple[tuple[Tensor, Tensor], ...] = ()
        if self._shared is not None:
            current = tuple((cos[positions], sin[positions]) for cos, sin in self._shared)
        elif self._angles is not None:
            current = tuple((cos[:rows], sin[:rows]) for cos, sin in self._angles)
        batch = self.model.ops.decode_batch(self._table[:rows], contexts.int(), splits)
        return self.model.forward(Inputs(tokens, positions, current, slots, batch), self.caches)


def _on_host(values: list[list[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """In memory that a GPU can read by itself."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
