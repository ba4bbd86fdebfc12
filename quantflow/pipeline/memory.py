"""This process's memory: how much there is, and giving back what was freed."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path


def resident_bytes() -> int:
    """Resident size of this process, mapped pages included; 0 where the system does not tell."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The largest resident size so far. Not `ru_maxrss`, which begins with what the parent had at the fork."""
    return _status("VmHWM")


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def give_back_freed_memory() -> None:
    """Returns what is freed to the system, where glibc would keep it.

    Blocks below 32 MiB are cut from its heap, which shrinks at its end only: over the layers of a model, holes of many sizes add
    up to hundreds of megabytes. Elsewhere than on glibc it does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
