"""What the system does not say of a path: which one it was, and why nothing is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError that names no file, as that of a write to an open one, leaves this block with
    `path`'s name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """As UTF-8. An OSError names the path, one of the write itself too."""
    with naming(path):
        path.write_text(text, encoding="utf-8")


def absent(path: Path, kind: str) -> str:
    """What is in the place of something that cannot be found: `no such WHAT`, or a link that leads
    nowhere, or in a circle."""
    try:
        for place in (path, *path.parents):
            if place.is_symlink() and not place.exists():
                target = os.readlink(place)
                named = "" if place == path else f" {place},"
                try:
                    place.stat()
                except FileNotFoundError:
                    return (
                        f"under{named} a link to {target}, which is not there"
                        if named
                        else f"a link to {target}, which is not there"
                    )
                except OSError:
                    return (
                        f"under{named} a link that leads back to itself"
                        if named
                        else "a link that leads back to itself"
                    )
    except (OSError, ValueError):  # too long a name, a NUL, a folder that may not be searched
        pass
    return f"no such {kind}"
