"""The architectures QuantFlow knows. To add one: a table in this folder, a line here, a parity
test."""

from __future__ import annotations

from quantflow.models.architecture import Architecture
from quantflow.models.internlm import INTERNLM, INTERNLM2
from quantflow.models.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from quantflow.models.mixture import MIXTRAL, QWEN3_MOE
from quantflow.models.opt import OPT
from quantflow.models.qwen import QWEN

ARCHITECTURES: dict[str, Architecture] = {
    model_type: architecture
    for architecture in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        INTERNLM,
        INTERNLM2,
        QWEN,
        MIXTRAL,
        QWEN3_MOE,
        OPT,
    )
    for model_type in architecture.model_types
}
