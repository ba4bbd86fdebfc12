"""One step on the device: the scheduled tokens through the model, and logits where they are asked
for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantflow.engine.graphs import DecodeGraphs, Recorder
from quantflow.engine.kv_cache import copy_block
from quantflow.engine.model import Inputs, Model, Rotary
from quantflow.engine.ops import KVCache
from quantflow.engine.scheduler import Step, Work

LOGIT_ELEMENTS = 2**25  # logits of prompts that are computed at once


@dataclass(frozen=True)
class States:
    """What the head reads after a step. rows: `[T, H]`, of all its tokens. wanted: of each piece of
    work, the rows from and to: its last token's, and those before it from which the prompt's
    log-probabilities are wanted."""

    rows: Tensor
    wanted: tuple[tuple[int, int], ...]

    def of(self, work: int) -> Tensor:
        """The wanted rows of a piece of work."""
        first, stop = self.wanted[work]
        return self.rows[first:stop]

    def last(self, works: list[int]) -> Tensor:
        """The last row of each of these pieces."""
        at = [self.wanted[work][1] - 1 for work in works]
        return (
            self.rows
            if at == list(range(len(self.rows)))
            else self.rows[torch.tensor(at, device=self.rows.device)]
        )


class ModelRunner:
    """block_size: tokens a cache block. progress: called after each layer of a step that runs
    eagerly, and after the head."""

    def __init__(
        self,
        model: Model,
        caches: list[KVCache],
        block_size: int,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.caches, self.block_size, self._progress = (
            model,
            caches,
            block_size,
            progress,
        )
        self.rotary = Rotary(model.config, model.ops.device)
        self.graphs: DecodeGraphs | None = None  # every step runs eagerly

    def record_decodes(self, rows: int, context: int, record: Recorder) -> None:
        """From now on, decodes of at most `rows` sequences with at most `context` tokens are
        recorded and replayed."""
        self.graphs = DecodeGraphs(
            self.model, self.caches, self.rotary, self.block_size, rows, context, record
        )

    @torch.inference_mode()
    def run(self, step: Step) -> States:
        """A step's tokens through the model."""
        for source, target in step.copies:
            copy_block(self.caches, source, target)
        if self.graphs and self.graphs.takes(step.work):
            h = self.graphs.run(step.work)
        else:
            h = self.model.forward(self.inputs(step.work), self.caches, self._progress)
        wanted, at = [], 0
        for work in step.work:
            params, first = work.sequence.request.params, work.count - 1
            if params.prompt_logprobs is not None:
                first = min(first, max(0, params.prompt_logprobs_from - 1 - work.start))
            wanted.append((at + first, at + work.count))
            at += work.count
        return States(h, tuple(wanted))

    @torch.inference_mode()
    def logits(self, h: Tensor) -> Tensor:
        """`[n, V]` of rows of what `run` gives."""
        logits = self.model.logits(h)
        self._progress()
        return logits

    def prompt_chunks(self, rows: int) -> int:
        """How many rows' logits may be in memory at once."""
        return max(1, min(rows, LOGIT_ELEMENTS // self.model.config.vocabulary))

    def inputs(self, step: list[Work]) -> Inputs:
        """What the model reads for some sequences' work."""
        device, size = self.model.ops.device, self.block_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for work in step:
            blocks, stop = work.sequence.blocks, work.start + work.count
            tokens += work.sequence.tokens[work.start : stop]
            positions += range(work.start, stop)
            slots += [blocks[p // size] * size + p % size for p in range(work.start, stop)]
        together = torch.tensor([tokens, positions, slots]).to(device)  # one transfer
        most = max(len(work.sequence.blocks) for work in step)
        table = torch.tensor(
            [w.sequence.blocks + [0] * (most - len(w.sequence.blocks)) for w in step],
            dtype=torch.int32,
        ).to(device)
        lengths, contexts = [w.count for w in step], [w.start + w.count for w in step]
        batch = self.model.ops.batch(lengths, contexts, table, self.model.config)
        angles = self.rotary.rows(
            [(w.sequence.request.rope_length, w.start, w.count) for w in step]
        )
        return Inputs(together[0], together[1], angles, together[2], batch)
