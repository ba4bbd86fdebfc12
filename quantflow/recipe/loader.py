"""From a YAML file and the command line to a `Recipe`, or to a `RecipeError` with every problem and
its line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantflow.errors import Problem, RecipeError
from quantflow.recipe.changes import Changes
from quantflow.recipe.checks import check_together
from quantflow.recipe.files import locate_files, name_output
from quantflow.recipe.schema import Recipe, read_recipe
from quantflow.recipe.source import Source
from quantflow.recipe.stage import Stages
from quantflow.recipe.translate import is_misspelt, translate
from quantflow.recipe.words import by_line
from quantflow.recipe.written import Written
from quantflow.recipe.yaml_text import parse, read

_MOST_SHOWN = 100  # problems


def load(
    recipe: str | Path | Mapping[str, Any],
    kinds: Stages,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    output: str | None = None,
) -> Recipe:
    """The recipe in a YAML file, or in what one would hold, of stages of these `kinds`, with
    `overrides` (`dotted.path=value`), `model` and `output` put over what it says.

    A stage is addressed by name (`stages.gptq.damp=0.05`), or by position from 0 where it is there
    twice (`stages.5.format=awq`). Without an `output`, the artifact goes to `artifacts/NAME`, or
    `artifacts/MODEL_NAME` where the command line gives the model; `output` is then not in the
    recipe's `model_fields_set`. Relative paths of data files, and of a model in the file, are taken
    from the current directory, else from the recipe's directory, else from the directory above
    that. Raises RecipeError with every problem found.
    """
    if isinstance(recipe, Mapping):
        path = Path("recipe")
        source = Source(str(path), (None, deepcopy(dict(recipe))), kinds)
    else:
        path = Path(recipe)
        source = Source(str(path), parse(read(path), str(path)), kinds)
    changes = Changes(source)
    for text in overrides:
        changes.apply(text)
    if model is not None:
        changes.set(("model",), model, f"--model {model}")
    if output is not None:
        changes.set(("output",), output, f"--output {output}")
    chosen = source.data.get("output") is not None
    if not chosen and ("model",) in source.origins:
        name_output(source)

    problems = [*changes.problems, *locate_files(source, path), *check_together(Written(source))]
    result: Recipe | None = None
    try:
        result = read_recipe(source.data, kinds)
    except ValidationError as error:
        errors = [dict(details) for details in error.errors(include_url=False)]
        problems += [
            translate(details, source) for details in errors if not is_misspelt(details, source)
        ]
    if problems or result is None:
        more = len(problems) - _MOST_SHOWN
        shown = sorted(problems, key=by_line)[:_MOST_SHOWN]
        raise RecipeError(
            shown + ([Problem(str(path), f"{more} more problems")] if more > 0 else [])
        )
    if not chosen:
        result.model_fields_set.discard("output")
    return result
