"""What llama.cpp takes for granted of Gemma 2 and 3, and what it must be told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quantflow.errors import Problem
from quantflow.models.config import DecoderConfig

# layers from one with full attention to the next; layers of the size whose scores are scaled by its
# hidden size (27B)
_EVERY = {"gemma2": 2, "gemma3": 6}
_LARGEST = {"gemma2": 46, "gemma3": 62}
_LOCAL_THETA = 10000.0


def gemma_problems(architecture: str, config: DecoderConfig) -> Iterator[Problem]:
    """What its graph computes otherwise."""
    every = _EVERY[architecture]
    windows = {window for window in config.sliding_windows if window is not None}
    kinds = [config.window(i) is not None for i in range(config.layers)]
    if len(windows) != 1 or kinds != [(i + 1) % every != 0 for i in range(config.layers)]:
        expected = f"full attention in every {every}th layer and in no other, as llama.cpp has it"
        yield Problem("gguf", "sliding windows in other layers", expected)
    largest = config.layers == _LARGEST[architecture]
    size = config.hidden / config.heads if largest else config.head_dim
    if abs(config.score_scale - size**-0.5) > 1e-9:
        scalar = config.score_scale**-2
        yield Problem("gguf", f"query_pre_attn_scalar {scalar:g}", f"{size:g}, as llama.cpp has it")
    if not config.tied:
        yield Problem("gguf", "a head of its own", "the embedding as the head")
    local = config.local_rope
    if local and (local.kind, local.theta) != ("default", _LOCAL_THETA):
        yield Problem(
            "gguf",
            f"rotary embedding of layers with a window: {local.kind}, rope_theta {local.theta:g}",
            f"default, {_LOCAL_THETA:g}",
        )


def gemma_metadata(architecture: str, config: DecoderConfig) -> dict[str, Any]:
    window = next(window for window in config.sliding_windows if window is not None)
    metadata: dict[str, Any] = {f"{architecture}.attention.sliding_window": window}
    if config.attention_cap is not None:
        metadata[f"{architecture}.attn_logit_softcapping"] = config.attention_cap
    if config.logit_cap is not None:
        metadata[f"{architecture}.final_logit_softcapping"] = config.logit_cap
    return metadata
