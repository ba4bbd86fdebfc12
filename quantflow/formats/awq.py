"""AWQ, version "gemm": read by AutoAWQ, vLLM, LMDeploy and transformers. 4 bits, fp16 scales, no
group index.

`qweight` int32 `[K, N/8]` and `qzeros` int32 `[G, N/8]`, nibbles interleaved along the outputs
(`packing.AWQ_ORDER`), and `scales` fp16 `[G, N]`. Zero points are stored as they are; a symmetric
weight has 8 everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantflow.errors import FormatError, Problem
from quantflow.formats.base import (
    ConfigRequest,
    Spec,
    check_tensor,
    exact_scales,
    expect_shape,
    grid_problems,
    integer_grid,
    integer_scheme,
    main_scheme,
    own_settings,
    rank_shape,
    read_scheme,
    setting,
    take,
    texts,
    with_fused,
)
from quantflow.formats.engines import refusals, unlike_parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantflow.quant.numbers import QuantizedTensor
    from quantflow.quant.numbers.integer import IntegerTensor
    from quantflow.quant.scheme import Scheme


EIGHTS = 0x88888888 - 2**32  # an int32 of eight zero points of 8


@dataclass(frozen=True)
class Awq:
    name: str = "awq"
    container: str = "directory"
    dtype: str | None = None
    min_zero: int = 0
    kinds: tuple[str, ...] = ("integer",)
    kv_scales: tuple[str, ...] = ()
    parallel: bool = True
    holds_index: bool = False
    suffixes: tuple[str, ...] = (".qweight", ".qzeros", ".scales")
    marks: tuple[str, ...] = (".qweight",)

    def scale_dtype(self, model_dtype: str) -> str:
        return "float16"

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
        problems = grid_problems(
            module, shape, scheme, tp, tp_dim, act_order_index, kinds=self.kinds
        )
        if scheme.kind == "integer" and scheme.bits != 4:
            problems.append(
                Problem(
                    module,
                    f"{scheme.bits} bits",
                    "4 bits, the only width of AWQ",
                    "Use gptq or compressed-tensors",
                )
            )
        n = rank_shape(shape, tp, tp_dim)[0]
        if n % 8:
            problems.append(
                Problem(
                    module,
                    f"{n} output channels",
                    "a multiple of 8",
                    "Use compressed-tensors, or ignore this module",
                )
            )
        if module == "lm_head":
            problems.append(
                Problem(
                    module,
                    "readers of AWQ expect it unquantised",
                    hint="Add lm_head to weights.ignore",
                )
            )
        if act_order_index:
            problems.append(
                Problem(
                    module,
                    "a group index, which AWQ cannot hold",
                    hint="Use act_order: static, or gptq",
                )
            )
        return problems

    def nearest(self, module: str, scheme: Scheme, shape: tuple[int, int]) -> Scheme:
        return replace(integer_scheme(scheme, shape), bits=4)

    def prefers_symmetric(self, *, experts: bool) -> bool:
        return False

    def shares_scheme(self, module: str) -> bool:
        return True

    def specs(
        self, module: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: str, has_index: bool
    ) -> dict[str, Spec]:
        n, k = shape
        groups = scheme.groups(k)
        return {
            f"{module}.qweight": ("I32", (k, n // 8)),
            f"{module}.qzeros": ("I32", (groups, n // 8)),
            f"{module}.scales": ("F16", (groups, n)),
        }

    def encode(
        self, module: str, tensor: QuantizedTensor, model_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        import torch

        from quantflow.quant.packing import pack_awq

        tensor = integer_grid(module, tensor)
        problems = self.check(module, tensor.shape, tensor.scheme, act_order_index=tensor.indexed)
        if problems:
            raise FormatError(problems)
        check_tensor(module, tensor)
        return {
            f"{module}.qweight": pack_awq(tensor.codes),
            f"{module}.qzeros": pack_awq(tensor.zeros),
            f"{module}.scales": exact_scales(f"{module}.scales", tensor.scales, torch.float16)
            .t()
            .contiguous(),
        }

    def scheme_of(self, module: str, config: Mapping[str, Any]) -> Scheme | None:
        """As the protocol says; `symmetric` here is what the config says, and `decode` knows
        better."""
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            raise FormatError(Problem("quantization_config.version", f"{version!r}", "'gemm'"))
        skipped = texts(config, "modules_to_not_convert")
        # readers look for the name anywhere in the module's
        if module == "lm_head" or any(name in module for name in skipped):
            return None
        own = own_settings(config, module)
        if own is None:
            return None
        merged = {**config, **own}
        bits = setting(merged, "bits", int)
        if bits != 4:
            raise FormatError(Problem("quantization_config.bits", f"{bits}", "4"))
        return read_scheme(
            bits,
            setting(merged, "group_size", int),
            not setting(config, "zero_point", bool, default=True),
            module,
        )

    def is_symmetric(self, qzeros: Tensor) -> bool:
        """Whether every zero point of a packed tensor is 8."""
        return bool((qzeros == EIGHTS).all())

    def decode(
        self, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> IntegerTensor:
        """As the protocol says. The scheme is symmetric if every zero point is 8, since
        `zero_point` is true in either case."""
        import torch

        from quantflow.quant.numbers.integer import IntegerTensor
        from quantflow.quant.packing import unpack_awq

        scheme = self.scheme_of(module, config)
        if scheme is None:
            raise FormatError(
                Problem(module, "not quantised, says quantization_config.modules_to_not_convert")
            )
        qweight = take(tensors, f"{module}.qweight", torch.int32)
        k, n = qweight.shape[0], qweight.shape[1] * 8
        if k % scheme.group_of(k):
            raise FormatError(
                Problem(
                    f"{module}.qweight",
                    f"{k} input channels",
                    f"a multiple of group_size {scheme.group_size}",
                )
            )
        qzeros, scales = (
            take(tensors, f"{module}.qzeros", torch.int32),
            take(tensors, f"{module}.scales"),
        )
        expect_shape(f"{module}.qzeros", qzeros, (scheme.groups(k), n // 8))
        expect_shape(f"{module}.scales", scales, (scheme.groups(k), n))
        zeros = unpack_awq(qzeros)
        symmetric = bool((zeros == scheme.midpoint).all())
        scheme = read_scheme(scheme.bits, scheme.group_size, symmetric, module)
        return IntegerTensor(scheme, unpack_awq(qweight), scales.t().contiguous(), zeros)

    def quantization_config(self, request: ConfigRequest) -> dict[str, Any]:
        scheme = main_scheme(request.modules, request.default)
        # Symmetric and asymmetric modules may be mixed: they are stored alike.
        problems = [
            Problem(
                name, f"{own}", f"{scheme} as elsewhere, since AWQ has one width and group size"
            )
            for name, own in request.modules.items()
            if (own.bits, own.group_size) != (scheme.bits, scheme.group_size)
        ]
        # Readers look for an ignored name anywhere in a module's name; SGLang for that of what it
        # fuses, which must then be there too.
        ignored = with_fused(request.ignored, complete=True)
        for name in ignored:
            problems += [
                Problem(name, f"ignoring it would also ignore {other}")
                for other in request.modules
                if name in other
            ]
        if request.act_order:
            problems.append(
                Problem(
                    "act_order",
                    "a group index, which AWQ cannot hold",
                    hint="Use act_order: static, or gptq",
                )
            )
        if request.kv_scales:
            problems.append(Problem("kv_scales", "AWQ has no place for KV scales"))
        if problems:
            raise FormatError(problems)
        # AutoAWQ and transformers leave lm_head alone unasked, and null is what their own
        # checkpoints say then.
        skipped = None if set(ignored) <= {"lm_head"} else ignored
        return {
            "quant_method": "awq",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            # also for symmetric weights: qzeros are there, and vLLM's fast kernels ask for them
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": skipped,
        }

    def doubts(self, request: ConfigRequest) -> list[Problem]:
        # which all have zero points here
        alike = {name: replace(scheme, symmetric=False) for name, scheme in request.modules.items()}
        return [*unlike_parts(alike, request.ignored), *refusals(self.name, request.modules)]

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {}
