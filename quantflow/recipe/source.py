"""What a recipe says, and where it says it."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import yaml

from quantflow.errors import Problem, RecipeError
from quantflow.recipe.stage import Stages, stage_name, stage_settings
from quantflow.recipe.words import Steps, kind_of, shown


class Source:
    """What the file and the command line say together, and where each value comes from. kinds: the
    stages that a recipe may have."""

    def __init__(self, where: str, parsed: tuple[yaml.Node | None, Any], kinds: Stages) -> None:
        self.where = where
        self.kinds = kinds
        self.node, data = parsed
        if not isinstance(data, dict):
            holds = f"holds {shown(data)} ({kind_of(data)}) at the top level"
            line = f"{where}:{self.node.start_mark.line + 1}" if self.node else where
            problem = "is empty" if data is None else holds
            raise RecipeError(Problem(line, problem, "a recipe: `name:`, `model:`, `stages:` …"))
        self.data: dict[Any, Any] = data
        self.origins: dict[Steps, str] = {}  # where on the command line, by path

    def place(self, path: Steps) -> str:
        """`file:line` of the value at `path`, or of the innermost mapping or list that would hold
        it; the option if it came from one. What is no file has no lines."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        node = self.node
        if node is None:
            return self.where
        line = node.start_mark.line
        for step in path:
            inner, inner_line = child(node, step)
            if inner is None:
                break
            node, line = inner, inner_line
        return f"{self.where}:{line + 1}"

    def text(self, path: Steps) -> str | None:
        """The value at `path` as it is written in the file, where it is a plain scalar there."""
        if any(path[: n + 1] in self.origins for n in range(len(path))):
            return None
        node = self.node
        for step in path:
            node, _ = child(node, step)
        return node.value if isinstance(node, yaml.ScalarNode) and node.style is None else None

    def stages(self) -> list[tuple[int, str | None, dict[Any, Any]]]:
        """Position, name and settings of each entry of `stages`, with a misspelt name mended; name
        None where nobody can tell."""
        entries = self.data.get("stages")
        result = []
        for position, entry in enumerate(entries if isinstance(entries, list) else []):
            name = stage_name(entry)
            if name is not None and name not in self.kinds:
                name = next(iter(get_close_matches(name, self.kinds, n=1)), None)
            elif name is None and isinstance(entry, dict):
                # settings beside their stage rather than under it
                inside = [key for key in entry if key in self.kinds]
                name = inside[0] if len(inside) == 1 else None
            settings = stage_settings(entry) if name and stage_name(entry) else {}
            result.append((position, name, settings if isinstance(settings, dict) else {}))
        return result


def child(node: yaml.Node | None, step: str | int) -> tuple[yaml.Node | None, int]:
    """The node under `node` that `step` leads to, and its line (of the key, in a mapping)."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == str(step):
                return value, key.start_mark.line
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step], node.value[step].start_mark.line
    return None, 0
