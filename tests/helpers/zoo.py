"""Two-layer random checkpoints of every architecture, under the tensor names and config keys that
the family has on the hub.

Everything is small: hidden 64, four heads, a vocabulary of 320, and 32 divides every input
dimension. The files are written without `quantflow.models`: what they look like is written down a
second time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quantflow.decoder.decoder import open_decoder
from quantflow.formats.reader import Weights
from tests.helpers.specimens import (
    EXPERT_INNER,
    EXPERTS,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    TRAINED,
    VOCABULARY,
    WINDOW,
    Random,
    Specimen,
    Tensors,
    llama_like,
    native,
)
from tests.helpers.tiny import write_tokenizer
from tests.helpers.zoo_extended import EXTENDED


def _llama3(random: Random) -> Specimen:
    """Llama 3.2: tied head, scaled rotary embedding, head_dim spelled out."""
    scaling = {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    }
    config = llama_like(
        "llama",
        "LlamaForCausalLM",
        random,
        tie_word_embeddings=True,
        rope_theta=500000.0,
        rope_scaling=scaling,
        head_dim=16,
        attention_bias=False,
        mlp_bias=False,
        pretraining_tp=1,
        max_position_embeddings=131072,
    )
    return Specimen(config, native(random, head=""))


def _llama_bias(random: Random) -> Specimen:
    config = llama_like("llama", "LlamaForCausalLM", random, attention_bias=True)
    return Specimen(config, native(random, qkv_bias=True, o_bias=True))


def _internlm(random: Random) -> Specimen:
    """InternLM-7B: one KV head a head, biases on q, k, v and o, remote code, the rotary buffers
    that old files hold."""
    config = llama_like(
        "internlm",
        "InternLMForCausalLM",
        random,
        bias=True,
        rotary={"base": 10000, "type": "dynamic"},
        max_position_embeddings=TRAINED,
        num_key_value_heads=HEADS,
        rms_norm_eps=1e-6,
        auto_map={
            "AutoConfig": "configuration_internlm.InternLMConfig",
            "AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM",
        },
    )
    for key in ("rope_theta", "rope_scaling"):
        del config[key]
    tensors = native(random, kv=HEADS, qkv_bias=True, o_bias=True)
    for i in range(LAYERS):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    return Specimen(config, tensors)


def _internlm2(random: Random) -> Specimen:
    config = llama_like(
        "internlm2",
        "InternLM2ForCausalLM",
        random,
        bias=False,
        rope_theta=1000000,
        rope_scaling={"type": "dynamic", "factor": 2.0},
        max_position_embeddings=TRAINED,
        attn_implementation="eager",
        pad_token_id=1,
        auto_map={
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
    )
    tensors = random.outer("model.tok_embeddings.weight", "model.norm.weight", "output.weight")
    for i in range(LAYERS):
        p = f"model.layers.{i}"
        tensors |= {
            f"{p}.attention_norm.weight": random.norm(),
            f"{p}.ffn_norm.weight": random.norm(),
            f"{p}.attention.wqkv.weight": random((HEADS + 2 * KV_HEADS) * 16, HIDDEN),
            f"{p}.attention.wo.weight": random(HIDDEN, HIDDEN),
            f"{p}.feed_forward.w1.weight": random(INNER, HIDDEN),
            f"{p}.feed_forward.w3.weight": random(INNER, HIDDEN),
            f"{p}.feed_forward.w2.weight": random(HIDDEN, INNER),
        }
    return Specimen(config, tensors)


INTERNLM3_HEAD = 24  # unlike hidden / heads, which is 16


def _internlm3(random: Random) -> Specimen:
    """InternLM3's old directories: remote code, `qkv_bias` and `bias`, a head size of its own."""
    config = llama_like(
        "internlm3",
        "InternLM3ForCausalLM",
        random,
        bias=True,
        qkv_bias=True,
        head_dim=INTERNLM3_HEAD,
        rope_theta=50000000,
        rope_scaling={"rope_type": "dynamic", "factor": 6.0},
        max_position_embeddings=TRAINED,
        auto_map={
            "AutoConfig": "configuration_internlm3.InternLM3Config",
            "AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM",
        },
    )
    biases = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
    return Specimen(config, native(random, size=INTERNLM3_HEAD, **biases))


def _baichuan2(random: Random) -> Specimen:
    """Baichuan2-7B: q, k and v in `W_pack`, a head that is normalised where it is used."""
    config = llama_like(
        "baichuan",
        "BaichuanForCausalLM",
        random,
        model_max_length=128,
        z_loss_weight=0,
        rms_norm_eps=1e-6,
        auto_map={
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        },
    )
    for key in ("rope_theta", "rope_scaling", "num_key_value_heads"):
        del config[key]
    tensors = native(random, kv=HEADS)
    for i in range(LAYERS):
        at = f"model.layers.{i}.self_attn"
        for letter in "qkv":
            del tensors[f"{at}.{letter}_proj.weight"]
        tensors[f"{at}.W_pack.weight"] = random(3 * HIDDEN, HIDDEN)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 40  # far from length 1
    return Specimen(config, tensors)


def _mistral(random: Random) -> Specimen:
    return Specimen(
        llama_like("mistral", "MistralForCausalLM", random, sliding_window=WINDOW), native(random)
    )


def _qwen(random: Random) -> Specimen:
    """Qwen-7B-Chat: q, k and v in one biased linear; intermediate_size counts gate and up
    together."""
    flags = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    config = {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "attn_dropout_prob": 0.0,
        "bf16": False,
        "fp16": False,
        "fp32": False,
        "emb_dropout_prob": 0.0,
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": 2 * INNER,
        "kv_channels": 16,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 128,
        "no_bias": True,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "onnx_safe": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": TRAINED,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "transformers_version": "4.32.0",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "vocab_size": VOCABULARY,
        flags[random.dtype]: True,
    }
    tensors = random.outer("transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight")
    for i in range(LAYERS):
        p = f"transformer.h.{i}"
        tensors |= {
            f"{p}.ln_1.weight": random.norm(),
            f"{p}.ln_2.weight": random.norm(),
            f"{p}.attn.c_attn.weight": random(3 * HIDDEN, HIDDEN),
            f"{p}.attn.c_attn.bias": random(3 * HIDDEN),
            f"{p}.attn.c_proj.weight": random(HIDDEN, HIDDEN),
            f"{p}.mlp.w1.weight": random(INNER, HIDDEN),
            f"{p}.mlp.w2.weight": random(INNER, HIDDEN),
            f"{p}.mlp.c_proj.weight": random(HIDDEN, INNER),
        }
    return Specimen(config, tensors)


def _qwen2(random: Random) -> Specimen:
    """With its sliding window switched on, in the second layer alone."""
    config = llama_like(
        "qwen2",
        "Qwen2ForCausalLM",
        random,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
    )
    return Specimen(config, native(random, qkv_bias=True))


QWEN3_HEAD = 24  # unlike hidden / heads, which is 16


def _with_head_norms(tensors: Tensors, random: Random) -> Tensors:
    for i in range(LAYERS):
        for name in ("q_norm", "k_norm"):
            tensors[f"model.layers.{i}.self_attn.{name}.weight"] = random.norm(QWEN3_HEAD)
    return tensors


def _qwen3(random: Random) -> Specimen:
    config = llama_like(
        "qwen3",
        "Qwen3ForCausalLM",
        random,
        head_dim=QWEN3_HEAD,
        attention_bias=False,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=2,
        rope_theta=1000000,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    return Specimen(config, _with_head_norms(native(random, head="", size=QWEN3_HEAD), random))


def _mixtral_config(random: Random) -> dict[str, Any]:
    return llama_like(
        "mixtral",
        "MixtralForCausalLM",
        random,
        intermediate_size=EXPERT_INNER,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        sliding_window=None,
        output_router_logits=False,
        router_aux_loss_coef=0.02,
        rope_theta=1000000.0,
    )


def _mixtral(random: Random) -> Specimen:
    tensors = native(random, mlp=False)
    for i in range(LAYERS):
        p = f"model.layers.{i}.block_sparse_moe"
        tensors[f"{p}.gate.weight"] = random(EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            tensors |= {
                f"{p}.experts.{e}.w1.weight": random(EXPERT_INNER, HIDDEN),
                f"{p}.experts.{e}.w2.weight": random(HIDDEN, EXPERT_INNER),
                f"{p}.experts.{e}.w3.weight": random(EXPERT_INNER, HIDDEN),
            }
    return Specimen(_mixtral_config(random), tensors)


def _fused_mlp(p: str, random: Random) -> Tensors:
    return {
        f"{p}.gate.weight": random(EXPERTS, HIDDEN),
        f"{p}.experts.gate_up_proj": random(EXPERTS, 2 * EXPERT_INNER, HIDDEN),
        f"{p}.experts.down_proj": random(EXPERTS, HIDDEN, EXPERT_INNER),
    }


def _as_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 5 spells it."""
    new = {
        k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    return new | {
        "rope_parameters": {"rope_theta": config["rope_theta"], "rope_type": "default"},
        "dtype": config["torch_dtype"],
        "transformers_version": "5.11.0",
    }


def _mixtral_fused(random: Random) -> Specimen:
    """With the sliding window that early Mixtral configs had."""
    tensors = native(random, mlp=False)
    for i in range(LAYERS):
        tensors |= _fused_mlp(f"model.layers.{i}.mlp", random)
    return Specimen(
        _as_transformers_5(_mixtral_config(random)) | {"sliding_window": WINDOW}, tensors
    )


def _qwen3_moe_config(random: Random, **changes: Any) -> dict[str, Any]:
    return llama_like(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        random,
        head_dim=QWEN3_HEAD,
        attention_bias=False,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=EXPERT_INNER,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=2,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        **changes,
    )


def _qwen3_moe(random: Random) -> Specimen:
    """The first layer has one plain MLP; expert weights are not renormalised."""
    tensors = _with_head_norms(
        native(random, size=QWEN3_HEAD, mlp=False), random
    ) | random.llama_mlp("model.layers.0.mlp", INNER)
    tensors["model.layers.1.mlp.gate.weight"] = random(EXPERTS, HIDDEN)
    for e in range(EXPERTS):
        tensors |= random.llama_mlp(f"model.layers.1.mlp.experts.{e}", EXPERT_INNER)
    return Specimen(
        _qwen3_moe_config(random) | {"mlp_only_layers": [0], "norm_topk_prob": False}, tensors
    )


def _qwen3_moe_fused(random: Random) -> Specimen:
    """As transformers 5 saves it, which calls num_experts num_local_experts; with the sliding
    window switched on."""
    tensors = _with_head_norms(native(random, size=QWEN3_HEAD, mlp=False), random)
    for i in range(LAYERS):
        tensors |= _fused_mlp(f"model.layers.{i}.mlp", random)
    config = _as_transformers_5(_qwen3_moe_config(random))
    config |= {
        "num_local_experts": config.pop("num_experts"),
        "use_sliding_window": True,
        "sliding_window": WINDOW,
    }
    return Specimen(config, tensors)


def _opt(random: Random) -> Specimen:
    """The hub's older files leave out the `model.` in front."""
    config = {
        "_remove_final_layer_norm": False, "activation_dropout": 0.0,
        "activation_function": "relu", "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0, "bos_token_id": 0, "do_layer_norm_before": True, "dropout": 0.1,
        "eos_token_id": 1, "ffn_dim": INNER, "hidden_size": HIDDEN, "init_std": 0.02,
        "layerdrop": 0.0, "max_position_embeddings": 128, "model_type": "opt",
        "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "pad_token_id": 1,
        "prefix": "</s>", "torch_dtype": str(random.dtype).removeprefix("torch."),
        "transformers_version": "4.21.0.dev0", "use_cache": True, "vocab_size": VOCABULARY,
        "word_embed_proj_dim": HIDDEN,
    }  # fmt: skip
    tensors = {
        "decoder.embed_tokens.weight": random(VOCABULARY, HIDDEN, scale=0.25),
        "decoder.embed_positions.weight": random(130, HIDDEN),
        "decoder.final_layer_norm.weight": random.norm(),
        "decoder.final_layer_norm.bias": random(HIDDEN),
    }
    for i in range(LAYERS):
        p = f"decoder.layers.{i}"
        shapes = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (HIDDEN, HIDDEN),
            "self_attn.v_proj": (HIDDEN, HIDDEN),
            "self_attn.out_proj": (HIDDEN, HIDDEN),
            "fc1": (INNER, HIDDEN),
            "fc2": (HIDDEN, INNER),
        }
        for name, shape in shapes.items():
            tensors |= {f"{p}.{name}.weight": random(*shape), f"{p}.{name}.bias": random(shape[0])}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            tensors |= {f"{p}.{name}.weight": random.norm(), f"{p}.{name}.bias": random(HIDDEN)}
    return Specimen(config, tensors)


def _opt_prefixed(random: Random) -> Specimen:
    """Newer files have the whole name, and the tied head a second time."""
    old = _opt(random)
    tensors = {f"model.{name}": tensor for name, tensor in old.tensors.items()}
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].clone()
    return Specimen(old.config, tensors)


_MAKERS: dict[str, Callable[[Random], Specimen]] = {
    "llama3": _llama3, "llama_bias": _llama_bias, "internlm": _internlm, "internlm2": _internlm2,
    "internlm3": _internlm3, "baichuan2": _baichuan2, "mistral": _mistral, "qwen": _qwen,
    "qwen2": _qwen2, "qwen3": _qwen3, "mixtral": _mixtral, "mixtral_fused": _mixtral_fused,
    "qwen3_moe": _qwen3_moe, "qwen3_moe_fused": _qwen3_moe_fused, "opt": _opt,
    "opt_prefixed": _opt_prefixed, **EXTENDED,
}  # fmt: skip
ZOO = tuple(_MAKERS)


def specimen(name: str, dtype: torch.dtype = torch.float32) -> Specimen:
    """The checkpoint of that name in `ZOO`, the same at every call."""
    return _MAKERS[name](Random(dtype))


def write(folder: Path, specimen: Specimen, *, shards: int = 1) -> Path:
    """Writes the checkpoint with a tokenizer (more than one shard: with an index), and returns the
    folder."""
    folder.mkdir(parents=True, exist_ok=True)
    assert write_tokenizer(folder) <= VOCABULARY
    (folder / "config.json").write_text(json.dumps(specimen.config))
    if shards == 1:
        save_file(specimen.tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = sorted(specimen.tensors)
    weight_map = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
        for i, name in enumerate(names)
    }
    for file in sorted(set(weight_map.values())):
        save_file(
            {n: specimen.tensors[n] for n in names if weight_map[n] == file},
            folder / file,
            {"format": "pt"},
        )
    total = sum(tensor.nbytes for tensor in specimen.tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return folder


def random_tokens(windows: int, length: int) -> Tensor:
    return torch.randint(
        2, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(5)
    )


@torch.inference_mode()
def decoder_logits(weights: Weights, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[B, L, V]` in `dtype`, by QuantFlow's decoder over the weights of any checkpoint it
    reads."""
    decoder, outer = open_decoder(weights.checkpoint, tokens.shape[1], "cpu"), weights.outer()
    x = decoder.embed({n: outer[n] for n in decoder.embeds}, tokens, dtype)
    for i in range(weights.checkpoint.config.layers):
        x = decoder.block(i, weights.layer(i), dtype).forward(x)
    rows = decoder.logits({n: outer[n] for n in decoder.heads}, x.flatten(0, 1))
    return rows.unflatten(0, tokens.shape)
