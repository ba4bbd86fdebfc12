"""What a checkpoint holds beside the decoder that is quantised: it is written again as it is.

Towers that see or hear are such (`composite.py`), and blocks that predict further tokens, whether
these stand in layers beyond num_hidden_layers (DeepSeek-V3, GLM-4.5) or have names of their own
(Qwen3-Next, MiMo). transformers reads no such block; engines that speculate with them do, and lose
their speed where somebody drops them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from quantflow.models.architecture import Architecture

_PREDICTS_MORE = re.compile(r"(^|\.)mtp(_\w+)?\.")
# Fields of config.json that count such blocks.
_COUNTS = re.compile(r"num_next\w*_layers|num_mtp_\w+|mtp_num_\w+")


def why_copied(
    natives: Iterable[str], architecture: Architecture, layers: int, config: Mapping[str, Any]
) -> str | None:
    """Why a tensor is written as it is, or None for one that somebody reads here, or should.
    natives: what is in it, by native names. config: config.json."""
    first = next(iter(natives))
    layer, library = architecture.layer_of(first), architecture.library
    if layer is not None and layer >= layers:
        return f"in a layer beyond num_hidden_layers = {layers}{_counted(config)}"
    if library and first in library.state:
        return None
    if library and (part := library.part(first)):
        return f"of the model's {part}, beside its language model"
    if _PREDICTS_MORE.search(first):
        return f"of a block that predicts further tokens{_counted(config)}"
    if library and library.ignores(first):
        return f"{library.name} of transformers does not read it"
    return None


def _counted(config: Mapping[str, Any]) -> str:
    counts = [f"{key} = {value}" for key, value in config.items() if _COUNTS.fullmatch(key)]
    return f" ({', '.join(counts)})" if counts else ""
