"""Identities: hashes of what affects a result."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]


def digest(value: Any) -> str:
    """sha256 of a JSON-able value, the order of mappings left out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def source_digest(*parts: str) -> str:
    """sha256 of the package's source files below `parts` (files or folders, such as "quant" or "stages/awq.py"; "kernels": the kernels',
    in Python and C)."""
    hasher = hashlib.sha256()
    for part in parts:
        top, path = (_kernels().parent, _kernels()) if part == "kernels" else (_PACKAGE, _PACKAGE / part)
        for file in sorted(f for f in path.rglob("*") if f.suffix in (".py", ".c")) if path.is_dir() else [path]:
            hasher.update(str(file.relative_to(top)).encode() + b"\0" + file.read_bytes() + b"\0")
    return hasher.hexdigest()


def _kernels() -> Path:
    """The folder of the kernels' package, which lies beside ours or where it was installed. It is not imported."""
    found = importlib.util.find_spec("quantflow_kernels")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("quantflow_kernels")
    return Path(found.submodule_search_locations[0])


def file_digest(path: Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
