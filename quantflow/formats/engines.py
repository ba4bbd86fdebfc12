"""What engines make of a checkpoint that is right in itself: what the `doubts` of the formats share. An engine is named with the version
that was read or run; docs/engines.md says which of the two."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from quantflow.errors import Problem
from quantflow.formats.base import FUSED

if TYPE_CHECKING:
    from quantflow.quant.grid import Scheme

VLLM, LMDEPLOY, GPTQMODEL, TRANSFORMERS = "vLLM 0.32", "LMDeploy 0.18 (TurboMind)", "GPTQModel 7.7", "transformers 5.23"
FUSING = f"{VLLM} and SGLang"


def unlike_parts(modules: Mapping[str, Scheme], ignored: Collection[str]) -> list[Problem]:
    """Said where q, k and v, or gate and up, of which engines make one linear, differ in scheme, or where only some are quantised."""
    unlike: list[str] = []
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        for parts in FUSED.values():
            names = [f"{parent}.{part}" for part in parts]
            there = [part for part in names if part in modules or part in ignored]
            if leaf in parts and len({modules.get(part) for part in there}) > 1 and there[0] not in unlike:
                unlike.append(there[0])
    if not unlike:
        return []
    leaves = next(parts for parts in FUSED.values() if unlike[0].rpartition(".")[2] in parts)
    parent = unlike[0].rpartition(".")[0]
    found = ", ".join(f"{leaf} {modules.get(f'{parent}.{leaf}') or 'in 16 bits'}" for leaf in leaves)
    where = f"{parent}{f' and {len(unlike) - 1} more' if len(unlike) > 1 else ''}"
    hint = f"Match all of {', '.join(leaves)} in weights.ignore and overrides, or none"
    return [
        Problem(FUSING, f"does not load unlike parts of what it fuses: {found} ({where})", "one scheme, or none, for all of them", hint)
    ]


def first_of(modules: Mapping[str, Scheme], chosen: Collection[str]) -> str:
    """Which modules, in short: `model.layers.0.mlp.up_proj and 3 more`; nothing where it is all of them."""
    if len(chosen) == len(modules):
        return ""
    name = next(name for name in modules if name in chosen)
    return f" ({name}{f' and {len(chosen) - 1} more' if len(chosen) > 1 else ''})"
