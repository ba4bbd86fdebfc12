"""Numbers as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes, in the binary units that memory is sold in: `12.3 MiB`."""
    for unit, one in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= one:
            return f"{count / one:.{2 if unit == 'GiB' else 1}f} {unit}"
    return f"{count:.0f} B"
