"""The C library's heap."""

from __future__ import annotations

import ctypes
import platform


def give_back_freed_memory() -> None:
    """Returns what is freed to the system, where glibc would keep it.

    Blocks below 32 MiB are cut from its heap, which shrinks at its end only: over the layers of a model, holes of many sizes add
    up to hundreds of megabytes. Elsewhere than on glibc it does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
