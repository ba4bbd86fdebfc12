"""A plain checkpoint: every weight as the numbers that its codes stand for. Read by everything, and
four to eight times as large.

In float32 it is what dequantisation gives, bit for bit. In 16 bits a product of code and scale is
rounded, unless the numbers happen to fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantflow.errors import FormatError, Problem
from quantflow.formats.base import (
    SAFETENSORS_DTYPE,
    ConfigRequest,
    Spec,
    check_tensor,
    grid_problems,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantflow.quant.numbers import QuantizedTensor
    from quantflow.quant.scheme import Scheme


@dataclass(frozen=True)
class HuggingFace:
    """dtype: None is the model's own. rounded: write also weights that do not fit into it."""

    name: str = "huggingface"
    dtype: str | None = "float32"
    rounded: bool = False
    container: str = "directory"
    min_zero: int = 0
    kv_scales: tuple[str, ...] = ()
    parallel: bool = True
    holds_index: bool = True
    suffixes: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """All that there are."""
        from quantflow.quant.numbers import NUMBERS

        return tuple(NUMBERS)

    def scale_dtype(self, model_dtype: str) -> str:
        return self.dtype or model_dtype

    def check(
        self,
        module: str,
        shape: tuple[int, int],
        scheme: Scheme,
        *,
        act_order_index: bool,
        tp: int = 1,
        tp_dim: int | None = None,
    ) -> list[Problem]:
        return grid_problems(module, shape, scheme, tp, tp_dim, act_order_index, kinds=self.kinds)

    def nearest(self, module: str, scheme: Scheme, shape: tuple[int, int]) -> Scheme:
        return scheme

    def prefers_symmetric(self, *, experts: bool) -> bool:
        return False

    def shares_scheme(self, module: str) -> bool:
        return False

    def specs(
        self, module: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: str, has_index: bool
    ) -> dict[str, Spec]:
        return {f"{module}.weight": (SAFETENSORS_DTYPE[scale_dtype], shape)}

    def encode(
        self, module: str, tensor: QuantizedTensor, model_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        import torch

        check_tensor(module, tensor)
        exact = tensor.dequantize()
        dtype = getattr(torch, self.dtype) if self.dtype else model_dtype
        stored, name = exact.to(dtype), str(dtype).removeprefix("torch.")
        if beyond := int(stored.isinf().sum()):
            found = f"{beyond} of {stored.numel()} weights are beyond the range of {name}"
            raise FormatError(
                Problem(
                    f"{module}.weight",
                    found,
                    "numbers that fit",
                    "" if dtype == torch.float32 else "Use --dtype float32",
                )
            )
        if not self.rounded and (changed := int((stored.float() != exact).sum())):
            found = f"{changed} of {stored.numel()} weights are no exact {name}"
            raise FormatError(
                Problem(
                    f"{module}.weight",
                    found,
                    "numbers that fit",
                    "Use --dtype float32, or --requantize to round them",
                )
            )
        return {f"{module}.weight": stored}

    def scheme_of(self, module: str, config: Mapping[str, Any]) -> Scheme | None:
        return None

    def decode(
        self, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedTensor:
        raise FormatError(Problem(module, "a plain weight, which has no codes"))

    def quantization_config(self, request: ConfigRequest) -> dict[str, Any]:
        return {}

    def doubts(self, request: ConfigRequest) -> list[Problem]:
        return []

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {}
