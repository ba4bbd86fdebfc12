"""The tensors that a checkpoint of a family must have."""

from __future__ import annotations

from collections.abc import Iterator

from quantflow.models.architecture import Architecture
from quantflow.models.config import DecoderConfig
from quantflow.models.segments import segments


def expected_tensors(
    architecture: Architecture, config: DecoderConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Native name and shape of every tensor that a checkpoint must have; a tied head is left
    out."""
    if architecture.library:
        yield from architecture.library.expected()
        return
    hidden = config.hidden
    norm_parts = ("weight", "bias") if config.family == "opt" else ("weight",)
    yield f"{architecture.embedding}.weight", (config.vocabulary, hidden)
    if architecture.positions:
        yield f"{architecture.positions}.weight", (config.max_positions + 2, hidden)
    for part in norm_parts:
        yield f"{architecture.final_norm}.{part}", (hidden,)
    if not config.tied:
        yield f"{architecture.head}.weight", (config.vocabulary, hidden)
    names = architecture.layer
    for i in range(config.layers):
        prefix = architecture.layer_prefix(i)
        for norm in names.norms:
            for part in norm_parts:
                yield f"{prefix}.{norm}.{part}", (hidden,)
        if config.qk_norm:
            for norm, heads in ((names.q_norm, config.heads), (names.k_norm, config.kv_heads)):
                size = (heads if config.qk_norm_whole else 1) * config.head_dim
                yield f"{prefix}.{norm}.weight", (size,)
        if config.is_moe(i):
            yield f"{prefix}.{names.router}.weight", (config.experts, hidden)
        for segment in segments(architecture, config, i):
            for spec in segment.linears:
                yield f"{prefix}.{spec.name}.weight", spec.shape
                if spec.bias:
                    yield f"{prefix}.{spec.name}.bias", (spec.shape[0],)
