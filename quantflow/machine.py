"""The machine at hand: which device to compute on, how much memory there is, and giving back what
was freed."""

from __future__ import annotations

import ctypes
import platform
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from quantflow.errors import Problem, UserError

if TYPE_CHECKING:
    import torch


def resolve_device(device: str) -> str:
    """`cpu` or `cuda`; raises UserError for a GPU that is not there."""
    if device == "cpu":
        return device
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            Problem("--device cuda", "torch sees no GPU", "a CUDA device", "Use --device cpu")
        )
    return "cuda" if torch.cuda.is_available() else "cpu"


def resident_bytes() -> int:
    """Resident size of this process, mapped pages included; 0 where the system does not tell."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The largest resident size so far. Not `ru_maxrss`, which begins with what the parent had at
    the fork."""
    return _status("VmHWM")


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def free_bytes(device: torch.device) -> int:
    """Memory that is left: the GPU's, or this machine's, within the limit of a control group where
    there is one."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (
            (group / name).read_text(encoding="ascii").strip()
            for name in ("memory.max", "memory.current")
        )
    except OSError:
        return free
    return min(free, int(limit) - int(used)) if limit.isdecimal() else free


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, a GPU's or this machine's, did not suffice: torch says so in several ways."""
    text = str(error)
    matches = (
        type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text
        or "not enough memory" in text
    )
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and matches)


def ending(code: int) -> str:
    """How a process ended, by what `subprocess` says of it: `ended with exit code 3`, `killed by
    SIGILL (illegal instruction)`."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    words = (signal.strsignal(-code) or "").lower()
    return f"killed by {name}{f' ({words})' if words else ''}"


def processor() -> str:
    """Its name, where the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """Of which product it is; another may round otherwise. "" for a GPU that is not there."""
    if device == "cpu":
        return processor()
    import torch

    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""


def give_back_freed_memory() -> None:
    """Returns what is freed to the system, where glibc would keep it.

    Blocks below 32 MiB are cut from its heap, which shrinks at its end only: over the layers of a
    model, holes of many sizes add up to hundreds of megabytes. Elsewhere than on glibc it does
    nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
