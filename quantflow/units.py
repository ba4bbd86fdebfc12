"""Numbers as people read them, and as files that others may have written hold them."""

from __future__ import annotations

import sys
from typing import Any

ROUNDING = -1e-6  # what a divergence computed in float32 may lie below 0


def size(count: float) -> str:
    """Bytes, in the binary units that memory is sold in: `12.3 MiB`."""
    for unit, one in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= one:
            return f"{count / one:.{2 if unit == 'GiB' else 1}f} {unit}"
    return f"{count:.0f} B"


def is_number(value: Any, least: float = -sys.float_info.max) -> bool:
    """Whether a value of JSON is a finite number, of at least so much; a truth value is none."""
    # NaN is nowhere
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and least <= value <= sys.float_info.max
    )
