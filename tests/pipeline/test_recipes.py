"""Every recipe that ships plans for the model it is for, from that model's published
config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.helpers.runs import invoke

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def config(
    model_type: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv: int,
    vocabulary: int,
    positions: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **more,
    }


MODELS: dict[str, dict[str, Any]] = {
    "internlm7b_w4_kv8": config(
        "internlm", 4096, 11008, 32, 32, 32, 103168, 2048, bias=True, torch_dtype="float16"
    ),
    "internlm20b_w4_kv8": config("internlm", 5120, 13824, 60, 40, 40, 103168, 4096, bias=False),
    "internlm2_w4_kv8": config(
        "internlm2",
        4096,
        14336,
        32,
        32,
        8,
        92544,
        32768,
        bias=False,
        rope_theta=1e6,
        rope_scaling={"type": "dynamic", "factor": 2.0},
    ),
    "llama2_w4": config("llama", 4096, 11008, 32, 32, 32, 32000, 4096, torch_dtype="float16"),
    "llama2_nf4": config("llama", 4096, 11008, 32, 32, 32, 32000, 4096, torch_dtype="float16"),
    "vicuna_w4": config("llama", 4096, 11008, 32, 32, 32, 32000, 4096, torch_dtype="float16"),
    "qwen_w4": {
        "model_type": "qwen",
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 151936,
        "seq_length": 8192,
        "max_position_embeddings": 32768,
        "kv_channels": 128,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "no_bias": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "bf16": True,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
    },
    "qwen2_w4": config(
        "qwen2",
        3584,
        18944,
        28,
        28,
        4,
        152064,
        32768,
        rope_theta=1e6,
        use_sliding_window=False,
        sliding_window=131072,
    ),
    "qwen2_gguf": config(
        "qwen2",
        3584,
        18944,
        28,
        28,
        4,
        152064,
        32768,
        rope_theta=1e6,
        use_sliding_window=False,
        sliding_window=131072,
    ),
    "qwen3_w4": config(
        "qwen3",
        4096,
        12288,
        36,
        32,
        8,
        151936,
        40960,
        head_dim=128,
        rope_theta=1e6,
        sliding_window=None,
    ),
    "mistral_w4": config(
        "mistral", 4096, 14336, 32, 32, 8, 32768, 32768, rope_theta=1e6, sliding_window=None
    ),
    "mixtral_w4": config(
        "mixtral",
        4096,
        14336,
        32,
        32,
        8,
        32000,
        32768,
        rope_theta=1e6,
        sliding_window=None,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "calibrate": config("llama", 4096, 11008, 32, 32, 32, 32000, 4096, torch_dtype="float16"),
    "kv_qparams": config("llama", 4096, 11008, 32, 32, 32, 32000, 4096, torch_dtype="float16"),
    "w4": config(
        "qwen2",
        896,
        4864,
        24,
        14,
        2,
        151936,
        32768,
        rope_theta=1e6,
        use_sliding_window=False,
        tie_word_embeddings=True,
    ),
    "smollm2_w4": config(
        "llama",
        576,
        1536,
        30,
        9,
        3,
        49152,
        8192,
        head_dim=64,
        rope_theta=1e5,
        tie_word_embeddings=True,
        torch_dtype="float32",
    ),
    "auto_awq": config("llama", 4096, 11008, 32, 32, 32, 32000, 4096, torch_dtype="float16"),
    "opt-125m_w4": {
        "model_type": "opt",
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "word_embed_proj_dim": 768,
        "activation_function": "relu",
        "torch_dtype": "float16",
    },
}
CONFIGS = Path(__file__).parent / "configs"
# Whose defaults are that model.
CLASSES = {
    "deepseek_v3_w4": "DeepseekV3Config",
    "gpt_oss_w4": "GptOssConfig",
    "qwen3_5_w4": "Qwen3_5Config",
}
LINEARS = {
    "mixtral_w4": 32 * (4 + 8 * 3),
    "opt-125m_w4": 12 * 6,
    "phi4_w4": 40 * 4,  # qkv, o, gate and up, down
    "gemma4_w4": 50 * 7 + 10 * 6,  # full attention has no v
    # qkv, z, b, a, out of a delta net; q, k, v, o; three of the MLP
    "qwen3_5_w4": 24 * (5 + 3) + 8 * (4 + 3),
    # a plain layer; q, k, v, o, experts, and one that all tokens see
    "glm4_5_w4": 7 + 45 * (4 + 128 * 3 + 3),
    # q and kv in two steps each, and o
    "deepseek_v3_w4": 3 * (5 + 3) + 58 * (5 + 256 * 3 + 3),
    "gpt_oss_w4": 36 * (4 + 128 * 3),
}
# A layer of Mixtral has 2.8 GB of weights, of GLM-4.5-Air 4.5, of gpt-oss 6.5, of DeepSeek-V3 23.
MEMORY_GIB = {
    "mixtral_w4": 24,
    "gemma4_w4": 16,
    "glm4_5_w4": 32,
    "gpt_oss_w4": 40,
    "deepseek_v3_w4": 150,
}


def published(name: str) -> dict[str, Any]:
    """The config.json of the model that a recipe is for."""
    if name in MODELS:
        return MODELS[name]
    if name in CLASSES:
        return {**getattr(transformers, CLASSES[name])().to_dict(), "dtype": "bfloat16"}
    values: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return values


def gallery() -> dict[str, list[str]]:
    """Recipe -> the cells of its row in recipes/README.md."""
    lines = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("| [")
    ]
    return {row[0].partition("]")[0].removeprefix("["): row for row in rows}


def test_the_gallery_shows_every_recipe() -> None:
    assert sorted(gallery()) == [path.stem for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_it_plans_as_the_gallery_says(path: Path, tmp_path: Path) -> None:
    arguments: list[object] = ["plan", path, "--output", tmp_path / "out", "--json"]
    if not path.stem.startswith("demo_"):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(json.dumps(published(path.stem)))
        arguments += ["--model", tmp_path / "model", "--config-only"]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert sum(found["linears"].values()) == LINEARS.get(path.stem, 7 * found["layers"])
    assert found["estimate"]["seconds"] > 0
    assert found["estimate"]["peak_memory_bytes"] < MEMORY_GIB.get(path.stem, 12) * 2**30
    _, _, stages, formats, before, after, memory = gallery()[path.stem]
    steps = [next(iter(step)) for step in found["steps"]]
    assert stages == ", ".join(step for step in steps if step != "pack")
    assert formats == (
        ", ".join(step["pack"]["format"] for step in found["steps"] if "pack" in step) or "–"
    )
    artifact = found["estimate"]["artifact_bytes"]
    assert (before, after) == (shown(found["weight_bytes"]), shown(artifact) if artifact else "–")
    assert memory == shown(found["estimate"]["peak_memory_bytes"])


def shown(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
