"""Tiny real model directories and texts for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from quantflow.checkpoints.tensor_file import save_tensors

SENTENCES = [
    f"The {adjective} {animal} {verb} over the {place} number {n}."
    for n, (adjective, animal, verb, place) in enumerate(
        (a, b, c, d)
        for a in ("quick", "small", "old", "grey")
        for b in ("fox", "cat", "whale", "bird")
        for c in ("jumps", "sleeps", "walks", "looks")
        for d in ("river", "hill", "house", "lake")
    )
]


def write_text(path: Path, start: int = 0, stop: int = 256) -> Path:
    """Documents of two sentences each, separated by `<|endoftext|>`."""
    pairs = [" ".join(SENTENCES[i : i + 2]) for i in range(start, stop, 2)]
    path.write_text("\n<|endoftext|>\n".join(pairs) + "\n", encoding="utf-8")
    return path


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer with BOS `<s>` = 0 and EOS `</s>` = 1; returns its vocabulary
    size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def write_llama(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any
) -> Path:
    """A two-layer random Llama (hidden 64, intermediate 96, 4 heads, 2 KV heads) with a
    tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": vocabulary, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0,
        "tie_word_embeddings": False, "dtype": str(dtype).removeprefix("torch."), **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    hidden, inner, heads, kv = (
        config[k]
        for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    size = hidden // heads
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 0.08) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    tensors = {
        "model.embed_tokens.weight": random(vocabulary, hidden, scale=0.5),
        "model.norm.weight": 1 + random(hidden),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = random(vocabulary, hidden)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}"
        tensors |= {
            f"{p}.input_layernorm.weight": 1 + random(hidden),
            f"{p}.post_attention_layernorm.weight": 1 + random(hidden),
            f"{p}.self_attn.q_proj.weight": random(heads * size, hidden),
            f"{p}.self_attn.k_proj.weight": random(kv * size, hidden),
            f"{p}.self_attn.v_proj.weight": random(kv * size, hidden),
            f"{p}.self_attn.o_proj.weight": random(hidden, heads * size),
            f"{p}.mlp.gate_proj.weight": random(inner, hidden),
            f"{p}.mlp.up_proj.weight": random(inner, hidden),
            f"{p}.mlp.down_proj.weight": random(hidden, inner),
        }
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder
