"""Tiny random checkpoints of models that see, and pictures for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.library import HEAD, HIDDEN, INNER, randomise, tiny_config
from tests.helpers.tiny import write_tokenizer

GRID = 4  # patches of a picture, each way
# Rotary sections over time, height and width, which together are half a head.
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
# What a config wants beside the tiny sizes, of each of its parts.
_CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "gemma3": {"": {"mm_tokens_per_image": 4}},
    "gemma4": {
        "": {
            "vision_config": transformers.Gemma4VisionConfig(
                hidden_size=HIDDEN,
                intermediate_size=INNER,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=HEAD,
                patch_size=14,
                num_hidden_layers=2,
                pooling_kernel_size=2,
                position_embedding_size=64,
            )
        }
    },
    "glm4v": {"text_config": {"rope_parameters": {**_SECTIONS, "partial_rotary_factor": 1.0}}},
    "internvl": {"vision_config": {"image_size": [56, 56]}},
    "llama4": {
        "vision_config": {
            "image_size": 56,
            "intermediate_size": 4 * HIDDEN,
            "projector_input_dim": HIDDEN,
            "projector_output_dim": HIDDEN,
            "vision_output_dim": HIDDEN,
        }
    },
    "mistral3": {"": {"spatial_merge_size": 1}, "vision_config": {"head_dim": HEAD}},
    "glm4v_moe": {"text_config": {"rope_parameters": {**_SECTIONS, "partial_rotary_factor": 1.0}}},
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": _SECTIONS},
        "vision_config": {"window_size": 28, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl_moe": {
        "text_config": {"rope_parameters": {**_SECTIONS, "mrope_interleaved": True}},
        "vision_config": {"deepstack_visual_indexes": [0]},
    },
    "qwen3_vl": {
        "text_config": {"rope_parameters": {**_SECTIONS, "mrope_interleaved": True}},
        "vision_config": {"deepstack_visual_indexes": [0]},
    },
}


def write_multimodal(folder: Path, model_type: str) -> Any:
    """A checkpoint in float32 as `save_pretrained` writes it, with a tokenizer and a processor's
    settings; and the model."""
    config = tiny_config(model_type)
    vision = config.vision_config
    for name in ("depth", "num_hidden_layers"):
        if isinstance(getattr(vision, name, None), int):
            setattr(vision, name, 2)
    if hasattr(vision, "out_hidden_size"):
        vision.out_hidden_size = config.text_config.hidden_size
    for part, values in _CHANGES.get(model_type, {}).items():
        for name, value in values.items():
            setattr(getattr(config, part) if part else config, name, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    randomise(model)
    model.save_pretrained(folder)
    if model_type == "qwen3_vl_moe":  # the hub's have inputs before outputs, and the class either
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for name in tensors:
            if ".experts." in name:
                tensors[name] = tensors[name].transpose(1, 2).contiguous()
        file.unlink()
        save_file(tensors, file, {"format": "pt"})
    assert write_tokenizer(folder) <= 320
    (folder / "preprocessor_config.json").write_text('{"do_resize": false, "auto_map": {"a": "b"}}')
    return model.eval()


def picture(config: Any) -> dict[str, Tensor]:
    """What a model is given of one random picture."""
    vision, random = config.vision_config, torch.Generator().manual_seed(1)
    size = vision.patch_size
    if config.model_type.startswith(("qwen", "glm")):
        channels = 3 * vision.temporal_patch_size * size * size
        return {
            "pixel_values": torch.randn(GRID * GRID, channels, generator=random),
            "image_grid_thw": torch.tensor([[1, GRID, GRID]]),
        }
    if config.model_type == "gemma4":
        places = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))[None]
        pixels = torch.rand(1, GRID * GRID, 3 * size * size, generator=random)
        return {"pixel_values": pixels, "image_position_ids": places}
    sides = [56, 56] if config.model_type in ("internvl", "llama4") else [28, 28]
    pixels = {"pixel_values": torch.randn(1, 3, *sides, generator=random)}
    return pixels | (
        {"image_sizes": torch.tensor([sides])} if config.model_type == "mistral3" else {}
    )


def features(model: Any) -> Tensor:
    """What the language model gets of the picture, `[tokens, hidden]`."""
    with torch.inference_mode():
        seen = model.get_image_features(**picture(model.config))
    for name in ("pooler_output", "last_hidden_state"):
        if isinstance(seen, dict) and seen.get(name) is not None:
            seen = seen[name]
    return torch.cat(list(seen)) if isinstance(seen, list | tuple) else seen.flatten(0, -2)


def logits(model: Any, text: Tensor, *, sees: bool = True) -> Tensor:
    """Over a picture, if it sees one, and tokens `[1, L]` behind it."""
    inputs: dict[str, Tensor] = {"input_ids": text}
    if sees:
        config = model.config
        token = getattr(config, "image_token_id", None) or config.image_token_index
        shown = torch.full((1, len(features(model))), token)
        inputs = {"input_ids": torch.cat([text[:, :2], shown, text[:, 2:]], 1), **picture(config)}
        if config.model_type.startswith(("qwen", "glm")):
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).int()
        if config.model_type == "gemma3":
            inputs["token_type_ids"] = (inputs["input_ids"] == token).int()
    with torch.inference_mode():
        return model(**inputs).logits
