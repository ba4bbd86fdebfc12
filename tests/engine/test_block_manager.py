"""The books of the KV cache, with literal block numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.engine.block_manager import BlockManager

ONE, TWO, THREE = [1, 2], [3, 4], [5, 6]  # the tokens of blocks of two


def filled(blocks: BlockManager, tokens: list[int], root: int | None = None) -> list[int]:
    """A sequence of whole blocks, all of them sealed."""
    link = blocks.root(0) if root is None else root
    found = []
    for at in range(0, len(tokens), blocks.size):
        found.append(blocks.allocate())
        link = blocks.seal(link, tokens[at : at + blocks.size], found[-1])
    return found


def test_blocks_come_in_order_and_run_out() -> None:
    blocks = BlockManager(3, 2)
    assert [blocks.allocate() for _ in range(3)] == [0, 1, 2]
    assert not blocks.can_allocate(1) and blocks.free_blocks == 0
    with pytest.raises(IndexError):
        blocks.allocate()
    blocks.release([1])
    assert blocks.allocate() == 1


def test_a_known_prefix_is_shared_but_never_the_last_token() -> None:
    blocks = BlockManager(8, 2)
    root = blocks.root(0)
    assert filled(blocks, ONE + TWO) == [0, 1]
    assert blocks.match(root, [*ONE, *TWO, 7])[0] == [0, 1]
    assert blocks.match(root, ONE + TWO)[0] == [0]  # its last token has to go through the model
    assert blocks.match(root, [*ONE, 9, 9, 9])[0] == [0]
    assert blocks.match(root, [9, *ONE])[0] == []
    assert blocks.must_copy(0) and blocks.problems([[0, 1], [0, 1], [0], [0]]) == []


def test_the_same_tokens_after_another_prefix_are_another_block() -> None:
    blocks = BlockManager(8, 2)
    filled(blocks, ONE + TWO)
    filled(blocks, THREE + TWO)
    assert blocks.match(blocks.root(0), [*THREE, *TWO, 7])[0] == [2, 3]
    assert blocks.match(blocks.root(0), [*TWO, 7])[0] == []


def test_another_stretch_of_the_rotary_embedding_shares_nothing() -> None:
    blocks = BlockManager(8, 2)
    filled(blocks, ONE)
    assert blocks.match(blocks.root(64), [*ONE, 7])[0] == []
    filled(blocks, ONE, root=blocks.root(64))
    assert blocks.match(blocks.root(64), [*ONE, 7])[0] == [1]


def test_released_blocks_are_found_again_until_they_are_needed() -> None:
    blocks = BlockManager(3, 2)
    held = filled(blocks, ONE + TWO)
    blocks.release(held)
    assert blocks.free_blocks == 3
    found, _ = blocks.match(blocks.root(0), [*ONE, *TWO, 7])
    assert found == [0, 1] and blocks.used_blocks == 2
    blocks.release(found)
    # The one that never held anything goes first, then the end of the prefix.
    assert [blocks.allocate(), blocks.allocate()] == [2, 1]
    assert blocks.match(blocks.root(0), [*ONE, *TWO, 7])[0] == [0]


def test_what_was_built_on_a_forgotten_block_is_not_found_under_other_tokens() -> None:
    blocks = BlockManager(2, 2)
    held = filled(blocks, ONE + TWO)
    blocks.release(held)
    blocks.allocate()  # block 1 goes
    blocks.allocate()  # block 0 goes
    blocks.release([0, 1])
    again = filled(blocks, ONE)
    assert blocks.match(blocks.root(0), [*ONE, *TWO, 7])[0] == again


def test_an_equal_block_that_came_second_is_not_filed() -> None:
    blocks = BlockManager(4, 2)
    filled(blocks, ONE)
    link = blocks.seal(blocks.root(0), ONE, blocks.allocate())
    assert blocks.match(blocks.root(0), [*ONE, 7]) == ([0], link)
    assert blocks.must_copy(0) and not blocks.must_copy(1)


def test_without_a_prefix_cache_nothing_is_shared() -> None:
    blocks = BlockManager(4, 2, prefix_cache=False)
    filled(blocks, ONE)
    assert blocks.match(blocks.root(0), [*ONE, 7])[0] == []


def test_a_leak_and_a_double_owner_are_seen() -> None:
    blocks = BlockManager(3, 2)
    blocks.allocate()
    assert blocks.problems([[0]]) == []
    assert "block 0: 1 references, 0 owners" in blocks.problems([])
    assert "block 0: 1 references, 2 owners" in blocks.problems([[0], [0]])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.lists(st.integers(0, 1), min_size=1, max_size=9)),
        max_size=40,
    )
)
def test_the_books_stay_right_whatever_happens(actions: list[tuple[int, list[int]]]) -> None:
    """Sequences over two letters come, share what they can, grow and go; a matched block always
    holds the tokens asked for."""
    blocks, owned = BlockManager(6, 2), []  # type: ignore[var-annotated]
    content: dict[int, tuple[int, ...]] = {}  # what a block holds, with all that precedes it
    for action, tokens in actions:
        if action < 3:
            found, link = blocks.match(blocks.root(0), tokens)
            for i, block in enumerate(found):
                assert content[block] == tuple(tokens[: 2 * i + 2])
            while (len(found) + 1) * 2 <= len(tokens) and blocks.can_allocate(1):
                at = len(found)
                found.append(blocks.allocate())
                content[found[-1]] = tuple(tokens[: 2 * at + 2])
                link = blocks.seal(link, tokens[2 * at : 2 * at + 2], found[-1])
            owned.append(found)
        elif owned:
            blocks.release(owned.pop(len(tokens) % len(owned)))
        assert blocks.problems(owned) == []
