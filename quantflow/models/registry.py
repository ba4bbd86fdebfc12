"""The architectures QuantFlow knows. To add one: a table in this folder, a line here, a parity
test. A family that has none is hosted, where transformers has a class for it; a model type that
computes what another family does is read as that, by a translation."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from quantflow.errors import ModelError, Problem
from quantflow.models.aliases import ALIASES
from quantflow.models.architecture import Architecture, Json
from quantflow.models.baichuan import BAICHUAN
from quantflow.models.chatglm import CHATGLM
from quantflow.models.config import ConfigProblem
from quantflow.models.gemma import GEMMA2, GEMMA3
from quantflow.models.glm import GLM, GLM4
from quantflow.models.granite import GRANITE
from quantflow.models.internlm import INTERNLM, INTERNLM2, INTERNLM3
from quantflow.models.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from quantflow.models.mixture import MIXTRAL, QWEN3_MOE
from quantflow.models.olmo2 import OLMO2
from quantflow.models.opt import OPT
from quantflow.models.phi3 import PHI3
from quantflow.models.qwen import QWEN
from quantflow.models.spelling import settled
from quantflow.models.translation import Translation

ARCHITECTURES: dict[str, Architecture] = {
    model_type: architecture
    for architecture in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        QWEN,
        MIXTRAL,
        QWEN3_MOE,
        OPT,
        OLMO2,
        GRANITE,
        PHI3,
        GLM,
        GLM4,
        GEMMA2,
        GEMMA3,
    )
    for model_type in architecture.model_types
}

TRANSLATIONS: dict[str, Translation] = {
    "internlm": INTERNLM,
    "internlm2": INTERNLM2,
    "internlm3": INTERNLM3,
    "baichuan": BAICHUAN,
    "chatglm": CHATGLM,
    **ALIASES,
}
"""By model type: what computes what another family does, under its own names."""


def family(config: Json, path: Path) -> Architecture:
    """The family of a config.json: a table's, another's by a translation, or a class of
    transformers. Raises ModelError for a model type that none knows, and ConfigProblem for a config
    that the family does not take."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        table = ARCHITECTURES[model_type]
        if not table.hosted_else or _unread(table, config) is None:
            return table
    if isinstance(model_type, str) and model_type in TRANSLATIONS:
        translation = TRANSLATIONS[model_type]
        target = family(translation.config(config), path)
        return translation.architecture(model_type, config, target)
    own = sorted({*ARCHITECTURES, *TRANSLATIONS})
    known = list(own)
    if isinstance(model_type, str):
        # Not for a family that has a table: these imports take seconds.
        from transformers.models.auto import modeling_auto

        names = {
            **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        }
        if model_type in names:
            from quantflow.models.hosted import open_family
            from quantflow.models.kinds import no_decoder

            if kind := no_decoder(model_type):
                raise ModelError(
                    Problem(
                        f"{path}/config.json model_type",
                        f"{model_type!r}, {kind}",
                        "a decoder of text",
                        "QuantFlow quantises what writes a text token by token",
                    )
                )
            return open_family(config)
        known += [name for name in names if name not in own]
    near = get_close_matches(str(model_type), known, n=1, cutoff=0.75)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ModelError(
        Problem(
            f"{path}/config.json model_type",
            repr(model_type),
            f"one of {', '.join(own)}, or one that the installed transformers maps to a causal"
            " language model, with towers or without",
            f"{hint}What is missing for another family is a table in quantflow/models: its tensor"
            " names and what its decoder computes",
        )
    )


def _unread(table: Architecture, config: Json) -> str | None:
    """What a table does not follow in a config.json; None where it follows all."""
    try:
        table.read_config(settled(config, layered_rope=table.layered_rope)[0])
    except ConfigProblem as problem:
        return str(problem)
    return None


def not_followed(config: Json) -> str | None:
    """Why a family that has a table is hosted all the same; None of any other."""
    table = ARCHITECTURES.get(str(config.get("model_type")))
    return _unread(table, config) if table and table.hosted_else else None
