"""Every architecture as transformers computes it, over the checkpoints of `zoo`.

transformers reads the same files where it knows the family. Where the family is remote code
(InternLM, Baichuan, Qwen), the weights are carried into Llama or Qwen2 by the index loops below,
written from the families' own definitions, not from `quantflow.models`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    InternLM3Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.helpers.zoo import (
    HEADS,
    HIDDEN,
    INNER,
    INTERNLM3_HEAD,
    KV_HEADS,
    LAYERS,
    TRAINED,
    VOCABULARY,
    Tensors,
    specimen,
)

REMOTE = ("internlm", "internlm2", "internlm3", "baichuan2", "qwen")
D = HIDDEN // HEADS


def _llama(tensors: Tensors, **config: Any) -> LlamaForCausalLM:
    numbers = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": TRAINED,
    }
    model = LlamaForCausalLM(LlamaConfig(**numbers, **config))
    model.load_state_dict(tensors)
    return model.eval()


def _internlm(tensors: Tensors, length: int) -> LlamaForCausalLM:
    rope = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 10000.0}
    weights = {n: t for n, t in tensors.items() if "inv_freq" not in n}
    return _llama(
        weights,
        num_key_value_heads=HEADS,
        attention_bias=True,
        rms_norm_eps=1e-6,
        rope_parameters=rope,
    )


def _internlm2(tensors: Tensors, length: int) -> LlamaForCausalLM:
    native = {
        "model.embed_tokens.weight": tensors["model.tok_embeddings.weight"],
        "model.norm.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["output.weight"],
    }
    for i in range(LAYERS):
        old = new = f"model.layers.{i}"
        for ours, theirs in (
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.o_proj", "attention.wo"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.up_proj", "feed_forward.w3"),
            ("mlp.down_proj", "feed_forward.w2"),
        ):
            native[f"{new}.{ours}.weight"] = tensors[f"{old}.{theirs}.weight"]
        # Rows come in blocks, one a KV head: the query heads that read it, its key, its value.
        fused = tensors[f"{old}.attention.wqkv.weight"]
        q: list[torch.Tensor] = []
        k: list[torch.Tensor] = []
        v: list[torch.Tensor] = []
        row = 0
        for _ in range(KV_HEADS):
            for block in [q] * (HEADS // KV_HEADS) + [k, v]:
                for _ in range(D):
                    block.append(fused[row])
                    row += 1
        for letter, rows in (("q", q), ("k", k), ("v", v)):
            native[f"{new}.self_attn.{letter}_proj.weight"] = torch.stack(rows)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000000.0}
    return _llama(native, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5, rope_parameters=rope)


def _internlm3(tensors: Tensors, length: int) -> LlamaForCausalLM:
    """transformers' own config class of it, under the old keys."""
    config = InternLM3Config(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=INTERNLM3_HEAD,
        vocab_size=VOCABULARY,
        max_position_embeddings=TRAINED,
        qkv_bias=True,
        bias=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "dynamic", "factor": 6.0, "rope_theta": 50000000.0},
    )
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(tensors)
    assert isinstance(model, LlamaForCausalLM)
    return model.eval()


def _baichuan2(tensors: Tensors, length: int) -> LlamaForCausalLM:
    """q, k and v one below the other; each row of the head over its length."""
    native = {name: tensor for name, tensor in tensors.items() if "W_pack" not in name}
    head = tensors["lm_head.weight"]
    native["lm_head.weight"] = torch.stack([row / (row * row).sum().sqrt() for row in head])
    for i in range(LAYERS):
        fused = tensors[f"model.layers.{i}.self_attn.W_pack.weight"]
        for at, letter in enumerate("qkv"):
            rows = [fused[at * HIDDEN + row] for row in range(HIDDEN)]
            native[f"model.layers.{i}.self_attn.{letter}_proj.weight"] = torch.stack(rows)
    return _llama(native, num_key_value_heads=HEADS, rms_norm_eps=1e-6)


def _qwen(tensors: Tensors, length: int) -> Qwen2ForCausalLM:
    native = {
        "model.embed_tokens.weight": tensors["transformer.wte.weight"],
        "model.norm.weight": tensors["transformer.ln_f.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    for i in range(LAYERS):
        old, new = f"transformer.h.{i}", f"model.layers.{i}"
        for ours, theirs in (
            ("input_layernorm", "ln_1"),
            ("post_attention_layernorm", "ln_2"),
            ("self_attn.o_proj", "attn.c_proj"),
            ("mlp.gate_proj", "mlp.w2"),
            ("mlp.up_proj", "mlp.w1"),
            ("mlp.down_proj", "mlp.c_proj"),
        ):
            native[f"{new}.{ours}.weight"] = tensors[f"{old}.{theirs}.weight"]
        for part in ("weight", "bias"):
            fused = tensors[f"{old}.attn.c_attn.{part}"]
            for at, letter in enumerate("qkv"):
                native[f"{new}.self_attn.{letter}_proj.{part}"] = fused[
                    at * HIDDEN : (at + 1) * HIDDEN
                ].clone()
    # Beyond the trained length Qwen raises the base in steps, and scales the query at position p
    # (from 1) by log(p) / log(trained).
    alpha = 1 if length <= TRAINED else 2 ** math.ceil(math.log2(length / TRAINED) + 1) - 1
    config = Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0 * alpha ** (D / (D - 2))},
    )
    model = Qwen2ForCausalLM(config)
    model.load_state_dict(native)
    scale = torch.tensor(
        [math.log(p, TRAINED) if p > TRAINED else 1.0 for p in range(1, length + 1)]
    )[:, None]
    for layer in model.model.layers:
        # The rotary embedding is linear: what scales q before it scales q after it.
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: output * scale)
    return model.eval()


_REFERENCES: dict[str, Callable[[Tensors, int], Any]] = {
    "internlm": _internlm,
    "internlm2": _internlm2,
    "internlm3": _internlm3,
    "baichuan2": _baichuan2,
    "qwen": _qwen,
}


def reference(name: str, folder: Path, length: int) -> Any:
    """transformers' model, for windows of `length` tokens."""
    if name in REMOTE:
        return _REFERENCES[name](specimen(name).tensors, length)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    return model.eval()
