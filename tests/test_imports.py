"""Imports point down only, and what a user sees first needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from quantflow.stages.registry import STAGES

ROOT = Path(__file__).parents[1]

# From the top. A package imports from lower lines, and from its own line as long as that makes no
# circle.
LAYERS = (
    ("cli",), ("api", "serve"), ("pipeline",), ("evaluate", "report"), ("engine",), ("stages",),
    ("formats",), ("artifacts", "decoder"), ("calibration",), ("tokenizers",),
    ("checkpoints",), ("models",), ("quant",), ("recipe",), ("machine",), ("placeholder",),
    ("arguments", "bundled", "distribution", "errors", "paths", "units"),
)  # fmt: skip
HEIGHT = {package: -line for line, packages in enumerate(LAYERS) for package in packages}


def files(top: Path) -> list[Path]:
    return sorted(path for path in top.rglob("*.py") if "__pycache__" not in path.parts)


def module_name(path: Path, root: Path = ROOT) -> str:
    """`quantflow.quant.grid` for quantflow/quant/grid.py, `quantflow.quant` for its __init__.py."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, str]]:
    """The modules that the code imports, anywhere in it: (a, b) for `from a import b`, (a, "") for
    `import a`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([base] if base else [])])
            yield from ((base, alias.name) for alias in node.names)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """The same as names; `from a import b` gives both `a` and `a.b`, since b may be a module."""
    for base, name in imported(tree, module, is_package):
        yield base
        if name:
            yield f"{base}.{name}"


def imports_of(path: Path, root: Path = ROOT) -> set[str]:
    return set(
        imports(
            ast.parse(path.read_text(encoding="utf-8")),
            module_name(path, root),
            path.name == "__init__.py",
        )
    )


def package_of(module: str) -> str | None:
    """`quant` for `quantflow.quant.grid`; None for `quantflow` itself and for what is not ours."""
    top, _, rest = module.partition(".")
    return rest.split(".")[0] if top == "quantflow" and rest else None


def upward(module: str, imported: set[str]) -> set[str]:
    """Those of `imported` that `module` must not import."""
    here = package_of(module)
    if here is None:
        return set()
    return {
        name
        for name in imported
        if (there := package_of(name)) in HEIGHT and there != here and HEIGHT[there] > HEIGHT[here]
    }


def test_every_package_has_its_layer() -> None:
    packages = {package_of(module_name(path)) for path in files(ROOT / "quantflow")} - {None}
    assert packages <= set(HEIGHT), f"put {packages - set(HEIGHT)} into LAYERS"
    assert {"recipe", "quant", "errors", "cli"} <= packages


def test_imports_point_down() -> None:
    wrong = {
        module_name(path): up
        for path in files(ROOT / "quantflow")
        if (up := upward(module_name(path), imports_of(path)))
    }
    assert wrong == {}


def test_packages_import_each_other_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in files(ROOT / "quantflow"):
        if (here := package_of(module_name(path))) is not None:
            used = {
                there
                for name in imports_of(path)
                if (there := package_of(name)) in HEIGHT and there != here
            }
            graph.setdefault(here, set()).update(used)
    assert circle(graph) == ""


def executed(tree: ast.AST) -> ast.AST:
    """Without what is imported for annotations alone; what a function imports when it is called
    stays."""

    class Pruner(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                return None
            return self.generic_visit(node)

    return Pruner().visit(tree)


def file_graph(sources: dict[str, tuple[str, bool]]) -> dict[str, set[str]]:
    """Which files import which. sources: module -> (its code, whether it is an __init__.py)."""
    graph = {}
    for module, (code, is_package) in sources.items():
        pairs = imported(executed(ast.parse(code)), module, is_package)
        # `from a import b` where b is a file wants nothing that a's __init__.py has
        used = {full if (full := f"{base}.{name}") in sources else base for base, name in pairs}
        graph[module] = used & set(sources) - {module}
    return graph


def circle(graph: dict[str, set[str]]) -> str:
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return " > ".join(reversed(error.args[1]))
    return ""


def test_files_import_each_other_in_no_circle() -> None:
    """Not by way of what a function imports when it is called, either."""
    sources = {
        module_name(path): (path.read_text(encoding="utf-8"), path.name == "__init__.py")
        for path in files(ROOT / "quantflow")
    }
    assert circle(file_graph(sources)) == ""


def test_the_check_of_circles_itself() -> None:
    lazily = {
        "quantflow": ("", True),
        "quantflow.a": ("from quantflow.b import f", False),
        "quantflow.b": ("def f():\n    from quantflow import a", False),
    }
    assert set(circle(file_graph(lazily)).split(" > ")) == {"quantflow.a", "quantflow.b"}
    for_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from quantflow import a"
    assert circle(file_graph({**lazily, "quantflow.b": (for_types, False)})) == ""


MOST_LINES = 450


def test_no_file_is_longer_than_a_reader_holds_in_mind() -> None:
    package = ROOT / "quantflow"
    lengths = {
        path.relative_to(package).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in files(package)
    }
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


def test_the_product_imports_no_tests_and_no_benchmarks() -> None:
    for path in [*files(ROOT / "quantflow"), *files(ROOT / "kernels")]:
        assert not {name.split(".")[0] for name in imports_of(path)} & {
            "tests",
            "benchmarks",
            "pytest",
            "hypothesis",
        }, path


def test_kernels_import_torch_and_triton_only() -> None:
    # `kernels` would be taken for the Hugging Face package
    assert not (ROOT / "kernels" / "__init__.py").exists()
    allowed = {"torch", "triton", "quantflow_kernels", *sys.stdlib_module_names}
    for path in files(ROOT / "kernels"):
        used = {name.split(".")[0] for name in imports_of(path, ROOT / "kernels")}
        assert used <= allowed, f"{path} imports {used - allowed}"


def test_who_imports_the_kernels() -> None:
    """Of the engine, its ops alone; the mathematics and the decoder take what is compiled for
    solving and calibration."""
    compiled = {
        f"quantflow_kernels.{name}"
        for name in ("cpu_causal", "cpu_kernels", "cpu_library", "cpu_solver", "solver")
    }
    for path in files(ROOT / "quantflow"):
        module = module_name(path)
        used = {name for name in imports_of(path) if name.partition(".")[0] == "quantflow_kernels"}
        if not used or module == "quantflow.engine.ops":
            continue
        # `from quantflow_kernels import a` gives both
        of_modules = {name for name in used if name != "quantflow_kernels"}
        assert package_of(module) in ("quant", "decoder") and of_modules, module
        assert all(
            any(name == own or name.startswith(f"{own}.") for own in compiled)
            for name in of_modules
        ), module


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        (
            "quantflow.quant.awq",
            "from quantflow.stages import awq",
            {"quantflow.stages", "quantflow.stages.awq"},
        ),
        ("quantflow.quant.awq", "def f():\n    import quantflow.cli.main", {"quantflow.cli.main"}),
        (
            "quantflow.quant.awq",
            "from ..formats.awq import Awq",
            {"quantflow.formats.awq", "quantflow.formats.awq.Awq"},
        ),
        ("quantflow.quant.awq", "from quantflow import pipeline", {"quantflow.pipeline"}),
        (
            "quantflow.quant.awq",
            "from .grid import Scheme\nfrom quantflow.errors import UserError\nimport torch",
            set(),
        ),
        ("quantflow.cli.main", "from quantflow.pipeline.run import run", set()),
        ("quantflow.formats.awq", "from quantflow.models import registry", set()),
    ],
)
def test_the_check_itself(module: str, source: str, wrong: set[str]) -> None:
    assert upward(module, set(imports(ast.parse(source), module, is_package=False))) == wrong


HEAVY = ("torch", "transformers", "datasets", "accelerate", "safetensors", "numpy", "triton")


@pytest.mark.parametrize(
    "module", ["quantflow", "quantflow.errors", "quantflow.recipe", "quantflow.stages.registry"]
)
def test_importing_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_errors_need_nothing_but_the_standard_library() -> None:
    used = {name.split(".")[0] for name in imports_of(ROOT / "quantflow" / "errors.py")}
    assert used <= set(sys.stdlib_module_names)


def test_only_what_is_written_down_needs_pydantic() -> None:
    """Recipes, the settings of stages, and the protocol; what a stage computes does not."""
    users = [
        module_name(path)
        for path in files(ROOT / "quantflow")
        if any(n.startswith("pydantic") for n in imports_of(path))
    ]
    assert {package_of(module) for module in users} <= {"recipe", "serve", "stages"}
    settings = {kind.__module__ for stage in STAGES.values() for kind in stage.__mro__}
    assert {module for module in users if package_of(module) == "stages"} <= settings


def test_what_a_stage_computes_imports_without_pydantic() -> None:
    settings = {kind.__module__ for stage in STAGES.values() for kind in stage.__mro__}
    modules = [
        module_name(path)
        for folder in ("quant", "stages")
        for path in files(ROOT / "quantflow" / folder)
        if module_name(path) not in {"quantflow.stages.registry", *settings}
    ]
    code = f"import sys; sys.modules['pydantic'] = None; import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
