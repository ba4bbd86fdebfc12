"""Which model types of the transformers library are decoders of text, by its own tables of what its
classes are for: it maps encoders and halves of larger models to causal language models as well."""

from __future__ import annotations

from collections.abc import Iterator

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
)

_ENCODER = "an encoder, which sees a whole text at once"
_BOTH = "an encoder with a decoder that reads it"
_OTHERS = {
    "bert-generation": "half of an encoder with a decoder",
    "blt": "a decoder of bytes in patches",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "a drafter, which reads the states of another model",
    ),
    "trocr": "half of an encoder with a decoder",
    "xlnet": "a model of words in any order",
}


def no_decoder(model_type: str) -> str | None:
    """What a model type is that is no decoder of text; None for one that is."""
    if model_type in _OTHERS:
        return _OTHERS[model_type]
    if model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        return None
    both = (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
    )
    if any(model_type in names for names in both):
        return _BOTH
    return _ENCODER if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else None


def decoders() -> Iterator[str]:
    """Every model type that the library maps to a causal language model and that is a decoder."""
    return (name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not no_decoder(name))
