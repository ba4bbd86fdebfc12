"""The architectures QuantFlow knows. To add one: a table in this folder, a line here, a parity
test. A family that has none is hosted, where transformers has a class for it."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from quantflow.errors import ModelError, Problem
from quantflow.models.architecture import Architecture, Json
from quantflow.models.internlm import INTERNLM, INTERNLM2
from quantflow.models.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from quantflow.models.mixture import MIXTRAL, QWEN3_MOE
from quantflow.models.opt import OPT
from quantflow.models.qwen import QWEN

ARCHITECTURES: dict[str, Architecture] = {
    model_type: architecture
    for architecture in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        INTERNLM,
        INTERNLM2,
        QWEN,
        MIXTRAL,
        QWEN3_MOE,
        OPT,
    )
    for model_type in architecture.model_types
}


def family(config: Json, path: Path) -> Architecture:
    """The family of a config.json: a table's, or a class of transformers. Raises ModelError for a
    model type that neither knows, and ConfigProblem for a config that the class does not take."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    known = sorted(ARCHITECTURES)
    if isinstance(model_type, str):
        # Not for a family that has a table: these imports take seconds.
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            from quantflow.models.hosted import open_family

            return open_family(config)
        known += [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in ARCHITECTURES]
    near = get_close_matches(str(model_type), known, n=1, cutoff=0.75)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ModelError(
        Problem(
            f"{path}/config.json model_type",
            repr(model_type),
            f"one of {', '.join(sorted(ARCHITECTURES))}, or one that the installed transformers"
            " maps to a causal language model",
            f"{hint}What is missing for another family is a table in quantflow/models: its tensor"
            " names and what its decoder computes",
        )
    )
