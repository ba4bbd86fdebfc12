"""AutoRound's `quantization_config` in the words of the layouts that it packs into: GPTQ of either
version, or AWQ.

Its `packing_format` names the layout: `auto_round:auto_gptq` stores each zero point less one, as
GPTQ's version 1 does, `auto_round` and `auto_round:gptqmodel` as it is, and `auto_round:auto_awq`
is AWQ's. `extra_config` holds what single modules have of their own, which `base.own_settings`
reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantflow.errors import FormatError, Problem
from quantflow.formats.unread import HINT

NAMES = ("auto-round", "auto_round", "autoround", "intel/auto-round")
_PACKINGS = {
    "auto": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:auto_gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:awq": "awq",
    "auto_round:auto_awq": "awq",
}
_SAID = {
    "gptq": {"quant_method": "gptq", "checkpoint_format": "gptq"},
    "gptq_v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "version": "gemm"},
}
_WHERE = "quantization_config"


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as GPTQ's or AWQ's own writers would have written it. Raises FormatError
    for weights in another layout or on another grid, and for a model that computes with more than
    its weights: quantised or rotated activations."""
    own = config.get("extra_config")
    parts = [
        config,
        *(
            part
            for part in (own.values() if isinstance(own, Mapping) else ())
            if isinstance(part, Mapping)
        ),
    ]
    for part in parts:
        if part is not config and _bits(part, "bits") > 8:
            continue  # a module that is left alone
        kind = part.get("data_type") or "int"
        if kind != "int" or part.get("super_bits"):
            raise FormatError(
                Problem(
                    f"{_WHERE}.data_type",
                    f"AutoRound's weights of data_type {kind!r}",
                    "'int'",
                    HINT,
                )
            )
        if _bits(part, "act_bits") <= 8:
            raise FormatError(
                Problem(
                    f"{_WHERE}.act_bits",
                    f"activations of {part['act_bits']} bits",
                    "quantised weights alone",
                    HINT,
                )
            )
    for key in ("rotation_config", "spinquant_config"):
        if any(part.get(key) for part in parts):
            raise FormatError(
                Problem(
                    f"{_WHERE}.{key}",
                    "activations that are rotated while the model runs",
                    "weights alone",
                    HINT,
                )
            )
    packing = config.get("packing_format") or "auto"
    if packing not in _PACKINGS:
        raise FormatError(
            Problem(
                f"{_WHERE}.packing_format", f"{packing!r}", f"one of {', '.join(_PACKINGS)}", HINT
            )
        )
    # Whether the head is quantised is for its tensors to say.
    return {**config, "sym": config.get("sym", True), "lm_head": True, **_SAID[_PACKINGS[packing]]}


def _bits(config: Mapping[str, Any], key: str) -> int:
    """The bits of a module; 16 where the config names none."""
    value = config.get(key)
    return value if type(value) is int else 16
