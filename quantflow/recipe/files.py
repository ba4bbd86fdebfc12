"""The names in a recipe that mean files: texts and the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantflow.errors import Problem
from quantflow.paths import absent
from quantflow.placeholder import no_file
from quantflow.recipe.source import Source
from quantflow.recipe.values import DATA_NAMES
from quantflow.recipe.words import Steps, did_you_mean, dotted, listing, shown
from quantflow.recipe.writer import name_of


def name_output(source: Source) -> None:
    """One recipe for several models: their artifacts must not replace each other."""
    name, model = source.data.get("name"), source.data["model"]
    if isinstance(name, str) and isinstance(model, str) and model:
        # no name of a model, which is to be said of it
        with suppress(OSError, ValueError, RuntimeError):
            source.data["output"] = f"artifacts/{name_of(Path(model), f'_{name}')}"


def locate_files(source: Source, recipe: Path) -> list[Problem]:
    """Put the path where a file is found in place of the path that the recipe gives. Returns
    problems for those found nowhere."""
    problems: list[Problem] = []
    sections: list[tuple[Steps, Any]] = [(("calibration",), source.data.get("calibration"))]
    sections += [
        (("stages", position, name), settings)
        for position, name, settings in source.stages()
        if name and source.kinds[name].reads_text
    ]
    for path, section in sections:
        if isinstance(section, dict):
            problems += _locate_data(source, path, section, recipe)
    model = source.data.get("model")
    if isinstance(model, str) and model and ("model",) not in source.origins:
        local = _locate(model, recipe)
        # if not here, the hub may have it
        source.data["model"] = model if local is None else str(local)
    return problems


def _locate_data(
    source: Source, path: Steps, section: dict[Any, Any], recipe: Path
) -> Iterator[Problem]:
    data, file = section.get("data"), section.get("file")
    example = f"`{path[-1]}: {{data: c4, file: ./c4.jsonl}}`"
    works = f"A local file works for every name: {example}"
    if isinstance(file, str) and file:
        place, local = (*path, "file"), _locate(file, recipe)
        if local is None or not local.is_file():
            problem, way_out = (
                (absent(Path(file), "file").replace("no such", "there is no such"), "")
                if local is None
                else no_file(local)
            )
            problem = problem if local is None else f"it is {problem}"
            yield Problem(
                source.place(place),
                f"`{dotted(place)}` is {shown(file)}: {problem}",
                "a text or JSON-lines file",
                way_out,
            )
        else:
            section["file"] = str(local)
    if not isinstance(data, str) or not data or data in DATA_NAMES:
        return
    place = (*path, "data")
    if isinstance(file, str):
        names = f"one of {listing(DATA_NAMES)} where `file` is given"
        yield Problem(
            source.place(place),
            f"`{dotted(place)}` is {shown(data)}",
            names,
            did_you_mean(data, DATA_NAMES),
        )
        return
    local = _locate(data, recipe)
    if local is not None and local.is_file():
        section["data"] = str(local)
        return
    problem, way_out = (
        ("neither a known data set nor a file that exists", "") if local is None else no_file(local)
    )
    hint = way_out or " ".join(text for text in (did_you_mean(data, DATA_NAMES), works) if text)
    names = f"one of {listing(DATA_NAMES)}, or the path of a local file"
    yield Problem(
        source.place(place), f"`{dotted(place)}` is {shown(data)}, {problem}", names, hint
    )


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
