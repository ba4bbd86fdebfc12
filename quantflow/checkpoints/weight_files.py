"""Which files of a model directory hold its weights: those that transformers would open, and why
not the others."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantflow.errors import ModelError, Problem

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d{2,6})-of-(\d{2,6})\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth")
# Weights in other files, which lose nothing that safetensors beside them hold; what a trainer keeps
# (optimizer.pt) is not among them.
_OTHERS = (
    "pytorch_model*.bin",
    "adapter_model*.bin",
    "consolidated*.pth",
    "*.gguf",
    "tf_model*.h5",
    "flax_model*.msgpack",
)


@dataclass(frozen=True)
class WeightFiles:
    """names: the files that are read, sorted. weight_map: the index, tensor -> file; {} where none
    is followed. copies: shards that are not read since WEIGHTS is, and must say the same. left_out:
    every file of weights that is not read -> why."""

    names: tuple[str, ...]
    weight_map: Mapping[str, str]
    copies: tuple[str, ...]
    left_out: Mapping[str, str]


def weight_files(path: Path, weight_map: Mapping[str, str]) -> WeightFiles:
    """The weight files of a directory: WEIGHTS, else what the index names, else shards by their own
    numbering, else the only file.
    weight_map: the index, {} where there is none.

    Raises ModelError where files are missing, where two could be meant, and where what is there is
    no model's.
    """
    # A Mac's archiver puts ._model.safetensors, which holds no tensor, beside each file.
    there = sorted(p.name for p in path.glob("*.safetensors") if not p.name.startswith("."))
    named = set(weight_map.values())
    if WEIGHTS in there and WEIGHTS not in named:
        # As transformers does. vLLM and others follow the index: so the shards must not say
        # anything else.
        copies = tuple(name for name in there if name in named or _is_shard(name))
        reasons = dict.fromkeys(copies, f"a copy in shards of {WEIGHTS}")
        return WeightFiles(
            (WEIGHTS,),
            {},
            copies,
            _left_out(path, (WEIGHTS,), there, f"{WEIGHTS} is what transformers opens") | reasons,
        )
    if weight_map:
        absent = sorted(named - set(there))
        if absent:
            raise ModelError(
                [
                    Problem(
                        str(path / name), "missing shard", hint=f"{INDEX} names it: download it"
                    )
                    for name in absent[:20]
                ]
            )
        return WeightFiles(
            tuple(sorted(named)),
            weight_map,
            (),
            _left_out(path, named, there, f"{INDEX} does not name it"),
        )
    chosen = _unnamed(path, there)
    return WeightFiles(
        tuple(chosen), {}, (), _left_out(path, chosen, there, f"{chosen[0]} is the model's")
    )


def _unnamed(path: Path, there: list[str]) -> list[str]:
    """What is read where neither WEIGHTS nor an index says it."""
    models = [name for name in there if not _is_adapter(name) and not _is_consolidated(name)]
    if not models:
        raise ModelError(_none(path, there))
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for name in models:
        match = _SHARD.fullmatch(name)
        stem, number, count = (match[1], int(match[2]), int(match[3])) if match else (name, 1, 1)
        sets.setdefault((stem, count), {})[number] = name
    # of several, transformers' own name
    own = [key for key in sets if key[0] == "model"] or list(sets)
    if len(own) > 1:
        problem = (
            f"{len(own)} files or sets of shards:"
            f" {', '.join(min(sets[key].values()) for key in own)}"
        )
        hint = f"Call the one that is meant {WEIGHTS}, add {INDEX}, or move the others away"
        raise ModelError(Problem(str(path), problem, f"{WEIGHTS}, an index, or one file", hint))
    (key,) = own
    missing = sorted(set(range(1, key[1] + 1)) - set(sets[key])) if key[1] < 10**5 else [0]
    if missing or max(sets[key]) > key[1]:
        example = min(sets[key].values())
        start, digits = example.rpartition("-of-")[0].rpartition("-")[::2]
        names = [
            f"{start}-{number:0{len(digits)}}{example[len(start) + 1 + len(digits) :]}"
            for number in missing[:5]
        ]
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        hint = f"Download {'it' if len(missing) == 1 else 'them'}, and {INDEX} too"
        raise ModelError(
            Problem(
                str(path),
                f"missing shard {', '.join(names)}{more}",
                f"all of {key[1]}, as {example} says",
                hint,
            )
        )
    return sorted(sets[key].values())


def _none(path: Path, there: list[str]) -> Problem:
    if adapters := [name for name in there if _is_adapter(name)]:
        hint = "Merge it into its model, with merge_and_unload() of PEFT, and save that"
        return Problem(str(path), f"{adapters[0]} alone, an adapter", f"a model's {WEIGHTS}", hint)
    if there:
        hint = f"Download {WEIGHTS}, or its shards, from the same place"
        return Problem(
            str(path),
            f"{there[0]} alone, in Mistral's own layout",
            f"{WEIGHTS}, in that of transformers",
            hint,
        )
    pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
    hint = (
        "Pickled weights run code when loaded: convert them to safetensors first"
        if pickles
        else "Is the download complete?"
    )
    return Problem(
        str(path), f"no .safetensors file{' but ' + pickles[0] if pickles else ''}", hint=hint
    )


def _left_out(
    path: Path, read: Collection[str], there: Collection[str], why: str
) -> dict[str, str]:
    """File -> why it is not read; `why` for one of which nothing else is known."""
    reasons = {
        name: "an adapter, which is not merged" if _is_adapter(name) else why
        for name in there
        if name not in read
    }
    for other in sorted({p.name for pattern in _OTHERS for p in path.glob(pattern)}):
        reasons[other] = (
            "an adapter, which is not merged"
            if _is_adapter(other)
            else "safetensors files hold the weights"
        )
    return reasons


def _is_shard(name: str) -> bool:
    match = _SHARD.fullmatch(name)
    return match is not None and match[1] == "model"


def _is_adapter(name: str) -> bool:
    return name.startswith("adapter_model")


def _is_consolidated(name: str) -> bool:
    return name.startswith("consolidated")
