"""Which modules a `quantization_config` names, and how: all that share a scheme in few words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantflow.quant.scheme import Scheme

# Modules that inference engines fuse, and under whose name they then look for per-module settings.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def main_scheme(modules: Mapping[str, Scheme], default: Scheme) -> Scheme:
    """The scheme that needs no naming of modules: `default` if any module has it, else the
    commonest (the first of equals)."""
    if not modules or default in modules.values():
        return default
    return Counter(modules.values()).most_common(1)[0][0]


def name_patterns(chosen: Collection[str], others: Collection[str]) -> tuple[list[str], list[str]]:
    """Regular expressions, and names, that together match all of `chosen` and none of `others`.

    Names that differ in their numbers alone (layers, experts) share an expression unless it would
    match one of `others`.
    """
    taken = {_template(name) for name in others}
    families: dict[str, list[str]] = {}
    for name in chosen:
        families.setdefault(_template(name), []).append(name)
    patterns, names = [], []
    for template, members in families.items():
        if len(members) > 1 and template not in taken:
            patterns.append(f"^{template}$")
        else:
            names.extend(members)
    return patterns, names


def _template(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def with_fused(names: Collection[str], *, complete: bool) -> list[str]:
    """`names` and those of the fused modules of which they hold all parts (`complete`) or any
    part."""
    result = dict.fromkeys(names)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for fused, parts in FUSED.items():
            if leaf in parts and (
                not complete or all(f"{parent}.{part}" in result for part in parts)
            ):
                result[f"{parent}.{fused}"] = None
    return list(result)
