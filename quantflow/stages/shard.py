"""`shard`: `pack` writes the ranks, in `pack_writer.py`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from quantflow.recipe.stage import Stage


class Shard(Stage):
    """Cut the packed tensors for tensor parallelism."""

    name: ClassVar[str] = "shard"
    example: ClassVar[str] = "- shard: {tp: 2}"

    tp: Literal[2, 4, 8, 16, 32, 64] = Field(description="Ranks.")
