"""What the command line changes in a recipe: `--set dotted.path=value`, `--model`, `--output`."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Any, NoReturn, get_origin

from pydantic import BaseModel

from quantflow.errors import Problem, RecipeError
from quantflow.recipe.schema import Recipe
from quantflow.recipe.sections import section, unknown_key, value_at
from quantflow.recipe.source import Source
from quantflow.recipe.stage import stage_name
from quantflow.recipe.words import Steps, did_you_mean, dotted, listing
from quantflow.recipe.yaml_text import parse


@dataclass
class Changes:
    """Puts what the command line says into the source's data."""

    source: Source
    problems: list[Problem] = field(default_factory=list)

    def set(self, path: Steps, value: Any, where: str) -> None:
        """Put `value` at `path`, making the mappings on the way."""
        holder: Any = self.source.data
        for step in path[:-1]:
            inner = value_at(holder, (step,))
            # a YAML alias shares one object between two places
            holder[step] = {} if inner is None else copy(inner)
            holder = holder[step]
        holder[path[-1]] = value
        self.source.origins[path] = where

    def apply(self, text: str) -> None:
        """Do what `dotted.path=value` says, or note the problem."""
        where = f"--set {text}"
        dotted, equals, raw = text.partition("=")
        steps = [step.strip() for step in dotted.split(".")]
        if not equals or not all(steps):
            self.problems.append(
                Problem(
                    where,
                    "is not an assignment",
                    "dotted.path=value, such as stages.gptq.damp=0.05",
                )
            )
            return
        try:
            _, value = parse(raw, where)
            path = self._resolve(steps, where)
        except RecipeError as error:
            self.problems += [Problem(where, p.found, p.expected, p.hint) for p in error.problems]
            return
        if path is not None:
            self.set(path, value, where)

    def _resolve(self, steps: list[str], where: str) -> Steps | None:
        """The path of keys and positions that `steps` mean. None where the recipe is broken on the
        way, which validation will say."""
        if steps[0] == "stages" and len(steps) > 1:
            position = self._stage_position(steps[1], where)
            if position is None:
                return None
            entry = self.source.data["stages"][position]
            name = stage_name(entry)
            if name is None or name not in self.source.kinds:
                return None
            if isinstance(entry, str) or entry[name] is None:
                self.source.data["stages"][position] = {name: {}}
            return self._walk(("stages", position, name), self.source.kinds[name], steps[2:], where)
        return self._walk((), Recipe, steps, where)

    def _stage_position(self, step: str, where: str) -> int | None:
        stages = self.source.stages()
        names = [name for _, name, _ in stages if name]
        if not stages:
            return None
        if step.isdecimal():
            if int(step) < len(stages):
                return int(step)
            _fail(where, f"there is no stage {step}", f"a position from 0 to {len(stages) - 1}")
        positions = [position for position, name, _ in stages if name == step]
        if len(positions) == 1:
            return positions[0]
        if positions:
            _fail(
                where,
                f"the recipe has {len(positions)} stages `{step}`",
                "a position, " + " or ".join(f"stages.{p}" for p in positions),
            )
        if step in self.source.kinds:
            _fail(where, f"the recipe has no stage `{step}`", f"one of its own: {listing(names)}")
        _fail(
            where,
            f"there is no stage `{step}`",
            f"one of {listing(names)}",
            did_you_mean(step, names),
        )

    def _walk(
        self, path: Steps, kind: type[BaseModel], steps: list[str], where: str
    ) -> Steps | None:
        """`path` extended by `steps`, which name fields of `kind` and of what these hold."""
        value = value_at(self.source.data, path)
        while steps:
            if value is not None and not isinstance(value, dict):
                return None
            name, *steps = steps
            if name not in kind.model_fields:
                _fail(where, *unknown_key(name, kind, self.source.kinds))
            path, value, inner = (*path, name), value_at(value, (name,)), section(kind, name)
            if steps and get_origin(kind.model_fields[name].annotation) is tuple:
                if value is not None and not isinstance(value, list):
                    return None
                position, *steps = steps
                items = value or []
                if not position.isdecimal() or int(position) >= len(items):
                    _fail(
                        where,
                        f"`{dotted(path)}` is a list of {len(items)}",
                        f"a position in it, from 0, not `{position}`",
                    )
                path, value = (*path, int(position)), items[int(position)]
            if steps and inner is None:
                _fail(
                    where, f"`{dotted(path)}` has no settings of its own", f"{dotted(path)}=value"
                )
            kind = inner or kind
        return path


def _fail(where: str, problem: str, expected: str = "", hint: str = "") -> NoReturn:
    raise RecipeError(Problem(where, problem, expected, hint))
