"""A tiny random checkpoint of any model type of the transformers library, from its own config
class, as `save_pretrained` writes it: the files have the names that the hub's have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from tests.helpers.tiny import write_tokenizer

VOCABULARY = 352  # ids from 320 on are no text's: images have theirs there
HIDDEN, INNER, EXPERT_INNER, HEADS, KV_HEADS, HEAD = 64, 96, 32, 4, 2, 16

# What a config calls its sizes -> how large they are here. 32 divides what linears read.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        (
            "hidden_size", "d_model", "n_embd", "dim", "embedding_size", "embedding_dim", "emb_dim",
            "word_embed_proj_dim", "lru_width", "input_embedding_size",
            "output_embedding_size", "dim_model_base", "backbone_hidden_size",
        ),
        HIDDEN,
    ),
    **dict.fromkeys(
        (
            "intermediate_size", "ffn_dim", "ffn_hidden_size", "dim_ff", "dff", "d_inner",
            "dense_intermediate_size", "intermediate_size_mlp", "encoder_ffn_dim", "n_inner",
            "decoder_ffn_dim", "feed_forward_size",
        ),
        INNER,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size",
            "moe_shared_expert_intermediate_size", "shared_intermediate_size", "q_lora_rank",
            "shared_experts_intermediate_size", "kv_lora_rank", "o_lora_rank", "moe_latent_size",
            "router_hidden_size", "hidden_size_per_layer_input", "laurel_rank", "adapter_rank",
            "hc_lowrank", "ple_embed_dim", "gated_norm_rank",
        ),
        EXPERT_INNER,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads",
            "encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads",
            "num_decoder_attention_heads", "linear_num_heads", "linear_num_value_heads",
            "swa_num_attention_heads", "index_n_heads", "num_query_groups",
        ),
        HEADS,
    ),
    **dict.fromkeys(
        (
            "num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "mamba_n_groups",
            "swa_num_key_value_heads", "n_groups", "mamba_ngroups", "num_global_key_value_heads",
        ),
        KV_HEADS,
    ),
    **dict.fromkeys(
        (
            "head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_channels",
            "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "swa_head_dim",
            "index_head_dim", "dim_head", "d_head", "rotary_dim", "attention_head_size",
            "mamba_d_state", "ssm_state_size", "state_size", "d_rel", "global_head_dim",
            "query_pre_attn_scalar", "swa_v_head_dim", "time_step_rank", "mamba_dt_rank",
        ),
        HEAD,
    ),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4
    ),
    **dict.fromkeys(
        (
            "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "n_group",
            "num_expert_group", "topk_group",
        ),
        2,
    ),
    **dict.fromkeys(
        ("first_k_dense_replace", "num_dense_layers", "n_shared_experts", "num_shared_experts"), 1
    ),
    **dict.fromkeys(("moe_num_shared_experts",), 1),
    **dict.fromkeys(
        (
            "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length",
            "original_max_position_embeddings", "rel_extent",
        ),
        128,
    ),
    **dict.fromkeys(
        (
            "sliding_window", "sliding_window_size", "window_size", "attention_window_size",
            "attention_chunk_size", "local_attention", "index_topk", "swa_window",
            "chunk_size", "mamba_chunk_size",
        ),
        8,
    ),
    # state-space layers: an inner width of twice the hidden one, in heads of 16
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), HEAD),
    "mamba_d_ssm": 2 * HIDDEN,
    # of towers
    "image_size": 28, "patch_size": 14, "num_channels": 3,
}  # fmt: skip
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers", "num_blocks",
)  # fmt: skip

# Where a class needs more than that.
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_GEMMA4 = {"global_head_dim": 32}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": HIDDEN, "ffn_hidden_size": EXPERT_INNER, "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note_text": {
        "n_group": 1, "topk_group": 1, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32, "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16, "swa_v_head_dim": HEAD, "head_dim": 2 * HEAD,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_vision_encoder": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "intermediate_size": INNER,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "granitemoehybrid": _HYBRID,
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {
        "num_hidden_layers": 2, "layer_types": ["chunked_attention", "full_attention"],
        "moe_layers": [0, 1], "no_rope_layers": [1, 0],
    },
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"head_dim": HEAD},
    "moshi": {"ffn_dim": 128},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD,
        "indexer_budget": 8, "indexer_compress_ratio": 2,
    },
    "rwkv": {"attention_hidden_size": HIDDEN},
    "recurrent_gemma": {"intermediate_size": 128, "block_types": ["recurrent", "attention"]},
    "xlstm": {"chunk_size": 16},
    "zamba": {
        "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD,
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2
    },
    "zamba2": {
        "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD,
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_ngroups": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The config object: the class's defaults, its sizes made small, and as few layers as show
    every kind that the defaults have."""
    kind = CONFIG_MAPPING[model_type]
    plain = kind()
    values = {**dict(_small(plain)), **CHANGES.get(model_type, {}), **changes}
    return kind(**values)


def _small(plain: Any) -> Iterator[tuple[str, Any]]:
    """What is changed of a config class's defaults."""
    own = plain.to_dict()
    counts = {own[name] for name in LAYERS if isinstance(own.get(name), int)}
    by_layer = {
        name: kinds
        for name, value in own.items()
        if isinstance(value, list)
        and len(value) in counts
        and len(value) > 2
        # each kind of layer once; more are no kinds but numbers of layers
        and len(kinds := list(dict.fromkeys(value))) < 9
    }
    layers = max([2, *map(len, by_layer.values())])
    outside = 320
    for name, value in own.items():
        if name in plain.sub_configs and value is not None:
            yield name, _part(getattr(plain, name))
        elif name in by_layer:
            kinds = by_layer[name]
            yield name, [kinds[i % len(kinds)] for i in range(layers)]
        elif name in LAYERS and isinstance(value, int):
            yield name, layers
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            yield name, ("bos_token_id", "eos_token_id", "pad_token_id").index(name)
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            yield name, outside
            outside += 1
        elif name == "num_key_value_heads" and "kv_lora_rank" in own:
            yield name, HEADS  # latent attention makes K and V for each
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value:
            yield name, SIZES[name]


def _part(config: Any) -> Any:
    if config.model_type in CONFIG_MAPPING:
        return tiny_config(config.model_type)
    return type(config)(**{**dict(_small(config)), **CHANGES.get(config.model_type, {})})


def write_tiny(
    folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A checkpoint with a tokenizer. changes: of the config."""
    torch.manual_seed(0)
    model = auto_class(model_type).from_config(tiny_config(model_type, **changes), dtype=dtype)
    randomise(model)
    model.save_pretrained(folder)
    assert write_tokenizer(folder) <= 320
    return folder


def auto_class(model_type: str) -> Any:
    """What makes and loads models of the type with all that they have: towers too."""
    whole = model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return transformers.AutoModelForMultimodalLM if whole else transformers.AutoModelForCausalLM


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Other numbers than a class begins with: no norm is one, no bias zero, and channels differ in
    size, else AWQ finds nothing to do."""
    generator = torch.Generator().manual_seed(3)
    for name, value in model.named_parameters():
        random = torch.randn(value.shape, generator=generator)
        if value.dim() < 2 or name.endswith("A_log"):
            value += (0.2 * random).to(value.dtype)
            continue
        sizes = torch.randn(*value.shape[:-1], 1, generator=generator).mul(0.5).exp()
        value.copy_(random * sizes * 0.8 * value.shape[-1] ** -0.5)
