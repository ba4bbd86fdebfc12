"""GGUF's Q4_0, Q4_1 and Q8_0, read by llama.cpp and its kin: blocks of 32 weights along the inputs.

`{module}.q4_0` uint8 `[N, K/32 * 18]`: fp16 `d` and 16 bytes, of which byte `i` holds code `i` low
and code `i + 16` high, `w = (code - 8) * d`. `.q4_1` `[N, K/32 * 20]`: fp16 `d`, fp16 `m`, the same
16 bytes, `w = code * d + m`. `.q8_0` `[N, K/32 * 34]`: fp16 `d` and 32 signed bytes, `w = code *
d`. A group of more than 32 repeats its scale; `quantflow.schemes` in the metadata remembers it, and
a reader checks it. An integer zero point becomes the minimum `-zero * scale`, where fp16 holds that
exactly.

The file itself, names and the order of rotary channels are `checkpoints/gguf/`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantflow.checkpoints.gguf.types import BLOCK, BLOCK_TYPES
from quantflow.errors import FormatError, Problem
from quantflow.formats.abilities import Ability
from quantflow.formats.base import ConfigRequest, Format, Spec
from quantflow.formats.settings import setting
from quantflow.formats.tensors import exact_scales, expect_shape, take
from quantflow.formats.weight import Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantflow.quant.numbers import QuantizedTensor
    from quantflow.quant.scheme import Scheme

_BYTES = dict(BLOCK_TYPES.values())  # a block
_TYPES = {
    ("integer", 4, True): "q4_0",
    ("integer", 4, False): "q4_1",
    ("integer", 8, True): "q8_0",
    ("minimum", 4, True): "q4_1",
    ("minimum", 4, False): "q4_1",
}


def type_of(scheme: Scheme) -> str | None:
    """The type that holds a scheme; None for none."""
    return _TYPES.get((scheme.kind, scheme.bits, scheme.symmetric))


@dataclass(frozen=True)
class Gguf(Format):
    title = "GGUF"
    ability = Ability(
        "integers, floating minimums",
        (4, 8),
        "multiples of 32",
        asymmetric="4 bits, where -zero * scale is exact",
        tensor_parallel="no",
    )
    container = "gguf"
    kinds = ("integer", "minimum")
    suffixes = marks = (".q4_0", ".q4_1", ".q8_0")
    holds_plain = True
    holds_embedding = True
    parallel = False

    name: str = "gguf"

    def scale_dtype(self, model_dtype: str) -> str:
        return "float16"

    def _refused(self, weight: Weight) -> Iterator[Problem]:
        module, scheme, inputs = weight.module, weight.scheme, weight.shape[1]
        if type_of(scheme) is None and self.holds_numbers(scheme.kind):
            expected = "W4, or W8 symmetric: what Q4_0, Q4_1 and Q8_0 hold"
            yield Problem(module, f"{scheme}", expected, "Use 4 bits, or gptq")
        if inputs % BLOCK:
            hint = "Ignore this module"
            yield Problem(module, f"{inputs} input channels", f"a multiple of {BLOCK}", hint)
        elif scheme.group_of(inputs) % BLOCK:
            expected = f"a multiple of {BLOCK}, GGUF's block"
            yield Problem(module, f"group_size {scheme.group_size}", expected)

    def nearest(self, weight: Weight) -> Scheme:
        scheme = weight.scheme
        group = scheme.group_size if scheme.group_of(weight.shape[1]) % BLOCK == 0 else BLOCK
        if scheme.bits == 4 and not (self.holds_numbers(scheme.kind) and scheme.symmetric):
            return replace(scheme, group_size=group, symmetric=False, kind="minimum", double=False)
        return replace(
            scheme,
            bits=8 if scheme.bits > 4 else 4,
            group_size=group,
            symmetric=True,
            kind="integer",
            double=False,
        )

    def prefers_symmetric(self, *, experts: bool) -> bool:
        return True

    def specs(self, weight: Weight, scale_dtype: str) -> dict[str, Spec]:
        kind, (n, k) = type_of(weight.scheme), weight.shape
        assert kind is not None
        return {f"{weight.module}.{kind}": ("U8", (n, k // BLOCK * _BYTES[kind]))}

    def _encode(
        self, module: str, tensor: QuantizedTensor, model_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        import torch

        from quantflow.quant.numbers.integer import IntegerTensor
        from quantflow.quant.numbers.minimum import MinimumTensor

        scheme, (n, k) = tensor.scheme, tensor.shape
        assert isinstance(tensor, IntegerTensor | MinimumTensor)
        kind = type_of(scheme)
        repeat = scheme.group_of(k) // BLOCK
        scales = exact_scales(f"{module} scales", tensor.scales, torch.float16)
        header = [scales]
        if isinstance(tensor, MinimumTensor):
            header.append(
                exact_scales(f"{module} minimums", tensor.minimums, torch.float16, "minimums")
            )
        elif kind == "q4_1":
            # A product of 4 and 11 bits is exact in float32.
            minimums = -tensor.zeros.float() * scales.float()
            header.append(
                exact_scales(f"{module}", minimums, torch.float16, "minimums (-zero * scale)")
            )
        head = torch.stack(header, -1).view(torch.uint8).repeat_interleave(repeat, 1)
        codes = tensor.codes.view(n, k // BLOCK, BLOCK)
        # An 8-bit code less 128, as a signed byte, is the code with its highest bit turned.
        body = codes ^ 0x80 if kind == "q8_0" else codes[..., :16] | codes[..., 16:] << 4
        return {f"{module}.{kind}": torch.cat((head, body), -1).view(n, -1)}

    def scheme_of(self, module: str, config: Mapping[str, Any]) -> Scheme | None:
        from quantflow.quant.scheme import Scheme

        types, schemes = (
            setting(config, "types", dict, default={}),
            setting(config, "schemes", dict, default={}),
        )
        if module not in types:
            return None
        kind, stored = types[module], schemes.get(module)
        if kind not in tuple(_BYTES):
            raise FormatError(
                Problem(
                    f"quantization_config.types {module}",
                    f"{kind!r}"[:80],
                    f"one of {', '.join(_BYTES)}",
                )
            )
        if stored is None:
            return Scheme(
                8 if kind == "q8_0" else 4,
                BLOCK,
                kind != "q4_1",
                "minimum" if kind == "q4_1" else "integer",
            )
        wrong = FormatError(
            Problem(
                f"quantflow.schemes {module}",
                f"{stored!r}"[:80],
                f"bits, group size, symmetry and kind of a {kind}",
            )
        )
        if not isinstance(stored, list) or [type(part) for part in stored] != [int, int, bool, str]:
            raise wrong
        scheme = Scheme(*stored)
        if type_of(scheme) != kind or (
            scheme.group_size != -1 and (scheme.group_size < BLOCK or scheme.group_size % BLOCK)
        ):
            raise wrong
        return scheme

    def _decode(
        self, module: str, scheme: Scheme, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedTensor:
        import torch

        from quantflow.quant.numbers.integer import IntegerTensor
        from quantflow.quant.numbers.minimum import MinimumTensor

        kind = type_of(scheme)
        assert kind is not None
        name = f"{module}.{kind}"
        stored = take(tensors, name, torch.uint8)
        n, size = stored.shape[0], _BYTES[kind]
        expect_shape(name, stored, (n, stored.shape[1] // size * size))
        blocks = stored.view(n, -1, size)
        k = blocks.shape[1] * BLOCK
        if k % scheme.group_of(k):
            raise FormatError(
                Problem(
                    name, f"{k} input channels", f"a multiple of group_size {scheme.group_size}"
                )
            )
        head, body = (
            blocks[..., : size - (32 if kind == "q8_0" else 16)],
            blocks[..., size - (32 if kind == "q8_0" else 16) :],
        )
        numbers = head.contiguous().view(torch.float16)
        scales = _once(name, numbers[..., 0], scheme.groups(k))
        codes = (body ^ 0x80 if kind == "q8_0" else torch.cat((body & 15, body >> 4), -1)).reshape(
            n, k
        )
        if kind != "q4_1":
            return IntegerTensor(
                scheme, codes, scales, torch.full(scales.shape, scheme.midpoint, dtype=torch.uint8)
            )
        minimums = _once(name, numbers[..., 1], scheme.groups(k))
        if not bool(minimums.isfinite().all()):
            raise FormatError(Problem(name, "minimums that are NaN or infinite", "finite minimums"))
        if scheme.kind == "minimum":
            return MinimumTensor(scheme, codes, scales, minimums)
        zeros = torch.where(scales != 0, -minimums.float() / scales.float(), 0)
        if not bool(
            (
                (zeros == zeros.round())
                & (zeros >= 0)
                & (zeros <= 15)
                & (-zeros * scales.float() == minimums.float())
            ).all()
        ):
            raise FormatError(
                Problem(
                    name,
                    "minimums that are no -zero * scale",
                    "those of integer zero points, says quantflow.schemes",
                )
            )
        return IntegerTensor(scheme, codes, scales, zeros.to(torch.uint8))

    def _config(self, request: ConfigRequest) -> dict[str, Any]:
        schemes = {
            name: [s.bits, s.group_size, s.symmetric, s.kind] for name, s in request.modules.items()
        }
        return {
            "quant_method": "gguf",
            "types": {name: type_of(scheme) for name, scheme in request.modules.items()},
            "schemes": schemes,
        }

    def chances(self, request: ConfigRequest, kv_granularity: str | None = None) -> list[Problem]:
        asymmetric = [
            name
            for name, scheme in request.modules.items()
            if scheme.kind == "integer" and not scheme.symmetric
        ]
        if not asymmetric:
            return []
        what = (
            f"asymmetric weights ({asymmetric[0]}): some of their minimums -zero * scale are no"
            " exact float16"
        )
        return [Problem(self.name, what, "weights.symmetric: true, which Q4_0 holds exactly")]


def _once(name: str, each: Tensor, groups: int) -> Tensor:
    """`[N, G]` from a number of each block `[N, K/32]`, of which those of a group must be the same,
    bit for bit."""
    import torch

    grouped = each.reshape(each.shape[0], groups, -1)
    first = grouped[..., :1]
    if not torch.equal(grouped.view(torch.int16), first.view(torch.int16).expand_as(grouped)):
        raise FormatError(
            Problem(
                name,
                "blocks of one group with different scales",
                "one scale a group, says quantflow.schemes",
            )
        )
    return first.squeeze(-1).contiguous()
