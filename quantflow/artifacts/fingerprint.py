"""Identities: hashes of what affects a result."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]


def digest(value: Any) -> str:
    """sha256 of a JSON-able value, the order of mappings left out."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


LIBRARIES = ("torch", "triton")  # that compute


@lru_cache
def code_digest(
    *modules: str, alone: tuple[str, ...] = (), libraries: tuple[str, ...] = LIBRARIES
) -> str:
    """sha256 of the code that can change what `modules` compute: their source, and that of all of
    ours that they import, in Python and C; of the modules `alone` their own source; and the
    versions of `libraries`. Nothing is imported for it."""
    hasher = hashlib.sha256()
    for name, path in sorted(
        (closure(*modules) | {name: _file_of(name) for name in alone}).items()
    ):
        assert path is not None, name
        # a module of compiled kernels lies beside its C
        for file in (path, path.with_suffix(".c")):
            if file.is_file():
                hasher.update(f"{name}{file.suffix}".encode() + b"\0" + file.read_bytes() + b"\0")
    for library in libraries:
        hasher.update(f"{library} {_version(library)}".encode() + b"\0")
    return hasher.hexdigest()


def closure(*modules: str) -> dict[str, Path]:
    """Module -> file: `modules`, and all of this package and of the kernels that they import,
    directly or through others. Raises ModuleNotFoundError for one of `modules` that is none of
    ours."""
    files: dict[str, Path] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        path = None if name in files else _file_of(name)
        if path is not None:
            files[name] = path
            # whose __init__ runs too; the topmost has but the version and what users import
            package = name.rpartition(".")[0]
            todo += [*_imports(path), *([package] if "." in package else [])]
    if missing := [name for name in modules if name not in files]:
        raise ModuleNotFoundError(", ".join(missing))
    return files


@cache
def _imports(path: Path) -> tuple[str, ...]:
    """What a file imports, anywhere in it but for types alone. Of `from a import b` both `a` and
    `a.b`, which may be a module."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        ):
            for other in node.orelse:
                yield from walk(other)
        elif isinstance(
            node, ast.stmt | ast.Module | ast.ExceptHandler | ast.match_case
        ):  # no expression holds an import
            for child in ast.iter_child_nodes(node):
                yield from walk(child)

    return tuple(
        dict.fromkeys(name for name in walk(ast.parse(path.read_bytes())) if name.startswith(_OURS))
    )


_OURS = ("quantflow.", "quantflow_kernels.")


def _file_of(module: str) -> Path | None:
    """None for a name that is no module of ours."""
    top, *parts = module.split(".")
    if f"{top}." not in _OURS:
        return None
    path = (_PACKAGE if top == "quantflow" else _kernels()).joinpath(*parts)
    return next(
        (file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None
    )


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # Triton, where there is none
        return ""


def _kernels() -> Path:
    """The folder of the kernels' package, which lies beside ours or where it was installed. It is
    not imported."""
    spec = importlib.util.find_spec("quantflow_kernels")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("quantflow_kernels")
    return Path(spec.submodule_search_locations[0])


def file_digest(path: Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
