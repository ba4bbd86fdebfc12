"""Which cache blocks belong to whom: reference counts, copy on write, and the prefix cache.

A full block is known by its *link*: a number that stands for its tokens and all that precede them.
Links are given out by a dictionary from (link before, tokens of the block), which compares the
tokens themselves: two prefixes never share a link by accident. The first link stands for what else
keys depend on, the length that a rotary embedding is stretched for.

A block that nobody refers to is free, but keeps its content until it is needed: the least recently
used goes first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

Place = tuple[int, tuple[int, ...]]  # the link before, and the tokens of the block


class BlockManager:
    """count: blocks; size: tokens a block. prefix_cache: whether full blocks are found again by
    their tokens."""

    def __init__(self, count: int, size: int, *, prefix_cache: bool = True) -> None:
        self.count, self.size, self.prefix_cache = count, size, prefix_cache
        self._references = [0] * count
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(count))
        self._links: dict[Place, int] = {}
        self._block_of: dict[int, int] = {}  # link -> block
        self._place_of: dict[int, Place] = {}  # block -> its place
        self._next_link = 1

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def used_blocks(self) -> int:
        return self.count - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def can_allocate(self, blocks: int) -> bool:
        return blocks <= len(self._free)

    def allocate(self) -> int:
        """A block of one's own, whose former content is forgotten. Raises IndexError where none is
        free: ask `can_allocate`."""
        if not self._free:
            raise IndexError("no free cache block")
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def must_copy(self, block: int) -> bool:
        """Whether others may read what the block holds, so that only a copy of it may be written
        to."""
        return self._references[block] > 1 or block in self._place_of

    def share(self, blocks: Iterable[int]) -> None:
        """One more owner for each."""
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less for each; the last blocks are forgotten before those they build on."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                if block not in self._place_of:  # nothing to find again: use it up first
                    self._free.move_to_end(block, last=False)

    def root(self, rope_length: int) -> int:
        """The link that sequences of that stretch begin with."""
        return self._link((-1, (rope_length,)))

    def match(self, root: int, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The blocks that hold the longest known prefix of `tokens`, now shared with the caller,
        and their link. The last token is never among them: it has to go through the model for its
        logits."""
        blocks: list[int] = []
        link = root
        while self.prefix_cache and (len(blocks) + 1) * self.size < len(tokens):
            following = self._links.get(
                (link, tuple(tokens[len(blocks) * self.size : (len(blocks) + 1) * self.size]))
            )
            if following is None or following not in self._block_of:
                break
            link = following
            blocks.append(self._block_of[link])
        self.share(blocks)
        return blocks, link

    def seal(self, link: int, tokens: Sequence[int], block: int) -> int:
        """The link of a block that has become full with `tokens`, after the blocks that `link`
        stands for."""
        place = (link, tuple(tokens))
        link = self._link(place)
        if link not in self._block_of:  # else another block with the same content was first
            self._block_of[link] = block
            self._place_of[block] = place
        return link

    def _link(self, place: Place) -> int:
        if place not in self._links:
            self._links[place] = self._next_link
            self._next_link += 1
        return self._links[place]

    def _forget(self, block: int) -> None:
        place = self._place_of.pop(block, None)
        if place is not None:
            # The number is never given out again, so that what was built on it is not found under
            # other tokens.
            del self._block_of[self._links.pop(place)]

    def problems(self, owned: Iterable[Sequence[int]]) -> list[str]:
        """What is wrong with the books, given the blocks of every owner: [] where every reference
        is accounted for."""
        counted = Counter(block for blocks in owned for block in blocks)
        wrong = [
            f"block {b}: {self._references[b]} references, {counted[b]} owners"
            for b in range(self.count)
            if self._references[b] != counted[b]
        ]
        wrong += [f"block {b} is free and in use" for b in self._free if self._references[b]]
        wrong += [
            f"block {b} is neither free nor in use"
            for b in range(self.count)
            if not self._references[b] and b not in self._free
        ]
        wrong += [
            f"block {b} is filed under another link"
            for b, place in self._place_of.items()
            if self._block_of[self._links[place]] != b
        ]
        return wrong
