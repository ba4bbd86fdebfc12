"""A recipe's file, and its YAML as a tree of nodes and as plain data.

YAML is read as version 1.2 reads numbers (`1e-2` is a float, `010` is ten, `1:30` and `2024-01-01`
are texts): YAML 1.1, which PyYAML implements, surprises people there. `yes`, `no`, `on` and `off`
stay booleans, and where a text is needed the error says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import yaml

from quantflow import bundled
from quantflow.errors import Problem, RecipeError
from quantflow.paths import absent
from quantflow.placeholder import HEAD_BYTES, placeholder
from quantflow.recipe.words import did_you_mean, listing

MOST_KEYS = 1000  # of a mapping
MAX_BYTES = 2**18  # a recipe is a page long; more is some other file


def read(path: Path) -> str:
    """The text of the file. RecipeError if there is none."""
    where = str(path)
    try:
        if path.is_dir():
            inside = sorted(p.name for p in path.iterdir() if p.suffix in (".yaml", ".yml"))
            hint = f"It holds {listing(inside)}" if inside else "Give the YAML file itself"
            raise RecipeError(Problem(where, "is a directory", "a recipe, one YAML file", hint))
        if not path.exists():
            near = (
                [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
                if path.parent.is_dir()
                else []
            )
            hint = did_you_mean(path.name, near)
            if not hint and path.parent in (Path(), Path("recipes")):
                hint = (
                    did_you_mean(path.stem, bundled.recipes())
                    or f"Bundled: {listing(bundled.recipes())}"
                )
            raise RecipeError(
                Problem(
                    where,
                    absent(path, "file").replace("no such", "there is no such"),
                    "a recipe, one YAML file",
                    hint,
                )
            )
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise RecipeError(
            Problem(where, f"cannot be read ({error})", "a recipe, one YAML file")
        ) from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(
            Problem(where, f"is larger than {MAX_BYTES} bytes", "a recipe, a short YAML file")
        )
    if raw and (problem := placeholder(path, raw[:HEAD_BYTES])):
        raise RecipeError(problem)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            Problem(f"{where}:{line}", "is not UTF-8 text", "a recipe, one YAML file")
        ) from None
    if "\0" in text:
        raise RecipeError(Problem(where, "is a binary file", "a recipe, one YAML file"))
    return text


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2, and of its tags only those of plain
    values."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rsplit(":", 1)[1] in ("null", "bool", "float", "str", "seq", "map")
    }

    yaml_implicit_resolvers = {  # noqa: RUF012  (an instance variable to the stubs)
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.rsplit(":", 1)[1] not in ("int", "float", "timestamp", "value")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """With merge keys (`<<`) followed, of which thirty lines can double a mapping thirty
        times."""
        super().flatten_mapping(node)
        if len(node.value) > MOST_KEYS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a mapping of more than {MOST_KEYS} keys", node.start_mark
            )

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 16 if "0x" in text else 8 if "0o" in text else 10)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?[0-9]+(?:_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?(?:[0-9]+(?:_[0-9]+)*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?
                    |[-+]?[0-9]+[eE][-+]?[0-9]+
                    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def parse(text: str, where: str) -> tuple[yaml.Node | None, Any]:
    """The YAML node tree of one document, and its plain data. RecipeError for what is no YAML, or
    says a key twice."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            repeated = list(_repeated_keys(node, where))
            if repeated:
                raise RecipeError(repeated)
            return node, None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = ", ".join(t for t in (error.problem, error.context) if t)
        raise RecipeError(
            Problem(
                where + line,
                f"cannot be read as YAML: {problem}",
                hint=_yaml_hint(problem, text, mark),
            )
        ) from None
    except yaml.reader.ReaderError as error:
        line = f":{text.count(chr(10), 0, error.position) + 1}"
        raise RecipeError(
            Problem(
                where + line,
                f"cannot be read as YAML: {error.reason}",
                "text without control characters",
            )
        ) from None
    except RecursionError:
        raise RecipeError(
            Problem(where, "is nested too deeply", "a recipe, a few levels deep")
        ) from None
    except (
        ValueError,
        LookupError,
    ) as error:  # a number of thousands of digits, a word tagged as !!int or !!bool
        raise RecipeError(Problem(where, f"cannot be read as YAML: {error}")) from None


def _yaml_hint(problem: str, text: str, mark: yaml.Mark | None) -> str:
    lines = text.splitlines()
    if r"'\t'" in problem or (mark and mark.line < len(lines) and "\t" in lines[mark.line]):
        return "YAML allows no tabs in the indentation; use spaces"
    if (
        "'@'" in problem
        or "'`'" in problem
        or "'%'" in problem
        or "alias" in problem
        or "'*'" in problem
    ):
        return 'Quote a text that begins with a special character, as in "*.down_proj"'
    if "constructor" in problem:
        return "A recipe takes plain values only, no tags"
    if "mapping values are not allowed" in problem:
        return 'Look for a missing comma or indentation, or quote a text that contains ": "'
    if "expected a single document" in problem:
        return "One file holds one recipe: remove the `---`"
    return ""


def _repeated_keys(node: yaml.Node | None, where: str) -> Iterator[Problem]:
    seen: set[int] = set()  # an alias may lead into a loop
    todo = [node]
    while todo:
        node = todo.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        if isinstance(node, yaml.MappingNode):
            first: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                todo += [key, value]
                if isinstance(key, yaml.ScalarNode):
                    line = key.start_mark.line + 1
                    if (key.tag, key.value) in first:
                        earlier = first[key.tag, key.value]
                        yield Problem(
                            f"{where}:{line}",
                            f"the key `{key.value}` is given twice, first on line {earlier}",
                            "one of them",
                        )
                    first.setdefault((key.tag, key.value), line)
