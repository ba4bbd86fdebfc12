"""GPTQ, in AutoGPTQ's version 1 and GPTQModel's version 2. 2, 3, 4 or 8 bits, fp16 scales, a group
index where there is one.

`qweight` int32 `[K*b/32, N]` packed along the inputs, `qzeros` int32 `[G, N*b/32]` along the
outputs, `scales` fp16 `[G, N]`, `g_idx` int32 `[K]`. Version 1 stores each zero point less one, so
that it cannot hold 0: AutoGPTQ writes the -1 over the rest of its word and reads 16, GPTQModel
borrows one from the field above and gives it back. Modules with settings of their own are listed in
GPTQModel's `dynamic`, which vLLM reads as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from quantflow.errors import FormatError, Problem
from quantflow.formats.abilities import Ability
from quantflow.formats.base import ConfigRequest, Format, Spec
from quantflow.formats.engines import refusals, unlike_parts
from quantflow.formats.naming import main_scheme, name_patterns, with_fused
from quantflow.formats.settings import own_settings, read_scheme, setting
from quantflow.formats.tensors import (
    exact_scales,
    expect_shape,
    group_index,
    integer_grid,
    plain_index,
    take,
)
from quantflow.formats.weight import Weight, integer_scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantflow.quant.numbers import QuantizedTensor
    from quantflow.quant.numbers.integer import IntegerTensor
    from quantflow.quant.scheme import Scheme

_PERIODS = {2: 16, 3: 32, 4: 8, 8: 4}  # bits -> how many codes fill whole words


@dataclass(frozen=True)
class Gptq(Format):
    title = "GPTQ"
    ability = Ability(
        "integers",
        (2, 3, 4, 8),
        "any divisor, per channel",
        asymmetric="yes, without a zero point of 0",
        act_order_index="yes",
    )
    suffixes: ClassVar[tuple[str, ...]] = (".qweight", ".qzeros", ".scales", ".g_idx")
    marks = (".qweight",)
    index_suffixes: ClassVar[tuple[str, ...]] = (".g_idx",)
    holds_index = True

    name: str = "gptq"
    version: ClassVar[int] = 1

    @property
    def min_zero(self) -> int:
        return 2 - self.version

    def scale_dtype(self, model_dtype: str) -> str:
        return "float16"

    def _refused(self, weight: Weight) -> Iterator[Problem]:
        module, bits = weight.module, weight.scheme.bits
        if not self.holds_numbers(weight.scheme.kind):
            return
        if bits not in _PERIODS:
            yield Problem(module, f"{bits} bits", "2, 3, 4 or 8", "Use compressed-tensors")
            return
        period = _PERIODS[bits]
        for count, side in zip(weight.rank_shape, ("output", "input"), strict=True):
            if count % period:
                hint = "Use compressed-tensors, or ignore this module"
                expected = f"a multiple of {period}, as {bits} bits must fill whole words"
                yield Problem(module, f"{count} {side} channels", expected, hint)

    def nearest(self, weight: Weight) -> Scheme:
        scheme = integer_scheme(weight)
        return replace(scheme, bits=8) if 4 < scheme.bits < 8 else scheme

    def prefers_symmetric(self, *, experts: bool) -> bool:
        return True

    def specs(self, weight: Weight, scale_dtype: str) -> dict[str, Spec]:
        module, (n, k), scheme = weight.module, weight.shape, weight.scheme
        groups = scheme.groups(k)
        return {
            f"{module}.qweight": ("I32", (k * scheme.bits // 32, n)),
            f"{module}.qzeros": ("I32", (groups, n * scheme.bits // 32)),
            f"{module}.scales": ("F16", (groups, n)),
            f"{module}.g_idx": ("I32", (k,)),
        }

    def _encode(
        self, module: str, tensor: QuantizedTensor, model_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        import torch

        from quantflow.quant.packing import pack_rows, pack_rows_transposed

        tensor = integer_grid(module, tensor)
        scheme, k, zeros = tensor.scheme, tensor.shape[1], tensor.zeros
        if self.version == 1:
            if int(zeros.count_nonzero()) < zeros.numel():
                raise FormatError(
                    Problem(
                        f"{module}.qzeros",
                        f"{int((zeros == 0).sum())} zero points are 0, which version 1 would store"
                        " as -1",
                        f"zero points of 1..{scheme.levels}",
                        "Use gptq_v2, a symmetric scheme, or another format",
                    )
                )
            zeros = zeros - 1
        index = tensor.group_index
        if index is None:
            index = plain_index(k, scheme.group_of(k)).to(tensor.codes.device)
        return {
            f"{module}.qweight": pack_rows_transposed(tensor.codes, scheme.bits),
            f"{module}.qzeros": pack_rows(zeros.t(), scheme.bits),
            f"{module}.scales": (
                exact_scales(f"{module}.scales", tensor.scales, torch.float16).t().contiguous()
            ),
            f"{module}.g_idx": index,
        }

    def scheme_of(self, module: str, config: Mapping[str, Any]) -> Scheme | None:
        version = declared_version(config)
        if version != self.name:
            raise FormatError(
                Problem("quantization_config.checkpoint_format", f"{version!r}", f"{self.name!r}")
            )
        if module == "lm_head" and not config.get("lm_head"):
            return None
        own = own_settings(config, module)
        if own is None:
            return None
        merged = {**config, **own}
        bits = setting(merged, "bits", int)
        if bits not in _PERIODS:
            raise FormatError(Problem("quantization_config.bits", f"{bits}", "2, 3, 4 or 8"))
        return read_scheme(
            bits, setting(merged, "group_size", int), setting(merged, "sym", bool), module
        )

    def _decode(
        self, module: str, scheme: Scheme, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> IntegerTensor:
        """As the protocol says. A zero point of 0 in version 1 is read where GPTQModel wrote it;
        others lose its neighbours."""
        import torch

        from quantflow.quant.numbers.integer import IntegerTensor
        from quantflow.quant.packing import unpack_rows

        qweight = take(tensors, f"{module}.qweight", torch.int32)
        n, bits = qweight.shape[1], scheme.bits
        _not_ten_to_a_word(module, scheme, tensors)
        if qweight.shape[0] * 32 % bits:
            raise FormatError(
                Problem(
                    f"{module}.qweight",
                    f"{qweight.shape[0]} words a column",
                    f"whole codes of {bits} bits",
                )
            )
        k = qweight.shape[0] * 32 // bits
        if k % scheme.group_of(k) or n * bits % 32:
            raise FormatError(
                Problem(
                    f"{module}.qweight", f"shape {list(qweight.shape)}", f"one that fits {scheme}"
                )
            )
        groups = scheme.groups(k)
        qzeros, scales = (
            take(tensors, f"{module}.qzeros", torch.int32),
            take(tensors, f"{module}.scales"),
        )
        expect_shape(f"{module}.qzeros", qzeros, (groups, n * bits // 32))
        expect_shape(f"{module}.scales", scales, (groups, n))
        borrows = self.version == 1 and _by_gptqmodel(config) and bits != 3
        if borrows:  # it subtracts from whole words; for 3 bits from each field, which wraps
            qzeros = qzeros + sum(1 << shift for shift in range(0, 32, bits))
        zeros = unpack_rows(qzeros, bits, n).t().contiguous()
        if self.version == 1 and not borrows:
            zeros = (zeros + 1) & scheme.levels  # uint8 wraps by itself at 8 bits
            if bool((zeros == 0).any()) and not _by_gptqmodel(config):
                raise FormatError(
                    Problem(
                        f"{module}.qzeros",
                        f"{int((zeros == 0).sum())} zero points are -1, over which version 1 loses"
                        " others",
                        f"zero points of 1..{scheme.levels}, or quantization_config.meta.quantizer:"
                        " gptqmodel, which keeps them",
                        "Quantise it again, as gptq_v2",
                    )
                )
        if scheme.symmetric and not bool((zeros == scheme.midpoint).all()):
            hint = "The checkpoint may be of the other GPTQ version than its checkpoint_format says"
            raise FormatError(
                Problem(
                    f"{module}.qzeros",
                    f"zero points other than {scheme.midpoint} with sym: true",
                    hint=hint,
                )
            )
        # Symmetric weights, which may be declared as any, have one zero point, the middle: read as
        # the wrong version, its neighbour.
        neighbour = scheme.midpoint + (1 if self.version == 1 else -1)
        if not scheme.symmetric and zeros.numel() > 1 and bool((zeros == neighbour).all()):
            other = "gptq_v2" if self.version == 1 else "gptq"
            ambiguous = (
                f"every zero point is {neighbour} as {self.name}, and the middle,"
                f" {scheme.midpoint}, as {other}"
            )
            hint = (
                f"If they are symmetric, set checkpoint_format to {other}: with the wrong one,"
                " models write '!!!!'"
            )
            expected = "the version that checkpoint_format says"
            raise FormatError(Problem(f"{module}.qzeros", ambiguous, expected, hint))
        index = None
        if f"{module}.g_idx" in tensors:  # some writers leave it out where it says nothing
            index = take(tensors, f"{module}.g_idx", torch.int32, dims=1)
            expect_shape(f"{module}.g_idx", index, (k,))
            index = group_index(f"{module}.g_idx", index, groups)
        return IntegerTensor(
            scheme, unpack_rows(qweight.t(), bits, k), scales.t().contiguous(), zeros, index
        )

    def _config(self, request: ConfigRequest) -> dict[str, Any]:
        scheme = main_scheme(request.modules, request.default)
        dynamic: dict[str, dict[str, Any]] = {}
        skipped = [name for name in request.ignored if name != "lm_head"]
        for pattern in _dynamic_patterns(skipped, list(request.modules)):
            dynamic[f"-:{pattern}"] = {}
        for own in dict.fromkeys(request.modules.values()):
            if own != scheme:
                chosen = [name for name in request.modules if request.modules[name] == own]
                others = [
                    name for name in request.modules if request.modules[name] != own
                ] + request.ignored
                for pattern in _dynamic_patterns(chosen, others):
                    dynamic[f"+:{pattern}"] = {
                        "bits": own.bits,
                        "group_size": own.group_size,
                        "sym": own.symmetric,
                    }
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "desc_act": request.act_order,
            "sym": scheme.symmetric,
            "lm_head": "lm_head" in request.modules,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
        }
        if dynamic:
            config["dynamic"] = dynamic
        return config

    def doubts(self, request: ConfigRequest) -> list[Problem]:
        return [
            *unlike_parts(request.modules, request.ignored),
            *refusals(self.name, request.modules, act_order=request.act_order),
        ]

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {"quantize_config.json": dict(config)}


@dataclass(frozen=True)
class GptqV2(Gptq):
    ability = replace(Gptq.ability, asymmetric="yes")
    version = 2

    name: str = "gptq_v2"


def declared_version(config: Mapping[str, Any]) -> str:
    """`gptq`, `gptq_v2` or what else a `quantization_config` says. Writers before version 2 said
    nothing; GPTQModel says it twice, and calls `checkpoint_format` the older name."""
    return str(config.get("checkpoint_format") or config.get("format") or "gptq")


def _not_ten_to_a_word(module: str, scheme: Scheme, tensors: Mapping[str, Tensor]) -> None:
    """EfficientQAT puts ten codes of 3 bits into a word and leaves two bits of it empty. Raises
    FormatError for a weight that is so."""
    scales = tensors.get(f"{module}.scales")
    if scheme.bits != 3 or scheme.group_size < 0 or scales is None or scales.dim() != 2:
        return
    k, words = len(scales) * scheme.group_size, len(tensors[f"{module}.qweight"])
    if words == -(-k // 10) != k * 3 // 32:
        raise FormatError(
            Problem(
                f"{module}.qweight",
                f"{words} words for {k} codes of 3 bits, ten to a word as EfficientQAT packs them",
                f"GPTQ's stream of bits, {k * 3 // 32} words",
                "Save it unpacked (without --real_quant), and quantise that",
            )
        )


def _by_gptqmodel(config: Mapping[str, Any]) -> bool:
    meta = config.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    names = [writers] if isinstance(writers, str) else writers if isinstance(writers, list) else []
    return any(str(name).lower().partition(":")[0] == "gptqmodel" for name in names)


def _dynamic_patterns(chosen: list[str], others: list[str]) -> list[str]:
    """Anchored expressions for `chosen`, and for the fused modules (`qkv_proj`) whose parts are all
    chosen: vLLM looks for those."""
    patterns, names = name_patterns(
        with_fused(chosen, complete=True), with_fused(others, complete=False)
    )
    return patterns + [f"^{re.escape(name)}$" for name in names]
