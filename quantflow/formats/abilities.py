"""What each format can hold, in the words of the table that users read. The formats' own `check`
decides; a test holds them together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ability:
    """grid: which numbers a code can stand for. bits: of integer grids. here: whether QuantFlow
    reads and writes it. What engines load of it is in `engines.LOADS`."""

    grid: str
    bits: tuple[int, ...]
    groups: str
    asymmetric: str
    mixed_bits: str
    act_order_index: str
    kv_scales: str
    tensor_parallel: str
    here: str


FILE = "beside it"  # kv_qparams.safetensors
BOTH = "read, write"

ABILITIES: dict[str, Ability] = {
    "compressed-tensors": Ability(
        "integers",
        (2, 3, 4, 5, 6, 7, 8),
        "any divisor, per channel",
        "yes, not for experts",
        "yes",
        "read",
        "beside it, or fp8 ones inside (--kv-scales fp8)",
        "yes",
        BOTH,
    ),
    "awq": Ability("integers", (4,), "any divisor", "yes", "no", "no", FILE, "yes", BOTH),
    "gptq": Ability(
        "integers",
        (2, 3, 4, 8),
        "any divisor, per channel",
        "yes, without a zero point of 0",
        "yes",
        "yes",
        FILE,
        "yes",
        BOTH,
    ),
    "gptq_v2": Ability(
        "integers", (2, 3, 4, 8), "any divisor, per channel", "yes", "yes", "yes", FILE, "yes", BOTH
    ),
    "bitsandbytes": Ability(
        "NF4, single or double; no experts",
        (),
        "blocks of 64 (32 to 4096)",
        "no",
        "no",
        "no",
        FILE,
        "no",
        BOTH,
    ),
    "turbomind": Ability(
        "integers",
        (4,),
        "any divisor",
        "yes",
        "no",
        "no",
        "inside, one a layer and rank",
        "yes, inside",
        BOTH,
    ),
    "gguf": Ability(
        "integers, floating minimums",
        (4, 8),
        "multiples of 32",
        "4 bits, where -zero * scale is exact",
        "yes",
        "no",
        FILE,
        "no",
        BOTH,
    ),
    "huggingface": Ability(
        "any, dequantised", (2, 3, 4, 5, 6, 7, 8), "any", "yes", "yes", "yes", FILE, "yes", BOTH
    ),
}
