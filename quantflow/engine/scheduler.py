"""Which tokens go through the model in a step: continuous batching with chunked prefill and
preemption by recomputation.

Every step carries the running sequences on, in the order of their requests, and then admits waiting
ones, within a budget of tokens. A decode takes one token of it, so that decodes and chunks of
prompts share a step. Where blocks run out, the last sequence in order gives its own back and waits;
the first in order always finds room, since a request that could not run alone was refused: among
equals nothing starves. A lower priority waits for as long as higher ones keep coming, and what runs
is not stopped for them.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from quantflow.engine.block_manager import BlockManager
from quantflow.engine.request import Sequence


@dataclass(frozen=True)
class Limits:
    """sequences: that run at once. tokens: that go through the model in a step, more than
    `sequences`. context: of one sequence."""

    sequences: int
    tokens: int
    context: int


@dataclass(frozen=True)
class Work:
    """`count` tokens of a sequence, from the first that is not computed."""

    sequence: Sequence
    count: int

    @property
    def start(self) -> int:
        return self.sequence.computed

    @property
    def ends(self) -> bool:
        """Whether its last token is the sequence's, so that another one can be chosen."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass
class Step:
    """One step's work, and the blocks (from, to) to copy before it."""

    work: list[Work] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return *sequence.request.order, sequence.index


class Scheduler:
    """spare: asked for blocks that idle sessions hold; returns whether it gave any back."""

    def __init__(
        self, blocks: BlockManager, limits: Limits, spare: Callable[[], bool] = lambda: False
    ) -> None:
        self.blocks, self.limits, self._spare = blocks, limits, spare
        self.waiting: list[Sequence] = []  # both in order
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_order)

    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def schedule(self) -> Step:
        """The next step; without work where nothing waits and nothing runs."""
        step, budget = Step(), self.limits.tokens
        # Decodes first: a long prompt before them in order must not take the whole budget.
        prefills, preempted = [s for s in self.running if s.pending > 1], self.preemptions
        for sequence in [s for s in self.running if s.pending == 1] + prefills:
            # preempted for one before it
            if self.preemptions > preempted and sequence not in self.running:
                continue
            count = min(sequence.pending, budget)
            if count and self._make_room(sequence, count, step):
                step.work.append(Work(sequence, count))
                budget -= count
        while self.waiting and budget and len(self.running) < self.limits.sequences:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            count = min(sequence.pending, budget)
            if not self._make_room(sequence, count, step, preempt=False):
                break
            step.work.append(Work(sequence, count))
            budget -= count
        return step

    def _admit(self, sequence: Sequence) -> bool:
        """Moves a waiting sequence to the running ones, if all of its tokens find room."""
        if not sequence.blocks and not sequence.computed:
            params, tokens = sequence.request.params, sequence.tokens
            # those want the logits of every token, from the one before the first that is scored
            if params.prompt_logprobs is not None:
                tokens = tokens[: params.prompt_logprobs_from]
            sequence.blocks, sequence.chain = self.blocks.match(
                self.blocks.root(sequence.request.rope_length), tokens
            )
            sequence.sealed = len(sequence.blocks)
            sequence.computed = sequence.sealed * self.blocks.size
            if not sequence.preemptions:
                sequence.cached = sequence.computed
        # One more than it has now: a copy of a shared block, or the next one.
        needed = self.blocks.blocks_for(len(sequence.tokens)) - len(sequence.blocks) + 1
        while not self.blocks.can_allocate(min(needed, self.blocks.count - len(sequence.blocks))):
            if not self._reclaim(sequence):
                if self.running:
                    self._give_back(sequence)
                    return False
                break  # it is alone: what there is must do
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_order)
        return True

    def _make_room(
        self, sequence: Sequence, count: int, step: Step, *, preempt: bool = True
    ) -> bool:
        """Blocks for `count` more tokens; sequences after it in order give theirs up. False if it
        had to give up its own."""
        blocks, size = self.blocks, self.blocks.size
        first = sequence.computed // size
        copied = first < len(sequence.blocks) and blocks.must_copy(sequence.blocks[first])
        needed = blocks.blocks_for(sequence.computed + count) - len(sequence.blocks) + copied
        while not blocks.can_allocate(needed):
            if self._reclaim(sequence):
                continue
            last = self.running[-1]
            if last is sequence or not preempt:
                self.preempt(sequence, step)
                return False
            self.preempt(last, step)
        if copied:
            old, new = sequence.blocks[first], blocks.allocate()
            step.copies.append((old, new))
            sequence.blocks[first] = new
            blocks.release([old])
        for _ in range(needed - copied):
            sequence.blocks.append(blocks.allocate())
        return True

    def _reclaim(self, sequence: Sequence) -> bool:
        """Takes back blocks that nobody works with: an idle session's, or those that another
        waiting sequence was forked with."""
        if self._spare():
            return True
        for other in reversed(self.waiting):
            if other.blocks and other is not sequence:
                self._give_back(other)
                return True
        return False

    def preempt(self, sequence: Sequence, step: Step) -> None:
        """Takes a sequence's blocks away; it waits, and begins again from what the prefix cache
        still holds."""
        self._give_back(sequence)
        step.work = [work for work in step.work if work.sequence is not sequence]
        self.running.remove(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.sealed, sequence.chain = [], 0, 0, 0

    def advance(self, work: Work) -> None:
        """Notes that `work` has gone through the model: its keys and values are in the cache, and
        full blocks can be found again."""
        sequence, size = work.sequence, self.blocks.size
        sequence.computed += work.count
        if not sequence.sealed:
            sequence.chain = self.blocks.root(sequence.request.rope_length)
        while (sequence.sealed + 1) * size <= sequence.computed:
            part = slice(sequence.sealed * size, (sequence.sealed + 1) * size)
            sequence.chain = self.blocks.seal(
                sequence.chain, sequence.tokens[part], sequence.blocks[sequence.sealed]
            )
            sequence.sealed += 1

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Starts `child` where `parent` is, on its blocks."""
        child.blocks = list(parent.blocks)
        child.computed, child.chain, child.sealed, child.cached = (
            parent.computed,
            parent.chain,
            parent.sealed,
            parent.cached,
        )
        self.blocks.share(child.blocks)
        self.add(child)

    def remove(self, sequence: Sequence) -> list[int]:
        """Takes a sequence out; the caller owns its blocks now."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        blocks, sequence.blocks = sequence.blocks, []
        return blocks
