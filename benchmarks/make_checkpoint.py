"""Write a random checkpoint of a real model's shape, under its original tensor names, for
benchmarks of time and memory.

    python benchmarks/make_checkpoint.py --shape internlm-7b --output build/internlm-7b
    python benchmarks/make_checkpoint.py --shape llama-4g --output build/llama-4g [--single-file]
    python benchmarks/make_checkpoint.py --shape llama-8b --packed --output build/llama-8b-w4

--packed: linears of random 4-bit codes in groups of 128, as compressed-tensors packs them, for
benchmarks of the engine.

Tensors are written one at a time, so a 15 GB checkpoint needs little memory. The tokenizer is the
demo model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from quantflow.checkpoints.tensor_file import ITEM_BYTES, TensorWriter
from quantflow.formats import FORMATS
from quantflow.formats.base import ConfigRequest
from quantflow.quant.scheme import Scheme

SHAPES: dict[str, dict[str, Any]] = {
    "internlm-7b": {
        "family": "internlm",
        "hidden": 4096,
        "inner": 11008,
        "layers": 32,
        "heads": 32,
        "kv": 32,
        "vocabulary": 103168,
    },
    "llama-8b": {
        "family": "llama",
        "hidden": 4096,
        "inner": 14336,
        "layers": 32,
        "heads": 32,
        "kv": 8,
        "vocabulary": 128256,
    },
    # Many small layers: what must stay flat is memory against depth.
    "llama-4g": {
        "family": "llama",
        "hidden": 2048,
        "inner": 5632,
        "layers": 43,
        "heads": 16,
        "kv": 8,
        "vocabulary": 32000,
    },
    # As small as the model can be for its own arrays, and not the interpreter's, to make the peak.
    "llama-small": {
        "family": "llama",
        "hidden": 1536,
        "inner": 4096,
        "layers": 3,
        "heads": 12,
        "kv": 4,
        "vocabulary": 16384,
    },
    "llama-1b": {
        "family": "llama",
        "hidden": 2048,
        "inner": 5632,
        "layers": 22,
        "heads": 32,
        "kv": 4,
        "vocabulary": 32000,
    },
}
DEMO = Path(__file__).resolve().parents[1] / "calib_data" / "demo_model"


def tensors(shape: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, size = shape["hidden"], shape["inner"], shape["hidden"] // shape["heads"]
    bias = shape["family"] == "internlm"
    yield "model.embed_tokens.weight", (shape["vocabulary"], hidden)
    for i in range(shape["layers"]):
        p = f"model.layers.{i}"
        yield f"{p}.input_layernorm.weight", (hidden,)
        for name, rows in (
            ("q", hidden),
            ("k", shape["kv"] * size),
            ("v", shape["kv"] * size),
            ("o", hidden),
        ):
            yield f"{p}.self_attn.{name}_proj.weight", (rows, hidden)
            if bias:
                yield f"{p}.self_attn.{name}_proj.bias", (rows,)
        yield f"{p}.post_attention_layernorm.weight", (hidden,)
        yield f"{p}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{p}.mlp.up_proj.weight", (inner, hidden)
        yield f"{p}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape["vocabulary"], hidden)


GROUP = 128
Spec = tuple[str, tuple[int, ...]]  # dtype and shape, as a safetensors header has them


def packed(everything: dict[str, Spec]) -> tuple[dict[str, Spec], dict[str, Any]]:
    """The tensors of the same model with its layers' linears packed, and the
    quantization_config."""
    specs: dict[str, Spec] = {}
    for name, (dtype, shape) in everything.items():
        if "_proj.weight" in name:
            n, k = shape
            specs |= {
                f"{name}_packed": ("I32", (n, k // 8)),
                f"{name}_scale": (dtype, (n, k // GROUP)),
                f"{name}_shape": ("I64", (2,)),
            }
        else:
            specs[name] = (dtype, shape)
    scheme = Scheme(4, GROUP, True)
    request = ConfigRequest({"model.layers.0.mlp.up_proj": scheme}, ["lm_head"], scheme)
    return specs, FORMATS["compressed-tensors"].quantization_config(request)


def value(
    name: str, dtype: str, shape: tuple[int, ...], generator: torch.Generator, device: str
) -> torch.Tensor:
    """A tensor of random weights, packed codes or their scales, with products of about the size of
    their inputs."""
    if dtype == "I32":
        return torch.randint(
            -(2**31), 2**31, shape, generator=generator, dtype=torch.int32, device=device
        )
    if name.endswith("weight_scale"):
        # codes of -8 to 7 have a mean square of 21.5
        return torch.full(shape, (shape[1] * GROUP) ** -0.5 / 4.6)
    if len(shape) == 1:
        return torch.ones(shape) if "norm" in name else torch.zeros(shape)
    # One block of random rows, repeated: filling 15 GB from a generator would take longer than
    # quantising it.
    block = (
        torch.randn(min(shape[0], 512), shape[1], generator=generator, device=device)
        * shape[1] ** -0.5
    )
    return block.to(torch.bfloat16).repeat(-(-shape[0] // len(block)), 1)[: shape[0]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    parser.add_argument("--single-file", action="store_true", help="one file, however large")
    parser.add_argument("--packed", action="store_true", help="4-bit linears")
    args = parser.parse_args()
    shape = {**SHAPES[args.shape], **({"layers": args.layers} if args.layers else {})}
    args.output.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": shape["family"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["inner"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv"],
        "vocab_size": shape["vocabulary"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        **({"bias": True} if shape["family"] == "internlm" else {}),
    }
    everything: dict[str, Spec] = {name: ("BF16", dims) for name, dims in tensors(shape)}
    linears = {name: dims for name, (_, dims) in everything.items()}
    if args.packed:
        everything, config["quantization_config"] = packed(everything)
    (args.output / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, args.output / name)
    limit = 2**62 if args.single_file else 10**9
    shards: list[dict[str, Spec]] = [{}]
    total = used = 0
    for name, (dtype, dims) in everything.items():
        size = torch.Size(dims).numel() * ITEM_BYTES[dtype]
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = (dtype, dims)
        used += size
        total += size
    names = (
        [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) > 1
        else ["model.safetensors"]
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    for file_name, shard in zip(names, shards, strict=True):
        with TensorWriter(args.output / file_name, shard, {"format": "pt"}) as writer:
            for name, (dtype, dims) in shard.items():
                if name.endswith("weight_shape"):
                    writer.write(name, torch.tensor(linears[name.removesuffix("_shape")]))
                else:
                    tensor = value(name, dtype, dims, generator, device)
                    writer.write(
                        name, (tensor if dtype == "I32" else tensor.to(torch.bfloat16)).cpu()
                    )
    if len(shards) > 1:
        index = {
            "metadata": {},
            "weight_map": {n: f for f, shard in zip(names, shards, strict=True) for n in shard},
        }
        (args.output / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"{args.output}: {total / 1e9:.1f} GB in {len(shards)} file(s)")


if __name__ == "__main__":
    main()
