"""What each format can hold, in the words of the table that users read. The formats' own `check` decides; a test holds them together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ability:
    """grid: which numbers a code can stand for. bits: of integer grids. here: whether QuantFlow reads and writes it. engines: who loads
    what of it; the conditions are those of the formats' `doubts`, and how they are known stands in docs/engines.md."""

    grid: str
    bits: tuple[int, ...]
    groups: str
    asymmetric: str
    mixed_bits: str
    act_order_index: str
    kv_scales: str
    tensor_parallel: str
    here: str
    engines: str


FILE = "beside it"  # kv_qparams.safetensors
BOTH = "read, write"

ABILITIES: dict[str, Ability] = {
    "compressed-tensors": Ability(
        "integers", (2, 3, 4, 5, 6, 7, 8), "any divisor, per channel", "yes, not for experts", "yes", "read",
        "beside it, or fp8 ones inside (--kv-scales fp8)", "yes", BOTH,
        "vLLM, SGLang (q, k, v alike; gate, up alike), transformers (unlike: all symmetric), LMDeploy (4 bits, groups of 32, 128)",
    ),
    "awq": Ability(
        "integers", (4,), "any divisor", "yes", "no", "no", FILE, "yes", BOTH,
        "AutoAWQ, transformers, vLLM, SGLang (q, k, v: all or none; gate, up too), LMDeploy (groups of 128)",
    ),
    "gptq": Ability(
        "integers", (2, 3, 4, 8), "any divisor, per channel", "yes, without a zero point of 0", "yes", "yes", FILE, "yes", BOTH,
        "AutoGPTQ, transformers; symmetric alone: GPTQModel, vLLM and SGLang (4, 8 bits, no index), LMDeploy (4 bits, groups of 128)",
    ),
    "gptq_v2": Ability(
        "integers", (2, 3, 4, 8), "any divisor, per channel", "yes", "yes", "yes", FILE, "yes", BOTH,
        "GPTQModel; vLLM and SGLang (symmetric, 4, 8 bits, no index); LMDeploy misreads it",
    ),
    "bitsandbytes": Ability(
        "NF4, single or double; no experts", (), "blocks of 64 (32 to 4096)", "no", "no", "no", FILE, "no", BOTH,
        "bitsandbytes, transformers",
    ),
    "turbomind": Ability(
        "integers", (4,), "any divisor", "yes", "no", "no", "inside, one a layer and rank", "yes, inside", BOTH,
        "LMDeploy v0.1, none later",
    ),
    "gguf": Ability(
        "integers, floating minimums", (4, 8), "multiples of 32", "4 bits, where -zero * scale is exact", "yes", "no", FILE, "no", BOTH,
        "llama.cpp, Ollama, LM Studio",
    ),
    "huggingface": Ability(
        "any, dequantised", (2, 3, 4, 5, 6, 7, 8), "any", "yes", "yes", "yes", FILE, "yes", BOTH, "transformers, vLLM, everything"
    ),
}  # fmt: skip
