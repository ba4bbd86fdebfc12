"""What each format can hold, in the words of the table that users read. The formats' own `check` decides; a test holds them together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ability:
    """here: whether QuantFlow reads and writes it. engines: who loads it, by their documentation; which of them this project has run stands
    in the README."""

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

ABILITIES: dict[str, Ability] = {
    "compressed-tensors": Ability(
        (2, 3, 4, 8), "any divisor, per channel", "yes, not for experts", "yes", "no", FILE, "yes", "read, write", "vLLM, transformers"
    ),
    "awq": Ability((4,), "any divisor", "yes", "no", "no", FILE, "yes", "read, write", "AutoAWQ, vLLM, LMDeploy, SGLang, transformers"),
    "gptq": Ability(
        (2, 3, 4, 8), "any divisor, per channel", "yes, without a zero point of 0", "yes", "yes", FILE, "yes", "read, write",
        "GPTQModel, AutoGPTQ, vLLM, LMDeploy, SGLang, transformers",
    ),
    "gptq_v2": Ability((2, 3, 4, 8), "any divisor, per channel", "yes", "yes", "yes", FILE, "yes", "read, write", "GPTQModel, SGLang"),
}  # fmt: skip
