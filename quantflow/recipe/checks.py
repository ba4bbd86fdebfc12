"""What is wrong with values that are fine alone: of the recipe as a whole here, of one stage among
the others in its own file (`Stage.check`)."""

from __future__ import annotations

from collections.abc import Iterator

from quantflow.errors import Problem
from quantflow.recipe.schema import Override
from quantflow.recipe.stage import Stages
from quantflow.recipe.words import dotted, line, listing
from quantflow.recipe.written import Entry, Written

_MOST_STAGES = 100
GRID = ("bits", "group_size", "symmetric")  # what `weights` and its overrides say of numbers


def check_together(recipe: Written) -> Iterator[Problem]:
    """Problems of values together. Reads plain data, so that they are found beside those of single
    values."""
    source, entries = recipe.source, recipe.source.data.get("stages")
    if isinstance(entries, list) and len(entries) > _MOST_STAGES:
        yield Problem(
            source.place(("stages",)), f"{len(entries)} stages", f"at most {_MOST_STAGES}"
        )
        return
    yield from _check_rounding(recipe)
    measuring = recipe.only_measures and recipe.names == [
        name for name in recipe.names if source.kinds[name].measures
    ]
    if recipe.complete and not recipe.having("writes") and not measuring:
        yield Problem(
            source.place(("stages",)),
            "no stage writes a checkpoint",
            "at least one `- pack: {format: …}`",
        )
    needy = recipe.having("needs_calibration")
    if needy and source.data.get("calibration") is None:
        verb = "needs" if len(needy) == 1 else "need"
        yield Problem(
            recipe.at(needy[0]),
            f"{listing(needy)} {verb} calibration data",
            "`calibration: {data: <name or path>}`",
        )
    yield from _check_order(recipe, source.kinds)
    for position, entry in enumerate(recipe.entries):
        stage = source.kinds[entry.name]
        if stage.writes or entry.name not in recipe.names[:position]:
            yield from stage.check(recipe, entry)
    yield from _check_overrides(recipe)


def _check_rounding(recipe: Written) -> Iterator[Problem]:
    """A recipe has one stage that rounds the weights, or measures alone."""
    kinds, rounding = recipe.source.kinds, recipe.having("rounds")
    if recipe.complete and not rounding and not recipe.only_measures:
        preparing = recipe.having("unrounded")
        if preparing:
            place, hint = recipe.at(preparing[0]), kinds[preparing[0]].unrounded
        else:
            place = recipe.source.place(("stages",))
            hint = "Add `- rtn`, or `- gptq` with calibration data"
            if recipe.having("measures"):
                hint += "; a recipe that only measures has no `weights`"
        every = listing(name for name, stage in kinds.items() if stage.rounds)
        yield Problem(place, "no stage rounds the weights", f"exactly one of {every}", hint)
    written = sorted(rounding, key=recipe.names.index)
    if [kinds[name].trains for name in written] == [False, True]:  # it begins from the other's
        return
    if len(rounding) > 1:
        verb = "both" if len(rounding) == 2 else "all of"
        problem = f"{verb} {' and '.join(rounding)} round the weights"
        place = max((recipe.at(name) for name in rounding), key=line)
        yield Problem(place, problem, "exactly one of them")


def _check_order(recipe: Written, kinds: Stages) -> Iterator[Problem]:
    """Stages come in the registry's order, each once if it may not stand there several times."""
    order = list(kinds)
    seen: list[Entry] = []
    for entry in recipe.entries:
        stage = kinds[entry.name]
        later = [e.name for e in seen if order.index(e.name) > order.index(entry.name)]
        if later and not (stage.rounds and all(kinds[name].rounds for name in later)):
            yield Problem(
                entry.place, f"{entry.name} comes after {later[0]}", f"the order {listing(order)}"
            )
        first = next((e for e in seen if e.name == entry.name), None)
        if first and not stage.writes:
            yield Problem(
                entry.place,
                f"the stage {entry.name} is given twice",
                "once",
                f"The first is at {first.place}",
            )
        seen.append(entry)


def _check_overrides(recipe: Written) -> Iterator[Problem]:
    for position, override in recipe.overrides():
        steps = ("weights", "overrides", position)
        place, name = recipe.source.place(steps), dotted(steps)
        named = [key for key in GRID if override.get(key) is not None]
        if override.get("ignore") is True and named:
            yield Problem(
                place, f"`{name}` gives {listing(named)} to what it ignores", "one of the two"
            )
        nothing = not named and override.get("ignore") is not True
        if set(override) <= {"match", "ignore"} and nothing:
            settings = listing(list(Override.model_fields)[1:])
            yield Problem(place, f"`{name}` changes nothing", f"one of {settings}")
