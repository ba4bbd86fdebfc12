"""What keeps a checkpoint's tensors from being read: missing, misshapen, unknown and doubled
ones."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from quantflow.errors import Problem
from quantflow.models.prefixes import foreign

if TYPE_CHECKING:
    from quantflow.checkpoints.checkpoint import Checkpoint

FLOATS = ("F32", "F16", "BF16")
_EACH = 16  # names that are listed one by one


def tensor_problems(checkpoint: Checkpoint, packed: Callable[[str], bool]) -> list[Problem]:
    """packed: whether a name is that of a quantised weight or of a tensor that it is packed into,
    which are for others to check."""
    container, architecture, path = checkpoint.container, checkpoint.architecture, checkpoint.path
    if problem := foreign(container.tensors, architecture, path):
        return [problem]
    expected = {n: s for n, s in checkpoint.expected.items() if not packed(n)}
    beside = architecture.library.beside if architecture.library else {}
    there = _beside(checkpoint)
    problems = list(_unfit(checkpoint, expected)) + list(_misshapen(checkpoint, there, beside))
    missing = [native for native in expected if native not in checkpoint.sources]
    if library := architecture.library:
        missing += [library.names.stored(held) for held in beside if held not in there]
    if missing:
        hint = "Is a shard missing, or config.json another model's?"
        if missing == [f"{architecture.head}.weight"]:
            hint = (
                "Save the class with a head, such as AutoModelForCausalLM's; or is it tied, and"
                " tie_word_embeddings should say so?"
            )
        problems.append(Problem(str(path), f"missing tensors: {listed(missing)}", hint=hint))
    for twice, first, second in checkpoint.twice:
        both = f"both {first} and {second}, for {twice}"
        problems.append(Problem(str(path), both, "one of them", "Which is meant? Remove the other"))
    # Tensors that nobody would read.
    unknown = [
        native
        for native in checkpoint.sources
        if native not in checkpoint.expected
        and native not in checkpoint.copied
        and not packed(native)
    ]
    if unknown:
        problems.append(
            Problem(
                str(path),
                f"tensors that {architecture.name} does not have: {listed(unknown)}",
                hint="They would be lost; is model_type right?",
            )
        )
    # a fused tensor that is wrong is so for each of its parts
    return list(dict.fromkeys(problems))


def _unfit(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> Iterator[Problem]:
    """Tensors that are there, of another shape or in other numbers than is expected."""
    for native, shape in expected.items():
        source = checkpoint.sources.get(native)
        if source is None:
            continue
        where = f"{checkpoint.path} tensor {source.name}"
        info = checkpoint.container.tensors[source.name]
        try:
            stored = source.shape_of(info.shape)
        except ValueError as error:
            yield Problem(where, str(error), hint="config.json and weights disagree")
            continue
        if stored != shape:
            yield Problem(
                where,
                f"shape {list(stored)}",
                f"{list(shape)} by config.json",
                "config.json and weights disagree",
            )
        if info.dtype not in FLOATS:
            yield Problem(where, f"dtype {info.dtype}", ", ".join(FLOATS))


def _beside(checkpoint: Checkpoint) -> dict[str, str]:
    """Name in the class -> in the checkpoint of what is not the language model's; of a tensor that
    the class cuts, for each part."""
    library = checkpoint.architecture.library
    if library is None or not library.beside:
        return {}
    return {held: name for name in checkpoint.copied for held in library.names.loaded(name)}


def _misshapen(
    checkpoint: Checkpoint, there: Mapping[str, str], beside: Mapping[str, tuple[int, ...]]
) -> Iterator[Problem]:
    """What the class would not take as it is. One that it arranges anew is left to it."""
    times = Counter(there.values())
    for held, shape in beside.items():
        name = there.get(held)
        if name is None or times[name] > 1:
            continue
        stored = checkpoint.shape_of(name)
        if math.prod(stored) != math.prod(shape):
            where = f"{checkpoint.path} tensor {name}"
            hint = "config.json and weights disagree"
            yield Problem(where, f"shape {list(stored)}", f"{list(shape)} by config.json", hint)


def listed(names: Iterable[str]) -> str:
    """All of them; of many, those that differ in one number as one, with its range:
    `model.layers.[0-3].mlp.up_proj.weight`."""
    split = [tuple(re.split(r"(?<=\.)(\d+)(?=\.)", name)) for name in names]
    if len(split) > _EACH:
        # Odd places are numbers: the last one folds first, so that experts go before layers.
        for place in range(max(len(parts) for parts in split) // 2 * 2 - 1, 0, -2):
            split = _folded(split, place)
    return ", ".join("".join(parts) for parts in split)


def _folded(split: list[tuple[str, ...]], place: int) -> list[tuple[str, ...]]:
    """Names that differ at `place` alone as one."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for parts in split:
        rest = (*parts[:place], "", *parts[place + 1 :]) if place < len(parts) else parts
        alike.setdefault(rest, []).extend(parts[place : place + 1])
    return [
        (*rest[:place], _ranges(numbers), *rest[place + 1 :]) if numbers else rest
        for rest, numbers in alike.items()
    ]


def _ranges(numbers: list[str]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return f"[{','.join(str(r[0]) if len(r) == 1 else f'{r[0]}-{r[-1]}' for r in runs)}]"
