"""AWQ, version "gemm": read by AutoAWQ, vLLM, LMDeploy and transformers. 4 bits, fp16 scales, no
group index.

`qweight` int32 `[K, N/8]` and `qzeros` int32 `[G, N/8]`, nibbles interleaved along the outputs
(`packing.AWQ_ORDER`), and `scales` fp16 `[G, N]`. Zero points are stored as they are; a symmetric
weight has 8 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantflow.errors import FormatError, Problem
from quantflow.formats.abilities import Ability
from quantflow.formats.base import ConfigRequest, Format, Spec
from quantflow.formats.engines import refusals, unlike_parts
from quantflow.formats.naming import main_scheme, with_fused
from quantflow.formats.settings import names, own_settings, read_scheme, setting
from quantflow.formats.tensors import exact_scales, expect_shape, integer_grid, take
from quantflow.formats.weight import Weight, integer_scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantflow.quant.numbers import QuantizedTensor
    from quantflow.quant.numbers.integer import IntegerTensor
    from quantflow.quant.scheme import Scheme


EIGHTS = 0x88888888 - 2**32  # an int32 of eight zero points of 8


@dataclass(frozen=True)
class Awq(Format):
    title = "AWQ"
    ability = Ability("integers", (4,), "any divisor", mixed_bits="no")
    suffixes = (".qweight", ".qzeros", ".scales")
    marks = (".qweight",)

    name: str = "awq"

    def scale_dtype(self, model_dtype: str) -> str:
        return "float16"

    def _refused(self, weight: Weight) -> Iterator[Problem]:
        module, scheme, n = weight.module, weight.scheme, weight.rank_shape[0]
        if self.holds_numbers(scheme.kind) and scheme.bits != 4:
            hint = "Use gptq or compressed-tensors"
            yield Problem(module, f"{scheme.bits} bits", "4 bits, the only width of AWQ", hint)
        if n % 8:
            hint = "Use compressed-tensors, or ignore this module"
            yield Problem(module, f"{n} output channels", "a multiple of 8", hint)
        if module == "lm_head":
            hint = "Add lm_head to weights.ignore"
            yield Problem(module, "readers of AWQ expect it unquantised", hint=hint)

    def nearest(self, weight: Weight) -> Scheme:
        return replace(integer_scheme(weight), bits=4)

    def shares_scheme(self, module: str) -> bool:
        return True

    def specs(self, weight: Weight, scale_dtype: str) -> dict[str, Spec]:
        module, (n, k), groups = weight.module, weight.shape, weight.scheme.groups(weight.shape[1])
        return {
            f"{module}.qweight": ("I32", (k, n // 8)),
            f"{module}.qzeros": ("I32", (groups, n // 8)),
            f"{module}.scales": ("F16", (groups, n)),
        }

    def _encode(
        self, module: str, tensor: QuantizedTensor, model_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        import torch

        from quantflow.quant.packing import pack_awq

        tensor = integer_grid(module, tensor)
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
        skipped = names(config, "modules_to_not_convert")
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

    def all_symmetric(self, modules: Collection[str], read: Callable[[str], Tensor]) -> bool:
        """Whether every zero point is 8."""
        return all(bool((read(f"{module}.qzeros") == EIGHTS).all()) for module in modules)

    def _decode(
        self, module: str, scheme: Scheme, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> IntegerTensor:
        """As the protocol says. The scheme is symmetric if every zero point is 8, since
        `zero_point` is true in either case."""
        import torch

        from quantflow.quant.numbers.integer import IntegerTensor
        from quantflow.quant.packing import unpack_awq

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

    def _unsayable(self, request: ConfigRequest) -> list[Problem]:
        scheme = main_scheme(request.modules, request.default)
        # Symmetric and asymmetric modules may be mixed: they are stored alike.
        problems = [
            Problem(
                name, f"{own}", f"{scheme} as elsewhere, since AWQ has one width and group size"
            )
            for name, own in request.modules.items()
            if (own.bits, own.group_size) != (scheme.bits, scheme.group_size)
        ]
        for name in _ignored(request):
            problems += [
                Problem(name, f"ignoring it would also ignore {other}")
                for other in request.modules
                if name in other
            ]
        return problems + super()._unsayable(request)

    def _config(self, request: ConfigRequest) -> dict[str, Any]:
        scheme, ignored = main_scheme(request.modules, request.default), _ignored(request)
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


def _ignored(request: ConfigRequest) -> list[str]:
    """Readers look for an ignored name anywhere in a module's name; SGLang for that of what it
    fuses, which must then be there too."""
    return with_fused(request.ignored, complete=True)
