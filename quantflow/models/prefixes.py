"""What stands in front of tensor names: the name of the base model within its class with a head,
which a checkpoint may lack or hold once more, and what wrappers put there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from quantflow.errors import ModelError, Problem
from quantflow.models.architecture import Architecture

_HEADS = ("lm_head", "output")
# What else puts something in front, and what to do.
_WRAPPERS = {
    "base_model.": "It is PEFT's wrapper: save what merge_and_unload() returns",
    "module.": "It is DataParallel's wrapper: save model.module",
    "_orig_mod.": "It is torch.compile's wrapper: save model._orig_mod",
    "_fsdp_wrapped_module.": "It is FSDP's wrapper: save the whole state dict of the model inside",
    "language_model.": "It is the text half of a larger model: save that half by itself",
}


def own_names(names: Iterable[str], architecture: Architecture, where: Path) -> dict[str, str]:
    """Each name -> the one that the family's class with a head has for it, by transformers' own
    rule: a checkpoint of the base class gets its prefix (`layers.0.` is `model.layers.0.`), and one
    prefix too many goes. Raises ModelError where two names become one."""
    base = architecture.base
    result: dict[str, str] = {}
    taken: dict[str, str] = {}
    problems = []
    for name in names:
        first, _, rest = name.partition(".")
        if first in architecture.base_parts:
            own = f"{base}.{name}"
        else:
            own = rest if first == base and rest.partition(".")[0] in (base, *_HEADS) else name
        if own in taken:
            both = f"both {taken[own]} and {name}, for {own}"
            problems.append(
                Problem(str(where), both, "one of them", "Which is meant? Remove the other")
            )
        result[name] = own
        taken[own] = name
    if problems:
        raise ModelError(problems[:20])
    return result


def foreign(names: Iterable[str], architecture: Architecture, where: Path) -> Problem | None:
    """What to say of a checkpoint most of whose names begin with what no loader takes away, or that
    has an adapter's tensors among its own; None for any other."""
    names = list(names)
    if adapter := next(
        (
            name
            for name in names
            if re.search(r"\.lora_(A|B|embedding_A|embedding_B)\b|\.base_layer\.", name)
        ),
        None,
    ):
        hint = "Merge it, with merge_and_unload() of PEFT, and save that"
        return Problem(
            str(where),
            f"tensors of an adapter that is not merged, such as {adapter}",
            "a model alone",
            hint,
        )
    if not architecture.base_parts:
        return None
    parts = "|".join(map(re.escape, architecture.base_parts))
    pattern = re.compile(rf"(.+?\.)(?:{re.escape(architecture.base)}\.)?(?:{parts})\.")
    own = (f"{architecture.base}.", *(f"{part}." for part in architecture.base_parts))
    prefixes = Counter(
        match[1] for name in names if not name.startswith(own) and (match := pattern.match(name))
    )
    prefix, count = next(iter(prefixes.most_common(1)), ("", 0))
    if count * 2 < len(names) or not count:
        return None
    example = next(name for name in names if name.startswith(prefix))
    hint = next(
        (hint for start, hint in _WRAPPERS.items() if prefix.startswith(start)),
        "transformers would not know them either",
    )
    problem = f"{count} of {len(names)} tensors are called {prefix}…, such as {example}"
    return Problem(
        str(where),
        problem,
        f"the names of {architecture.name}, which begin with {architecture.base}.",
        hint,
    )
