"""What the pages say: the reference of recipes, messages, names of files and functions, links."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from quantflow.recipe.reference import markdown
from quantflow.stages.registry import STAGES
from tests.helpers.pages import ROOT, anchors, every_page, links, name_of, pages, quoted_messages
from tests.helpers.runs import invoke


def test_the_reference_of_recipes_is_what_the_schema_says() -> None:
    shown = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert shown == markdown(STAGES) + "\n", "run: quantflow schema --markdown > docs/recipe.md"
    printed = invoke("schema", "--markdown")
    assert printed.exit_code == 0 and printed.stdout == shown
    for kind in STAGES.values():
        assert kind.example in shown and all(f"| `{key}` |" in shown for key in kind.model_fields)


def source_texts() -> list[str]:
    """Every text in QuantFlow's code, f-strings with … for what is put in, one string a literal."""
    found = []
    modules = [path for top in ("quantflow", "kernels") for path in (ROOT / top).rglob("*.py")]
    for path in [*modules, ROOT / "quantflow_llm.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        part.value if isinstance(part, ast.Constant) else "…"
                        for part in node.values
                    )
                )
    return found


def test_quoted_messages_are_ours() -> None:
    texts, quoted = source_texts(), quoted_messages()
    assert (
        len(quoted) == sum(page.read_text(encoding="utf-8").count("\n> ") for page in pages()) > 0
    )
    for page, message in quoted:
        parts = [re.escape(part) for part in message.split("…")]
        pattern = re.compile(".*".join(parts))
        assert any(pattern.search(text) for text in texts), f"{page}: {message}"


FILE = r"(?:quantflow|kernels|tests|recipes|benchmarks|calib_data|docs)(?:/[\w.-]+)+"


@pytest.mark.parametrize("page", every_page(), ids=name_of)
def test_named_files_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for name in re.findall(rf"`({FILE})`", text):
        assert "…" in name or (ROOT / name).exists() or "<" in name, f"{name_of(page)} names {name}"


def definitions(path: Path) -> set[str]:
    """Functions, classes, their methods (`Class.method`, and `method`), and names at the top of a
    module."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [
                part.name
                for part in node.body
                if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            found |= {*methods, *(f"{node.name}.{method}" for method in methods)}
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def items(page: str) -> list[str]:
    """Numbered points and rows of tables: what stands in one belongs together."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    return [
        found
        for found in re.split(r"^(?=\d+\. |\|)|\n\n", text, flags=re.M)
        if re.match(r"\d+\. |\|", found)
    ]


@pytest.mark.parametrize("page", ["docs/how_it_works.md", "docs/extending.md"])
def test_named_functions_and_classes_are_in_a_file_named_beside_them(page: str) -> None:
    for item in items(page):
        files = [ROOT / name for name in re.findall(rf"`({FILE}\.py)`", item)]
        known = set().union(*(definitions(path) for path in files)) if files else set()
        for name in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)(?:\(\))?`", item):
            if files and not re.fullmatch(
                r"[a-z]\w{0,2}|native_config|read_config|run|encode|check", name
            ):
                assert name in known | ARGUABLE, (
                    f"{page}: {name} is not in {[path.name for path in files]}"
                )


def test_every_step_of_how_it_works_names_what_to_read() -> None:
    """A file and something in it; and every folder of the package, and every file of those that run
    things, is somewhere on the page."""
    page = "docs/how_it_works.md"
    text = (ROOT / page).read_text(encoding="utf-8")
    steps = [item for item in items(page) if re.match(r"\d+\. ", item)]
    for step in steps:
        known = set().union(
            *(definitions(ROOT / name) for name in re.findall(rf"`({FILE}\.py)`", step))
        )
        assert known & set(re.findall(r"`([A-Za-z_][\w.]*)(?:\(\))?`", step)), step
    assert [int(step.partition(".")[0]) for step in steps] == [*range(1, 11), *range(1, 10)]
    modules = [path for path in (ROOT / "quantflow").rglob("*.py") if path.name != "__init__.py"]
    for folder in {path.parent for path in modules} - {ROOT / "quantflow"}:
        assert f"| `{folder.relative_to(ROOT)}` |" in text
    for path in modules:
        if path.parent.name in ("pipeline", "evaluate", "report"):
            assert f"`{path.relative_to(ROOT)}`" in text, (
                f"{page} does not say where {path.relative_to(ROOT)} comes in"
            )


ARGUABLE = {"BAICHUAN", *STAGES}
"""Names in points of these pages that are the reader's own, or stages."""


def test_links_lead_somewhere() -> None:
    for page, target in links():
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{name_of(page)} links to {target}"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{name_of(page)} links to {target}"


def test_the_index_has_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page, target in links()
        if page == index
    }
    assert {page for page in every_page() if page.parent != ROOT} - {index} <= linked
