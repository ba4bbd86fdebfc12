"""What every stage of a recipe is: settings, and what the loader and the reference ask of them.

The stages themselves lie above (`quantflow/stages/`), and their registry is handed to whatever here
needs one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantflow.errors import Problem
from quantflow.recipe.values import Section

if TYPE_CHECKING:
    from quantflow.recipe.written import Entry, Written


class Stage(Section):
    """One step of a recipe. Its fields are what a recipe may say under its name, its docstring what
    the reference says of it."""

    name: ClassVar[str]
    # an entry of `stages` for the reference; of the sections that its settings hold, by their keys
    example: ClassVar[str]
    examples: ClassVar[Mapping[str, str]] = {}
    # What it does, for the checks that look at a recipe as a whole.
    rounds: ClassVar[bool] = False  # the weights: a recipe has one such stage
    trains: ClassVar[bool] = False  # so that it may follow one that rounds
    measures: ClassVar[bool] = False  # the model as it is: it needs no stage that rounds
    writes: ClassVar[bool] = False  # a checkpoint: a recipe may have several such stages
    alters: ClassVar[bool] = False  # what the model computes
    unrounded: ClassVar[str] = ""  # what to do where nothing rounds, of one that only prepares it
    needs_calibration: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False  # which `data`, `file` and `field` name

    @classmethod
    def check(cls, recipe: Written, entry: Entry) -> Iterator[Problem]:
        """What cannot stand together with this `entry` of the recipe, as far as the file alone says
        so. Asked of the first entry of a name, and of each that may stand there several times."""
        yield from ()


Stages = Mapping[str, type[Stage]]  # by name, in the order in which a recipe may have them


def stage_name(value: Any) -> str | None:
    """The name that an entry of `stages` gives: `gptq` for `gptq`, `{gptq: …}` or a Gptq. None for
    what is no entry."""
    if isinstance(value, dict) and len(value) == 1:
        value = next(iter(value))
    if isinstance(value, str):
        return value
    return value.name if isinstance(value, Stage) else None


def stage_settings(value: Any) -> Any:
    """The settings in an entry of `stages`: an empty mapping for a bare name or `- gptq:`."""
    if isinstance(value, str):
        return {}
    if isinstance(value, dict):
        settings = next(iter(value.values()))
        return {} if settings is None else settings
    return value
