"""What config.json would say of the model in a GGUF file."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantflow.checkpoints.directory import half_letters
from quantflow.checkpoints.gguf.names import CLASSES, FAMILIES
from quantflow.checkpoints.gguf.rotary import llama3_factors
from quantflow.errors import ModelError, Problem

if TYPE_CHECKING:
    from torch import Tensor

# what llama.cpp has no place for
SCHEMES_KEY, CONFIG_KEY, VECTORS_KEY = "quantflow.schemes", "quantflow.config", "quantflow.vectors"
_ORIGINAL = "Start from the original checkpoint instead"


def known_architecture(path: Path, metadata: Mapping[str, Any]) -> str:
    """`general.architecture`. Raises ModelError where the whole file is another thing than is
    read."""
    name = metadata.get("general.architecture")
    read = set(CLASSES)
    if CONFIG_KEY in metadata:  # whose files say all in it
        read |= {family.architecture for family in FAMILIES.values()}
    if not isinstance(name, str) or name not in read:
        actual = "missing" if name is None else f"{name!r}"[:80]
        expected = f"one of {', '.join(CLASSES)}"
        raise ModelError(Problem(f"{path} general.architecture", actual, expected))
    if metadata.get("split.count") not in (None, 0, 1):
        hint = "Join them with llama.cpp's llama-gguf-split --merge"
        part = "one of several files of a model"
        raise ModelError(Problem(str(path), part, "the whole model in one", hint))
    if metadata.get(f"{name}.expert_count"):
        hint = "Start from the original checkpoint"
        raise ModelError(Problem(str(path), "a mixture of experts", "a dense decoder", hint))
    return name


def schemes_of(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What QuantFlow noted of the modules' schemes."""
    text = metadata.get(SCHEMES_KEY, "{}")
    try:
        schemes = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        schemes = None
    if not isinstance(schemes, dict):
        raise ModelError(Problem(f"{path} {SCHEMES_KEY}", f"{text!r}"[:80], "a JSON object"))
    return schemes


def own_config(path: Path, text: Any, architecture: str) -> dict[str, Any]:
    """What QuantFlow wrote under CONFIG_KEY."""
    where = f"{path} {CONFIG_KEY}"
    try:
        config = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        problem = Problem(where, f"not JSON ({error})"[:200], "a JSON object")
        raise ModelError(problem) from error
    another = ModelError(
        Problem(where, f"{text!r}"[:80], f"the config of a decoder of {architecture}")
    )
    if not isinstance(config, dict) or any(half_letters(config)):
        raise another
    family = FAMILIES.get(str(config.get("model_type")))
    if not family or family.architecture != architecture:
        raise another
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    if not all(type(count) is int and count > 0 for count in (heads, kv_heads)):
        raise another
    config.pop("quantization_config", None)
    return config


class _Values:
    """The metadata of one architecture, as numbers that must be there; what is wrong with them
    gathers in `problems`."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], architecture: str) -> None:
        self.path, self.metadata, self.architecture = path, metadata, architecture
        self.problems: list[Problem] = []

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, kind: type, default: Any = None) -> Any:
        value: Any = self.get(key, default)
        if isinstance(value, array) and len(set(value)) == 1:  # one for each layer
            value = value[0]
        if kind is float and type(value) is int:
            value = float(value)
        known = type(value) is kind
        if not known or not 0 < value < 2**31:
            actual = "missing" if value is None else f"{value!r}"[:80]
            self.refuse(key, actual, f"a positive {kind.__name__}")
            return kind(1)
        return value

    def refuse(self, key: str, actual: str, expected: str, hint: str = "") -> None:
        where = f"{self.path} {self.architecture}.{key}"
        self.problems.append(Problem(where, actual, expected, hint))


def standard_config(
    path: Path,
    metadata: Mapping[str, Any],
    architecture: str,
    tensors: Mapping[str, int],
    rope_factors: Tensor | None,
) -> dict[str, Any]:
    """What llama.cpp's own keys say. tensors: Hugging Face's names -> ggml's number of the type.
    rope_factors: those that the file holds, in float32 unless they are of a type that none are.
    Raises ModelError with all that is wrong."""
    values = _Values(path, metadata, architecture)

    # sizes
    heads, hidden = (
        values.number("attention.head_count", int),
        values.number("embedding_length", int),
    )
    head_dim = values.number("attention.key_length", int, max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.number(key, int, head_dim) != head_dim:
            values.refuse(key, repr(values.get(key))[:80], f"the whole head, {head_dim}")
    tokens = metadata.get("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "hidden_size": hidden,
        "intermediate_size": values.number("feed_forward_length", int),
        "num_hidden_layers": values.number("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": values.number("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": values.number("context_length", int),
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon", float),
        "rope_theta": values.number("rope.freq_base", float, 10000.0),
        "vocab_size": values.number(
            "vocab_size", int, len(tokens) if isinstance(tokens, list) else None
        ),
        "hidden_act": "silu",
        "tie_word_embeddings": not any(name.startswith("lm_head.") for name in tensors),
        "torch_dtype": {0: "float32", 30: "bfloat16"}.get(
            tensors.get("model.embed_tokens.weight", 1), "float16"
        ),
    }
    if architecture == "llama":
        config["attention_bias"] = "model.layers.0.self_attn.o_proj.bias" in tensors

    # rotary embedding, and the tokens around a text
    scaling = _rope_scaling(values, config, rope_factors)
    if scaling is not None:
        config["rope_scaling"] = scaling
    for role in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if type(token) is int:
            config[f"{role}_token_id"] = token
    if values.problems:
        raise ModelError(values.problems)
    return config


def _rope_scaling(
    values: _Values, config: Mapping[str, Any], factors: Tensor | None
) -> dict[str, Any] | None:
    kind = values.get("rope.scaling.type", "none")
    if factors is not None:
        scaling = None
        if kind == "none":
            scaling = _llama3_scaling(factors, config["rope_theta"], config["head_dim"])
        if scaling is None:
            where = f"{values.path} rope_freqs.weight"
            values.problems.append(Problem(where, "other factors than Llama 3's", hint=_ORIGINAL))
        return scaling
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        expected = "none, linear or yarn"
        values.refuse("rope.scaling.type", f"{kind!r}"[:80], expected, _ORIGINAL)
        return None
    scaling = {"rope_type": kind, "factor": values.number("rope.scaling.factor", float)}
    trained = "rope.scaling.original_context_length"
    if kind == "yarn" or values.get(trained) is not None:
        scaling["original_max_position_embeddings"] = values.number(trained, int)
    return scaling


def _llama3_scaling(factors: Tensor, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The `rope_scaling` that gives these factors, with the wavelengths of every Llama 3 since 3.1;
    None if there is none."""
    import torch

    if factors.dtype != torch.float32:
        return None
    numbers: dict[str, float] = {
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not 1 <= numbers["factor"] < 2**31:
        return None
    expected = llama3_factors(theta, head_dim, numbers)
    same = expected.shape == factors.shape and torch.allclose(expected, factors, rtol=1e-4, atol=0)
    return {"rope_type": "llama3", **numbers} if same else None
