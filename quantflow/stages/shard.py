"""`shard`: `pack` writes the ranks, in `pack_writer.py`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from quantflow.stages.base import PlannedStage


class Shard(PlannedStage):
    """Cut the packed tensors for tensor parallelism."""

    name: ClassVar[str] = "shard"
    example: ClassVar[str] = "- shard: {tp: 2}"

    tp: Literal[2, 4, 8, 16, 32, 64] = Field(description="Ranks.")

    @property
    def ranks(self) -> int:
        return self.tp
