"""A plain checkpoint: every weight as the numbers that its codes stand for. Read by everything, and
four to eight times as large.

In float32 it is what dequantisation gives, bit for bit. In 16 bits a product of code and scale is
rounded, unless the numbers happen to fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantflow.errors import FormatError, Problem
from quantflow.formats.abilities import Ability
from quantflow.formats.base import SAFETENSORS_DTYPE, ConfigRequest, Format, Spec
from quantflow.formats.weight import Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantflow.quant.numbers import QuantizedTensor
    from quantflow.quant.scheme import Scheme


@dataclass(frozen=True)
class HuggingFace(Format):
    """dtype: None is the model's own. rounded: write also weights that do not fit into it."""

    title = "a plain checkpoint"
    ability = Ability("any, dequantised", (2, 3, 4, 5, 6, 7, 8), "any", act_order_index="yes")
    kinds = ()
    keeps_codes = False
    holds_plain = True
    holds_embedding = True
    holds_index = True

    name: str = "huggingface"
    dtype: str | None = "float32"
    rounded: bool = False

    def scale_dtype(self, model_dtype: str) -> str:
        return self.dtype or model_dtype

    def nearest(self, weight: Weight) -> Scheme:
        return weight.scheme

    def specs(self, weight: Weight, scale_dtype: str) -> dict[str, Spec]:
        return {f"{weight.module}.weight": (SAFETENSORS_DTYPE[scale_dtype], weight.shape)}

    def _encode(
        self, module: str, tensor: QuantizedTensor, model_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        import torch

        exact = tensor.dequantize()
        dtype = getattr(torch, self.dtype) if self.dtype else model_dtype
        stored, name = exact.to(dtype), str(dtype).removeprefix("torch.")
        if beyond := int(stored.isinf().sum()):
            raise FormatError(
                Problem(
                    f"{module}.weight",
                    f"{beyond} of {stored.numel()} weights are beyond the range of {name}",
                    "numbers that fit",
                    "" if dtype == torch.float32 else "Use --dtype float32",
                )
            )
        if not self.rounded and (changed := int((stored.float() != exact).sum())):
            raise FormatError(
                Problem(
                    f"{module}.weight",
                    f"{changed} of {stored.numel()} weights are no exact {name}",
                    "numbers that fit",
                    "Use --dtype float32, or --requantize to round them",
                )
            )
        return {f"{module}.weight": stored}

    def scheme_of(self, module: str, config: Mapping[str, Any]) -> Scheme | None:
        return None

    def _decode(
        self, module: str, scheme: Scheme, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedTensor:
        raise FormatError(Problem(module, "a plain weight, which has no codes"))

    def quantization_config(self, request: ConfigRequest) -> dict[str, Any]:
        """Nothing: nothing is quantised any more."""
        return {}

    def _config(self, request: ConfigRequest) -> dict[str, Any]:
        return {}

    def in_dtype(self, dtype: str | None, *, rounded: bool) -> HuggingFace:
        dtype = dtype or self.dtype
        if dtype not in ("float32", "float16", "bfloat16"):
            raise FormatError(Problem("--dtype", repr(dtype), "float32, float16 or bfloat16"))
        return replace(self, dtype=dtype, rounded=rounded)

    @property
    def unrounded(self) -> HuggingFace:
        return replace(self, dtype=None)
