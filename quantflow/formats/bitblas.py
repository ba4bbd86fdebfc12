"""BitBLAS, as GPTQModel saves it (`checkpoint_format: bitblas`): GPTQ's numbers in the layout that
the BitBLAS kernels read. 2, 4 or 8 bits in groups of 32, 64, 128 or a whole row.

`qweight` int8 `[N, K*b/8]`, each row a stream of bits, low bits first; `scales` `[N, G]` in the
model's dtype; `qzeros` int8 `[G, N*b/8]`, packed along the outputs, and empty where weights are
symmetric. For a model in float16 the kernels take 2 and 4 bits apart two at a time, so that the
codes of each 32-bit word are interleaved: those of even places in its lower half, those of odd ones
in its upper half, and for 2 bits the two middle bytes change places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantflow.errors import FormatError, Problem
from quantflow.formats.abilities import Ability
from quantflow.formats.base import ConfigRequest, Spec
from quantflow.formats.engines import GPTQMODEL
from quantflow.formats.gptq import Gptq
from quantflow.formats.tensors import exact_scales, expect_shape, integer_grid, take
from quantflow.formats.weight import Weight, integer_scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantflow.quant.numbers import QuantizedTensor
    from quantflow.quant.numbers.integer import IntegerTensor
    from quantflow.quant.scheme import Scheme

BITS, GROUPS, CHANNELS = (2, 4, 8), (32, 64, 128, -1), 16


@dataclass(frozen=True)
class Bitblas(Gptq):
    title = "BitBLAS"
    ability = Ability("integers", BITS, "32, 64, 128, per channel")
    suffixes = (".qweight", ".qzeros", ".zeros", ".scales")
    index_suffixes = ()
    holds_index = False

    name: str = "bitblas"

    @property
    def min_zero(self) -> int:
        return 0

    def scale_dtype(self, model_dtype: str) -> str:
        return "bfloat16" if model_dtype == "bfloat16" else "float16"

    def _refused(self, weight: Weight) -> Iterator[Problem]:
        module, scheme = weight.module, weight.scheme
        if not self.holds_numbers(scheme.kind):
            return
        if scheme.bits not in BITS:
            yield Problem(module, f"{scheme.bits} bits", "2, 4 or 8", "Use gptq_v2")
        if scheme.group_size not in GROUPS:
            expected = "32, 64, 128, or -1 for a whole row"
            yield Problem(module, f"groups of {scheme.group_size}", expected, "Use gptq_v2")
        for count, side in zip(weight.rank_shape, ("output", "input"), strict=True):
            if count % CHANNELS:
                hint = "Use compressed-tensors, or ignore this module"
                yield Problem(module, f"{count} {side} channels", f"a multiple of {CHANNELS}", hint)

    def nearest(self, weight: Weight) -> Scheme:
        scheme = integer_scheme(weight)
        bits = next((bits for bits in BITS if bits >= scheme.bits), scheme.bits)
        inside = [group for group in GROUPS if scheme.group_size % group == 0 and group > 0]
        keeps = scheme.group_size in GROUPS or not inside
        return replace(scheme, bits=bits, group_size=scheme.group_size if keeps else max(inside))

    def prefers_symmetric(self, *, experts: bool) -> bool:
        return False  # GPTQModel runs symmetric weights in float16 alone

    def specs(self, weight: Weight, scale_dtype: str) -> dict[str, Spec]:
        module, (n, k), scheme = weight.module, weight.shape, weight.scheme
        groups, stored = scheme.groups(k), "BF16" if scale_dtype == "bfloat16" else "F16"
        zeros = (0,) if scheme.symmetric else (groups, n * scheme.bits // 8)
        return {
            f"{module}.qweight": ("I8", (n, k * scheme.bits // 8)),
            f"{module}.qzeros": ("I8", zeros),
            f"{module}.scales": (stored, (n, groups)),
        }

    def _encode(
        self, module: str, tensor: QuantizedTensor, model_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        import torch

        from quantflow.quant.packing import pack_rows

        tensor = integer_grid(module, tensor)
        bits = tensor.scheme.bits
        dtype = torch.bfloat16 if model_dtype == torch.bfloat16 else torch.float16
        words = pack_rows(tensor.codes, bits)
        if interleaved(bits, dtype):
            words = interleave(words, bits)
        zeros = tensor.zeros.new_empty(0, dtype=torch.int8)
        if not tensor.scheme.symmetric:
            zeros = _packed(tensor.zeros.t().contiguous(), bits)
        return {
            f"{module}.qweight": words.view(torch.int8),
            f"{module}.qzeros": zeros,
            f"{module}.scales": exact_scales(f"{module}.scales", tensor.scales, dtype).contiguous(),
        }

    def scheme_of(self, module: str, config: Mapping[str, Any]) -> Scheme | None:
        scheme = super().scheme_of(module, config)
        if scheme is not None and scheme.bits not in BITS:
            raise FormatError(
                Problem("quantization_config.bits", f"{scheme.bits} in BitBLAS", "2, 4 or 8")
            )
        return scheme

    def _decode(
        self, module: str, scheme: Scheme, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> IntegerTensor:
        import torch

        from quantflow.quant.numbers.integer import IntegerTensor
        from quantflow.quant.packing import unpack_rows

        bits = scheme.bits
        qweight, scales = (
            take(tensors, f"{module}.qweight", torch.int8),
            take(tensors, f"{module}.scales"),
        )
        n, k = qweight.shape[0], qweight.shape[1] * 8 // bits
        if k % scheme.group_of(k) or k % CHANNELS or n % CHANNELS:
            raise FormatError(
                Problem(
                    f"{module}.qweight", f"shape {list(qweight.shape)}", f"one that fits {scheme}"
                )
            )
        expect_shape(f"{module}.scales", scales, (n, scheme.groups(k)))
        words = qweight.contiguous().view(torch.int32)
        if interleaved(bits, scales.dtype):
            words = interleave(words, bits, back=True)
        return IntegerTensor(
            scheme, unpack_rows(words, bits, k), scales, _zeros(module, scheme, tensors, n, k)
        )

    def doubts(self, request: ConfigRequest) -> list[Problem]:
        problems = super().doubts(request)
        symmetric = [name for name, scheme in request.modules.items() if scheme.symmetric]
        if request.model_dtype == "bfloat16" and symmetric:
            problem = f"symmetric weights of a model in bfloat16, such as {symmetric[0]}"
            expected, hint = "asymmetric ones, or float16", "Set weights.symmetric: false"
            problems.append(Problem(GPTQMODEL, problem, expected, hint))
        return problems


def interleaved(bits: int, dtype: torch.dtype) -> bool:
    """Whether the kernels for a model in `dtype` read interleaved codes."""
    import torch

    return bits < 8 and dtype == torch.float16


def interleave(words: Tensor, bits: int, *, back: bool = False) -> Tensor:
    """int32 words of any shape, whose codes change places; `back` undoes it."""
    places = _places(bits)
    mask, moved = (1 << bits) - 1, words.new_zeros(words.shape)
    for plain, place in enumerate(places):
        source, target = (place, plain * bits) if back else (plain * bits, place)
        moved |= ((words >> source) & mask) << target
    return moved


def _places(bits: int) -> list[int]:
    """The first bit of each code in an interleaved word, in the order of the codes."""
    places = [16 * (code % 2) + bits * (code // 2) for code in range(32 // bits)]
    swapped = {1: 2, 2: 1}  # bytes
    if bits == 2:
        return [8 * swapped.get(place // 8, place // 8) + place % 8 for place in places]
    return places


def _packed(codes: Tensor, bits: int) -> Tensor:
    """int8 `[R, C*b/8]` of codes `[R, C]`, where rows may end within a word."""
    import torch

    from quantflow.quant.packing import pack_rows

    nbytes = codes.shape[1] * bits // 8
    return pack_rows(codes, bits).view(torch.int8)[:, :nbytes].contiguous()


def _zeros(module: str, scheme: Scheme, tensors: Mapping[str, Tensor], n: int, k: int) -> Tensor:
    """uint8 `[N, G]`: the zero points; the middle of the range where weights are symmetric.
    GPTQModel called them `zeros` once."""
    import torch

    from quantflow.quant.packing import unpack_rows

    groups, bits = scheme.groups(k), scheme.bits
    name = f"{module}.zeros" if f"{module}.zeros" in tensors else f"{module}.qzeros"
    if scheme.symmetric:
        if name in tensors and tensors[name].numel():
            shape = list(tensors[name].shape)
            raise FormatError(
                Problem(name, f"shape {shape} with sym: true", "none, as symmetric weights have")
            )
        return torch.full((n, groups), scheme.midpoint, dtype=torch.uint8)
    stored = take(tensors, name, torch.int8)
    expect_shape(name, stored, (groups, n * bits // 8))
    missing = -stored.shape[1] % 4
    words = torch.nn.functional.pad(stored, (0, missing)).contiguous().view(torch.int32)
    zeros = unpack_rows(words, bits, words.shape[1] * 32 // bits)
    return zeros[:, :n].t().contiguous()
