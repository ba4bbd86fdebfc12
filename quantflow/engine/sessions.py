"""Dialogues that are kept between turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from quantflow.engine.block_manager import BlockManager
from quantflow.errors import Problem, RequestError


@dataclass
class Session:
    """A dialogue that is kept between turns: its tokens, and the cache blocks that hold them. turn:
    the request that continues it."""

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    turn: str | None = None


class Sessions(Mapping[int, Session]):
    """All dialogues by their numbers, in the order of their last turns. blocks: whose blocks they
    hold between turns; a turn that runs owns its blocks itself."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._sessions: dict[int, Session] = {}

    def __getitem__(self, number: int) -> Session:
        return self._sessions[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._sessions)

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(self, number: int, turn: str) -> None:
        """A turn, the first perhaps."""
        self._sessions.setdefault(number, Session()).turn = turn

    def keep(self, number: int, tokens: list[int], blocks: list[int]) -> None:
        """The turn is over: its tokens and blocks are the session's, which is now the last to be
        dropped."""
        session = self._sessions.pop(number)
        self._blocks.release(session.blocks)
        session.tokens, session.blocks, session.turn = tokens, blocks, None
        self._sessions[number] = session

    def rewind(self, number: int, tokens: int) -> None:
        """Takes a session back to its first `tokens` tokens."""
        session = self._sessions[number]
        keep = self._blocks.blocks_for(tokens)
        self._blocks.release(session.blocks[keep:])
        session.tokens, session.blocks = session.tokens[:tokens], session.blocks[:keep]

    def end(self, number: int) -> None:
        """Forgets a session."""
        self._blocks.release(self._sessions.pop(number).blocks)

    def give_back(self) -> bool:
        """Gives back the blocks of a session, the one whose last turn was the longest ago; its next
        turn finds or recomputes them. Whether any had blocks."""
        for session in self._sessions.values():
            if session.blocks:
                self._blocks.release(session.blocks)
                session.blocks = []
                return True
        return False

    def idle(self, number: int) -> Session:
        """Raises RequestError for one that is not known, or busy."""
        where = f"session {number}"
        session = self._sessions.get(number)
        if session is None:
            raise RequestError(Problem(where, "not known", "a session that has had a turn"))
        if session.turn is not None:
            raise RequestError(Problem(where, "a turn is running", "abort it first"))
        return session
