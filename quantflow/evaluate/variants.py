"""What `evaluate` measures: the weights, the KV cache, and both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VARIANTS = {
    "weights": "quantised weights",
    "kv": "int8 KV only",
    "weights_and_kv": "weights + int8 KV",
}


def deployed(variants: Mapping[str, Any]) -> Any | None:
    """Of what was measured of each variant, that of what will run: weights and KV cache together
    where the recipe has both. None where nothing was measured."""
    return next(
        (variants[name] for name in ("weights_and_kv", "weights", "kv") if name in variants), None
    )
