"""From a YAML file and the command line to a `Recipe`, or to a `RecipeError` with every problem and
its line.

YAML is read as version 1.2 reads numbers (`1e-2` is a float, `010` is ten, `1:30` and `2024-01-01`
are texts): YAML 1.1, which PyYAML implements, surprises people there. `yes`, `no`, `on` and `off`
stay booleans, and where a text is needed the error says so.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, NoReturn, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from quantflow import bundled
from quantflow.errors import Problem, RecipeError
from quantflow.paths import absent
from quantflow.placeholder import HEAD_BYTES, no_file, placeholder
from quantflow.recipe.schema import (
    DATA_NAMES,
    STAGE_TYPES,
    Calibration,
    Override,
    Recipe,
    Weights,
    stage_name,
    stage_settings,
)
from quantflow.recipe.writer import name_of

# keys of a mapping, entries of `stages`, problems
_MOST_KEYS, _MOST_STAGES, _MOST_SHOWN = 1000, 100, 100
_MAX_BYTES = 2**18  # a recipe is a page long; more is some other file
_Path = tuple[str | int, ...]
ROUNDING = ("gptq", "rtn", "nf4")  # a recipe has one of them


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    output: str | None = None,
) -> Recipe:
    """The recipe in the YAML file at `path`, with `overrides` (`dotted.path=value`), `model` and
    `output` put over what it says.

    A stage is addressed by name (`stages.gptq.damp=0.05`), or by position from 0 where it is there
    twice (`stages.5.format=awq`). Without an `output`, the artifact goes to `artifacts/NAME`, or
    `artifacts/MODEL_NAME` where the command line gives the model; `output` is then not in the
    recipe's `model_fields_set`. Relative paths of data files, and of a model in the file, are taken
    from the current directory, else from the recipe's directory, else from the directory above
    that. Raises RecipeError with every problem found.
    """
    path = Path(path)
    source = _Source(str(path), _parse(_read(path), str(path)))
    changes = _Changes(source)
    for text in overrides:
        changes.apply(text)
    if model is not None:
        changes.set(("model",), model, f"--model {model}")
    if output is not None:
        changes.set(("output",), output, f"--output {output}")
    chosen = source.data.get("output") is not None
    if not chosen and ("model",) in source.said:
        _name_output(source)

    problems = [*changes.problems, *_locate_files(source, path), *_check_together(source)]
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(source.data)
    except ValidationError as error:
        errors = [dict(details) for details in error.errors(include_url=False)]
        problems += [
            _translate(details, source) for details in errors if not _is_misspelt(details, source)
        ]
    if problems or recipe is None:
        more = len(problems) - _MOST_SHOWN
        shown = sorted(problems, key=_by_line)[:_MOST_SHOWN]
        raise RecipeError(
            shown + ([Problem(str(path), f"{more} more problems")] if more > 0 else [])
        )
    if not chosen:
        recipe.model_fields_set.discard("output")
    return recipe


# The file


def _read(path: Path) -> str:
    """The text of the file. RecipeError if there is none."""
    where = str(path)
    try:
        if path.is_dir():
            inside = sorted(p.name for p in path.iterdir() if p.suffix in (".yaml", ".yml"))
            hint = f"It holds {_listing(inside)}" if inside else "Give the YAML file itself"
            raise RecipeError(Problem(where, "is a directory", "a recipe, one YAML file", hint))
        if not path.exists():
            near = (
                [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
                if path.parent.is_dir()
                else []
            )
            hint = _did_you_mean(path.name, near)
            if not hint and path.parent in (Path(), Path("recipes")):
                hint = (
                    _did_you_mean(path.stem, bundled.recipes())
                    or f"Bundled: {_listing(bundled.recipes())}"
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
            raw = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise RecipeError(
            Problem(where, f"cannot be read ({error})", "a recipe, one YAML file")
        ) from None
    if len(raw) > _MAX_BYTES:
        raise RecipeError(
            Problem(where, f"is larger than {_MAX_BYTES} bytes", "a recipe, a short YAML file")
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
        if len(node.value) > _MOST_KEYS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a mapping of more than {_MOST_KEYS} keys", node.start_mark
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


def _parse(text: str, where: str) -> tuple[yaml.Node | None, Any]:
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
        found = ", ".join(t for t in (error.problem, error.context) if t)
        raise RecipeError(
            Problem(
                where + line, f"cannot be read as YAML: {found}", hint=_yaml_hint(found, text, mark)
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


def _yaml_hint(found: str, text: str, mark: yaml.Mark | None) -> str:
    lines = text.splitlines()
    if r"'\t'" in found or (mark and mark.line < len(lines) and "\t" in lines[mark.line]):
        return "YAML allows no tabs in the indentation; use spaces"
    if "'@'" in found or "'`'" in found or "'%'" in found or "alias" in found or "'*'" in found:
        return 'Quote a text that begins with a special character, as in "*.down_proj"'
    if "constructor" in found:
        return "A recipe takes plain values only, no tags"
    if "mapping values are not allowed" in found:
        return 'Look for a missing comma or indentation, or quote a text that contains ": "'
    if "expected a single document" in found:
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


class _Source:
    """What the file and the command line say together, and where each value was said."""

    def __init__(self, where: str, parsed: tuple[yaml.Node | None, Any]) -> None:
        self.where = where
        self.node, data = parsed
        if not isinstance(data, dict):
            found = (
                "is empty"
                if data is None
                else f"holds {_shown(data)} ({_kind(data)}) at the top level"
            )
            line = f"{where}:{self.node.start_mark.line + 1}" if self.node else where
            raise RecipeError(Problem(line, found, "a recipe: `name:`, `model:`, `stages:` …"))
        self.data: dict[Any, Any] = data
        self.said: dict[_Path, str] = {}  # what the command line said, by path

    def place(self, path: _Path) -> str:
        """`file:line` of the value at `path`, or of the innermost mapping or list that would hold
        it; the option if it came from one."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.said:
                return self.said[path[:length]]
        node = self.node
        line = node.start_mark.line if node else 0
        for step in path:
            inner, inner_line = _child(node, step)
            if inner is None:
                break
            node, line = inner, inner_line
        return f"{self.where}:{line + 1}"

    def text(self, path: _Path) -> str | None:
        """The value at `path` as it is written in the file, where it is a plain scalar there."""
        if any(path[: n + 1] in self.said for n in range(len(path))):
            return None
        node = self.node
        for step in path:
            node, _ = _child(node, step)
        return node.value if isinstance(node, yaml.ScalarNode) and node.style is None else None

    def stages(self) -> list[tuple[int, str | None, dict[Any, Any]]]:
        """Position, name and settings of each entry of `stages`, with a misspelt name mended; name
        None where nobody can tell."""
        entries = self.data.get("stages")
        result = []
        for position, entry in enumerate(entries if isinstance(entries, list) else []):
            name = stage_name(entry)
            if name is not None and name not in STAGE_TYPES:
                name = next(iter(get_close_matches(name, STAGE_TYPES, n=1)), None)
            elif name is None and isinstance(
                entry, dict
            ):  # settings beside their stage rather than under it
                inside = [key for key in entry if key in STAGE_TYPES]
                name = inside[0] if len(inside) == 1 else None
            settings = stage_settings(entry) if name and stage_name(entry) else {}
            result.append((position, name, settings if isinstance(settings, dict) else {}))
        return result


def _child(node: yaml.Node | None, step: str | int) -> tuple[yaml.Node | None, int]:
    """The node under `node` that `step` leads to, and its line (of the key, in a mapping)."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == str(step):
                return value, key.start_mark.line
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step], node.value[step].start_mark.line
    return None, 0


# The command line


@dataclass
class _Changes:
    """Puts what the command line says into the source's data."""

    source: _Source

    def __post_init__(self) -> None:
        self.problems: list[Problem] = []

    def set(self, path: _Path, value: Any, where: str) -> None:
        """Put `value` at `path`, making the mappings on the way."""
        holder: Any = self.source.data
        for step in path[:-1]:
            inner = _get(holder, (step,))
            # a YAML alias shares one object between two places
            holder[step] = {} if inner is None else copy(inner)
            holder = holder[step]
        holder[path[-1]] = value
        self.source.said[path] = where

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
            _, value = _parse(raw, where)
            path = self._resolve(steps, where)
        except RecipeError as error:
            self.problems += [Problem(where, p.found, p.expected, p.hint) for p in error.problems]
            return
        if path is not None:
            self.set(path, value, where)

    def _resolve(self, steps: list[str], where: str) -> _Path | None:
        """The path of keys and positions that `steps` mean. None where the recipe is broken on the
        way, which validation will say."""
        if steps[0] == "stages" and len(steps) > 1:
            position = self._stage_position(steps[1], where)
            if position is None:
                return None
            entry = self.source.data["stages"][position]
            name = stage_name(entry)
            if name is None or name not in STAGE_TYPES:
                return None
            if isinstance(entry, str) or entry[name] is None:
                self.source.data["stages"][position] = {name: {}}
            return self._walk(("stages", position, name), STAGE_TYPES[name], steps[2:], where)
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
        found = [position for position, name, _ in stages if name == step]
        if len(found) == 1:
            return found[0]
        if found:
            _fail(
                where,
                f"the recipe has {len(found)} stages `{step}`",
                "a position, " + " or ".join(f"stages.{p}" for p in found),
            )
        if step in STAGE_TYPES:
            _fail(where, f"the recipe has no stage `{step}`", f"one of its own: {_listing(names)}")
        _fail(
            where,
            f"there is no stage `{step}`",
            f"one of {_listing(names)}",
            _did_you_mean(step, names),
        )

    def _walk(
        self, path: _Path, kind: type[BaseModel], steps: list[str], where: str
    ) -> _Path | None:
        """`path` extended by `steps`, which name fields of `kind` and of what these hold."""
        value = _get(self.source.data, path)
        while steps:
            if value is not None and not isinstance(value, dict):
                return None
            name, *steps = steps
            if name not in kind.model_fields:
                _fail(where, *_unknown_key(name, kind))
            path, value, inner = (*path, name), _get(value, (name,)), _section(kind, name)
            if steps and get_origin(kind.model_fields[name].annotation) is tuple:
                if value is not None and not isinstance(value, list):
                    return None
                position, *steps = steps
                items = value or []
                if not position.isdecimal() or int(position) >= len(items):
                    _fail(
                        where,
                        f"`{_dotted(path)}` is a list of {len(items)}",
                        f"a position in it, from 0, not `{position}`",
                    )
                path, value = (*path, int(position)), items[int(position)]
            if steps and inner is None:
                _fail(
                    where, f"`{_dotted(path)}` has no settings of its own", f"{_dotted(path)}=value"
                )
            kind = inner or kind
        return path


def _get(value: Any, path: _Path) -> Any:
    """What lies at `path` in plain data, None if nothing does."""
    for step in path:
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return None
    return value


def _section(kind: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The section that a field holds, or holds a list of: Calibration for `calibration`, Override
    for `overrides`."""

    def search(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for argument in get_args(annotation):
            yield from search(argument)

    return None if field == "stages" else next(search(kind.model_fields[field].annotation), None)


def _fail(where: str, found: str, expected: str = "", hint: str = "") -> NoReturn:
    raise RecipeError(Problem(where, found, expected, hint))


# One value


_TYPES = {
    "string_type": "a text",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a mapping of keys to values",
    "finite_number": "a finite number",
}


def _translate(error: dict[str, Any], source: _Source) -> Problem:
    """The problem that an error of pydantic's stands for."""
    path: _Path = error["loc"]
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    where, dotted = source.place(path), _dotted(path)
    if kind == "missing":
        holder = _model_at(path[:-1])
        return Problem(
            where,
            f"`{dotted}` is missing",
            (holder.model_fields[str(path[-1])].description or "").rstrip("."),
        )
    if kind in ("extra_forbidden", "invalid_key"):
        return Problem(where, *_unknown_key(str(path[-1]), _model_at(path[:-1]), path[:-1]))
    if kind == "union_tag_invalid":
        name = str(context["tag"])
        return Problem(
            where,
            f"there is no stage `{name}`",
            f"one of {_listing(STAGE_TYPES)}",
            _did_you_mean(name, STAGE_TYPES),
        )
    if kind == "union_tag_not_found":
        return Problem(
            where,
            f"`{dotted}` is {_shown(value)}",
            "a stage's name, or one name with its settings",
            _entry_hint(value),
        )
    found = f"`{dotted}` is {_shown(value)}"
    hint = ""
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        written = source.text(path)
        if written is not None:
            found = f"`{dotted}` is {written}, which YAML reads as {_shown(value)} ({_kind(value)})"
            hint = f'Quote it: "{written}"'
    elif kind in _TYPES:
        found += "" if value is None else f" ({_kind(value)})"
        if kind == "tuple_type" and isinstance(value, str):
            hint = f"Write [{value[:100]}]"
    expected = _TYPES.get(kind) or error["msg"].removeprefix("Input should be ").removeprefix(
        "Value error, "
    )
    if kind == "literal_error":
        expected = f"one of {expected}" if " or " in expected else expected
        choices = re.findall(r"'([^']*)'", expected)
        if isinstance(value, str):
            hint = _did_you_mean(value, choices)
        elif (written := source.text(path)) is not None and choices:
            found = f"`{dotted}` is {written}, which YAML reads as {_shown(value)} ({_kind(value)})"
    elif kind == "string_pattern_mismatch":
        expected = "letters, digits, '.', '_' and '-', a letter or digit first"
    elif kind == "string_too_short":
        expected = "a text that is not empty"
    if (
        kind in ("int_type", "float_type")
        and isinstance(value, str)
        and re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", value.strip(), re.I)
    ):
        hint = "Remove the quotes"
    return Problem(where, found, expected, hint)


def _model_at(path: _Path) -> type[BaseModel]:
    """The section that the value at `path` should be."""
    kind: type[BaseModel] = Recipe
    steps = list(path)
    if len(steps) >= 3 and steps[0] == "stages":
        kind, steps = STAGE_TYPES[str(steps[2])], steps[3:]
    for step in steps:
        if isinstance(step, str):
            kind = _section(kind, step) or kind
    return kind


def _unknown_key(key: str, kind: type[BaseModel], path: _Path = ()) -> tuple[str, str, str]:
    """Found, expected and hint for a key that `kind` does not have."""
    under = f" under `{_dotted(path)}`" if path else ""
    fields = list(kind.model_fields)
    hint = _did_you_mean(key, fields)
    if not hint:
        homes = {
            "calibration": Calibration,
            "weights": Weights,
            **{f"stages.{n}": c for n, c in STAGE_TYPES.items()},
        }
        owners = [
            name for name, home in homes.items() if key in home.model_fields and home is not kind
        ]
        hint = (
            f"`{key}` belongs under {_listing(f'`{owner}`' for owner in owners)}" if owners else ""
        )
        if key in STAGE_TYPES and kind is Recipe:
            hint = f"`{key}` is a stage: write `- {key}` under `stages`"
    return (
        f"unknown key `{key}`{under}",
        f"one of {_listing(fields)}" if fields else "no settings",
        hint,
    )


def _is_misspelt(error: dict[str, Any], source: _Source) -> bool:
    """Whether a key seems to be missing because it is there in another spelling, which is a problem
    of its own already."""
    *holder, key = error["loc"]
    fields = _model_at(tuple(holder)).model_fields
    said = _get(source.data, tuple(holder))
    unknown = [str(k) for k in said if k not in fields] if isinstance(said, dict) else []
    return error["type"] == "missing" and any(
        get_close_matches(k, fields, n=1) == [key] for k in unknown
    )


def _entry_hint(value: Any) -> str:
    if isinstance(value, dict):
        names = [key for key in value if key in STAGE_TYPES]
        if len(names) == 1:
            return f"Indent the settings further than `{names[0]}`, or write {names[0]}: {{…}}"
        if len(names) > 1:
            return "Begin each stage with a dash of its own"
    return ""


# Values together


def _check_together(source: _Source) -> Iterator[Problem]:
    """Problems of values that are fine alone. Reads plain data, so that they are found beside those
    of single values."""
    entries = source.data.get("stages")
    if isinstance(entries, list) and len(entries) > _MOST_STAGES:
        yield Problem(
            source.place(("stages",)), f"{len(entries)} stages", f"at most {_MOST_STAGES}"
        )
        return
    stages = source.stages()
    names = [name for _, name, _ in stages]
    at = {
        name: source.place(("stages", position)) for position, name, _ in reversed(stages) if name
    }
    # an unknown stage may be the one that seems to be missing
    complete = isinstance(entries, list) and None not in names
    listed = source.place(("stages",))

    rounding = [name for name in ROUNDING if name in names]
    # A recipe may measure alone: LMDeploy's users take the KV cache's parameters of a model whose
    # weights stay as they are.
    measures = not rounding and source.data.get("weights") is None and "awq" not in names
    measures = measures and bool({"calibrate", "kv_qparams"} & set(names))
    if complete and not rounding and not measures:
        hint = (
            "awq only scales: add `- rtn` or `- gptq` after it"
            if "awq" in names
            else "Add `- rtn`, or `- gptq` with calibration data"
        )
        if "awq" not in names and "calibrate" in names:
            hint += "; a recipe that only measures has no `weights`"
        yield Problem(
            at.get("awq", listed),
            "no stage rounds the weights",
            f"exactly one of {', '.join(ROUNDING)}",
            hint,
        )
    if complete and measures and "evaluate" in names and "kv_qparams" not in names:
        yield Problem(
            at["evaluate"],
            "evaluate where nothing changes the model",
            "a stage that rounds the weights, or `- kv_qparams`",
        )
    if len(rounding) > 1:
        verb = "both" if len(rounding) == 2 else "all of"
        found = f"{verb} {' and '.join(rounding)} round the weights"
        yield Problem(max((at[n] for n in rounding), key=_line), found, "exactly one of them")
    if "nf4" in names:
        yield from _check_nf4(source, at)
    if (
        complete
        and "pack" not in names
        and not (measures and set(names) <= {"calibrate", "kv_qparams"})
    ):
        yield Problem(listed, "no stage writes a checkpoint", "at least one `- pack: {format: …}`")
    if complete and "kv_qparams" in names and "calibrate" not in names:
        yield Problem(
            at["kv_qparams"],
            "kv_qparams without calibrate",
            "`- calibrate` first, for the ranges of K and V",
        )

    needy = [name for name in ("calibrate", "awq", "gptq", "kv_qparams") if name in names]
    if needy and source.data.get("calibration") is None:
        verb = "needs" if len(needy) == 1 else "need"
        yield Problem(
            at[needy[0]],
            f"{_listing(needy)} {verb} calibration data",
            "`calibration: {data: <name or path>}`",
        )

    order = list(STAGE_TYPES)
    seen: list[str] = []
    formats: dict[Any, str] = {}
    for position, name, settings in stages:
        if name is None:
            continue
        place = source.place(("stages", position))
        later = [other for other in seen if order.index(other) > order.index(name)]
        if later and not (name in ROUNDING and set(later) <= set(ROUNDING)):
            yield Problem(place, f"{name} comes after {later[0]}", f"the order {', '.join(order)}")
        if name == "pack":
            form = settings.get("format")
            if isinstance(form, str) and form in formats:
                yield Problem(
                    place,
                    f"packs the format {form} twice",
                    f"one pack stage a format; the first is at {formats[form]}",
                )
            if isinstance(form, str):
                formats.setdefault(form, place)
        elif name in seen:
            yield Problem(
                place, f"the stage {name} is given twice", "once", f"The first is at {at[name]}"
            )
        seen.append(name)
    for position, name, settings in stages:
        if (
            name == "pack"
            and settings.get("format") == "awq"
            and settings.get("requantize") is not True
        ):
            yield from _check_awq_format(source, ("stages", position, "pack", "format"))
    yield from _check_overrides(source)


def _check_nf4(source: _Source, at: dict[str, str]) -> Iterator[Problem]:
    """NF4 has a grid of its own."""
    if "awq" in at:
        yield Problem(
            at["awq"],
            "awq with nf4",
            "awq with rtn or gptq",
            "AWQ searches its scales for a grid of integers",
        )
    weights = source.data.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    said: list[_Path] = [
        ("weights", key) for key in ("bits", "group_size", "symmetric") if key in weights
    ]
    overrides = weights.get("overrides")
    for i, override in enumerate(overrides if isinstance(overrides, list) else []):
        if isinstance(override, dict):
            said += [
                ("weights", "overrides", i, key)
                for key in ("bits", "group_size", "symmetric")
                if override.get(key) is not None
            ]
    for path in said:
        if path == ("weights", "bits") and weights.get("bits") == 4:
            continue
        yield Problem(
            source.place(path),
            f"`{_dotted(path)}` with nf4",
            "nothing: NF4 has 4 bits, blocks of 64 and a table of its own",
        )


def _check_awq_format(source: _Source, path: _Path) -> Iterator[Problem]:
    weights = source.data.get("weights", {})
    weights = weights if isinstance(weights, dict) else {}
    overrides = weights.get("overrides")
    said: list[tuple[_Path, Any]] = [(("weights", "bits"), weights.get("bits", 4))]
    for i, override in enumerate(overrides if isinstance(overrides, list) else []):
        if isinstance(override, dict):
            said.append((("weights", "overrides", i, "bits"), override.get("bits")))
    for place, bits in said:
        if bits in (2, 3, 5, 6, 7, 8) and not isinstance(bits, bool):
            hint = (
                "Pack compressed-tensors instead"
                if len(place) == 2
                else "Pack compressed-tensors instead, or use ignore: true"
            )
            found = (
                f"the format awq cannot hold {bits} bits (`{_dotted(place)}`,"
                f" {source.place(place)})"
            )
            yield Problem(source.place(path), found, "4 bits", hint)
    for position, name, settings in source.stages():
        if name == "gptq" and settings.get("act_order") == "dynamic":
            place = ("stages", position, "gptq", "act_order")
            found = f"the format awq cannot hold act_order: dynamic ({source.place(place)})"
            yield Problem(
                source.place(path),
                found,
                "act_order static or none",
                "static has its accuracy without a group index",
            )


def _check_overrides(source: _Source) -> Iterator[Problem]:
    weights = source.data.get("weights")
    overrides = weights.get("overrides") if isinstance(weights, dict) else None
    for i, override in enumerate(overrides if isinstance(overrides, list) else []):
        if not isinstance(override, dict):
            continue
        path: _Path = ("weights", "overrides", i)
        said = [key for key in ("bits", "group_size", "symmetric") if override.get(key) is not None]
        if override.get("ignore") is True and said:
            yield Problem(
                source.place(path),
                f"`{_dotted(path)}` gives {_listing(said)} to what it ignores",
                "one of the two",
            )
        if set(override) <= {"match", "ignore"} and not said and override.get("ignore") is not True:
            yield Problem(
                source.place(path),
                f"`{_dotted(path)}` changes nothing",
                f"one of {_listing(list(Override.model_fields)[1:])}",
            )


# Names that mean files


def _name_output(source: _Source) -> None:
    """One recipe for several models: their artifacts must not replace each other."""
    name, model = source.data.get("name"), source.data["model"]
    if isinstance(name, str) and isinstance(model, str) and model:
        # no name of a model, which is to be said of it
        with suppress(OSError, ValueError, RuntimeError):
            source.data["output"] = f"artifacts/{name_of(Path(model), f'_{name}')}"


def _locate_files(source: _Source, recipe: Path) -> list[Problem]:
    """Put the path where a file is found in place of the path that the recipe gives. Returns
    problems for those found nowhere."""
    problems: list[Problem] = []
    sections: list[tuple[_Path, Any]] = [(("calibration",), source.data.get("calibration"))]
    sections += [
        (("stages", position, name), settings)
        for position, name, settings in source.stages()
        if name == "evaluate"
    ]
    for path, section in sections:
        if isinstance(section, dict):
            problems += _locate_data(source, path, section, recipe)
    model = source.data.get("model")
    if isinstance(model, str) and model and ("model",) not in source.said:
        found = _locate(model, recipe)
        # if not here, the hub may have it
        source.data["model"] = model if found is None else str(found)
    return problems


def _locate_data(
    source: _Source, path: _Path, section: dict[Any, Any], recipe: Path
) -> Iterator[Problem]:
    data, file = section.get("data"), section.get("file")
    example = f"`{path[-1]}: {{data: c4, file: ./c4.jsonl}}`"
    works = f"A local file works for every name: {example}"
    if isinstance(file, str) and file:
        place, found = (*path, "file"), _locate(file, recipe)
        if found is None or not found.is_file():
            what, way_out = (
                (absent(Path(file), "file").replace("no such", "there is no such"), "")
                if found is None
                else no_file(found)
            )
            what = what if found is None else f"it is {what}"
            yield Problem(
                source.place(place),
                f"`{_dotted(place)}` is {_shown(file)}: {what}",
                "a text or JSON-lines file",
                way_out,
            )
        else:
            section["file"] = str(found)
    if not isinstance(data, str) or not data or data in DATA_NAMES:
        return
    place = (*path, "data")
    if isinstance(file, str):
        names = f"one of {_listing(DATA_NAMES)} where `file` is given"
        yield Problem(
            source.place(place),
            f"`{_dotted(place)}` is {_shown(data)}",
            names,
            _did_you_mean(data, DATA_NAMES),
        )
        return
    found = _locate(data, recipe)
    if found is not None and found.is_file():
        section["data"] = str(found)
        return
    what, way_out = (
        ("neither a known data set nor a file that exists", "") if found is None else no_file(found)
    )
    hint = way_out or " ".join(text for text in (_did_you_mean(data, DATA_NAMES), works) if text)
    names = f"one of {_listing(DATA_NAMES)}, or the path of a local file"
    yield Problem(source.place(place), f"`{_dotted(place)}` is {_shown(data)}, {what}", names, hint)


def _locate(name: str, recipe: Path) -> Path | None:
    """Where the file or directory `name` is: under the current directory, the recipe's, or the one
    above that."""
    try:
        path = Path(name).expanduser()
        here = recipe.resolve().parent
        return next((p for p in (path, here / path, here.parent / path) if p.exists()), None)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # too long for a name, a NUL in it, `~somebody` without a home
        return None


# Words


def _dotted(path: _Path) -> str:
    """`stages.gptq.damp` for `("stages", 2, "gptq", "damp")`; positions in other lists as
    `overrides[0]`."""
    if path[0] == "stages" and len(path) > 2:
        path = ("stages", *path[2:])
    return "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" for step in path
    ).removeprefix(".")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "a boolean"
    names = {int: "an integer", float: "a number", str: "a text", list: "a list", dict: "a mapping"}
    return names.get(type(value), f"a {type(value).__name__}")


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict)) and len(value) > 8:  # an alias can make it huge, or endless
        return f"{_kind(value)} of {len(value)}"
    if isinstance(value, (list, dict)):
        items = [
            _kind(v) if isinstance(v, (list, dict)) else _shown(v)
            for v in (value.values() if isinstance(value, dict) else value)
        ]
        if isinstance(value, dict):
            return (
                "{"
                + ", ".join(f"{key}: {item}" for key, item in zip(value, items, strict=True))
                + "}"
            )
        return f"[{', '.join(items)}]"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:196]}…{text[-1]}"


def _listing(names: Iterable[str]) -> str:
    return ", ".join(names)


def _did_you_mean(word: Hashable, known: Iterable[str]) -> str:
    near = get_close_matches(str(word), list(known), n=1)
    return f"Did you mean `{near[0]}`?" if near else ""


def _line(where: str) -> int:
    end = where.rsplit(":", 1)[-1]
    return int(end) if end.isdecimal() else 0


def _by_line(problem: Problem) -> tuple[bool, int]:
    """Sorts the file's problems by line, those of the command line after them."""
    return problem.where.startswith("--"), _line(problem.where)
