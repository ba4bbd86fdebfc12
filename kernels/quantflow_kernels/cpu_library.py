"""C sources compiled for this machine when they are first needed, once.

They need gcc, as `CC`, cc or gcc, since torch brings gcc's OpenMP runtime and no other. A library
is kept in the user's cache folder, under a name that changes with the source, the compiler with its
options, and an x86 processor's features.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

# Without -fopenmp at the link: OpenMP's runtime is the one that torch has loaded, or two pools of
# threads would wait for each other.
COMPILERS = ("cc", "gcc")
# what a full disk or a power cut leaves behind
DAMAGED = ("file too short", "invalid ELF header", "cannot read file data")
COMPILE = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fopenmp",
    "-fPIC",
    "-c",
)


def load(source: Path, arguments: Mapping[str, Sequence[Any]]) -> tuple[ctypes.CDLL | None, str]:
    """The functions of a C source, with their arguments' types, and ""; or None and the reason. It
    may compile, for about three seconds."""
    try:
        path = built(source)
        try:
            functions = ctypes.CDLL(str(path))
        except OSError as error:
            if not any(sign in str(error) for sign in DAMAGED):
                raise
            path.unlink(missing_ok=True)
            functions = ctypes.CDLL(str(built(source)))
        for name, types in arguments.items():
            getattr(functions, name).argtypes = types
    except (OSError, AttributeError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, subprocess.CalledProcessError):
            reason = f"{error.cmd[0]} failed: {(error.stderr or '').strip()[:300]}"
        warning = (
            "the CPU's kernels could not be compiled (%s: %s); plain torch operations are used"
        )
        logging.getLogger(__name__).warning(warning, source.name, reason)
        return None, reason
    return functions, ""


def needed(library: tuple[ctypes.CDLL | None, str]) -> ctypes.CDLL:
    """The functions that `load` found. Raises RuntimeError where there are none."""
    functions, reason = library
    if functions is None:
        raise RuntimeError(reason)
    return functions


def compiler_command() -> list[str]:
    """The compiler that is there, with the options that `CC` gives it; [] where there is none."""
    asked = shlex.split(os.environ.get("CC", ""))
    return next(
        ([path, *asked[1:]] for path in map(shutil.which, asked[:1] or COMPILERS) if path), []
    )


def built(source: Path) -> Path:
    """The library of a C source, compiled where it is not there yet. Raises OSError and
    SubprocessError."""
    if not (compiler := compiler_command()):
        raise OSError(f"no C compiler ({os.environ.get('CC') or ', '.join(COMPILERS)})")
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    cpu = Path("/proc/cpuinfo")
    flags = (
        next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "")
        if cpu.is_file()
        else ""
    )
    parts = (
        source.read_text(),
        " ".join(COMPILE),
        shlex.join(compiler),
        version,
        platform.machine(),
        flags,
    )
    name = f"{source.stem}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    try:
        # RuntimeError: no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantflow"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner = folder.stat()
        if owner.st_uid != os.getuid() or owner.st_mode & 0o022 or not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not this user's own")
    except (OSError, RuntimeError):  # it is compiled for this process alone
        folder = Path(tempfile.mkdtemp(prefix="quantflow-"))
    target = folder / name
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            object_file, shared = Path(scratch) / "kernels.o", Path(scratch) / name
            steps = (
                (*COMPILE, str(source), "-o", str(object_file)),
                ("-shared", str(object_file), "-o", str(shared)),
            )
            for step in steps:
                subprocess.run(
                    [*compiler, *step], capture_output=True, text=True, check=True, timeout=300
                )
            os.replace(shared, target)  # whole, or not there
    return target


def at(tensor: Tensor | None) -> int | None:
    """A tensor's address; None for NULL."""
    return None if tensor is None else tensor.data_ptr()
