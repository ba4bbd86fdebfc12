"""Checkpoints of more than a language model: towers that see or hear, and what leads from them.

The library's class for the whole is opened, and text alone goes through it: what is quantised is
its language model. The rest is written as it is, and the class finds all of it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from quantflow.models.config import ConfigProblem

_TEXT = "text_config"


def is_composite(model_type: str) -> bool:
    """Whether configs of that type hold that of a language model among others."""
    return _TEXT in CONFIG_MAPPING[model_type].sub_configs


def model_class(config: Any) -> Any:
    """The class with a head, of the whole where a config is of more than text. Raises ConfigProblem
    where no decoder stands by itself in it."""
    whole = is_composite(config.model_type)
    if whole and any(
        getattr(part, "is_encoder_decoder", False)
        for part in (config, config.get_text_config(decoder=True))
    ):
        raise ConfigProblem(
            f"the language model of {config.model_type} is an encoder and a decoder; expected a"
            " decoder alone"
        )
    kind = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None) if whole else None
    kind = kind or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise ConfigProblem(
            f"{config.model_type} is more than a language model, and its config does not say which"
            f" part is one; expected a {_TEXT}"
        )
    return kind


def language_model(model: Any) -> str:
    """The name of the module that holds embedding and layers, with a dot behind it; "" where the
    model is nothing else."""
    if not is_composite(model.config.model_type):
        return ""
    embedding = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embedding), "")
    return name.rpartition(".")[0] + "." if "." in name else ""


def beside(model: Any) -> dict[str, tuple[int, ...]]:
    """Name in the class -> shape of every tensor that is not the language model's."""
    inside, head = language_model(model), model.get_output_embeddings()
    if not inside:
        return {}
    own = (inside, *(f"{name}." for name, part in model.named_modules() if part is head))
    state = model.state_dict(keep_vars=True)
    return {name: tuple(t.shape) for name, t in state.items() if not name.startswith(own)}


def whose(name: str, base: str) -> str:
    """The part of the model, such as `vision_tower`, that a tensor of it belongs to. base: what
    stands before it in the class."""
    return name.removeprefix(f"{base}.").partition(".")[0]


def flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what its language model's says where it says nothing itself."""
    inner = values.get(_TEXT)
    own = {key: value for key, value in values.items() if value is not None}
    return {**inner, **own} if isinstance(inner, Mapping) else own
