"""What a format can hold, in the words of the table that users read. The formats' own `check`
decides; a test holds them together."""

from __future__ import annotations

from dataclasses import dataclass

FILE = "beside it"  # kv_qparams.safetensors


@dataclass(frozen=True)
class Ability:
    """grid: which numbers a code can stand for. bits: of integer grids. here: whether QuantFlow
    reads and writes it. What engines load of it is in `engines.LOADS`."""

    grid: str
    bits: tuple[int, ...]
    groups: str
    asymmetric: str = "yes"
    mixed_bits: str = "yes"
    act_order_index: str = "no"
    kv_scales: str = FILE
    tensor_parallel: str = "yes"
    here: str = "read, write"
