"""GGUF's Q4_0, Q4_1 and Q8_0, read by llama.cpp and its kin: blocks of 32 weights along the inputs.

`{module}.q4_0` uint8 `[N, K/32 * 18]`: fp16 `d` and 16 bytes, of which byte `i` holds code `i` low
and code `i + 16` high, `w = (code - 8) * d`. `.q4_1` `[N, K/32 * 20]`: fp16 `d`, fp16 `m`, the same
16 bytes, `w = code * d + m`. `.q8_0` `[N, K/32 * 34]`: fp16 `d` and 32 signed bytes, `w = code *
d`. A group of more than 32 repeats its scale; `quantflow.schemes` in the metadata remembers it, and
a reader checks it. An integer zero point becomes the minimum `-zero * scale`, where fp16 holds that
exactly.

The file itself, names and the order of rotary channels are `checkpoints/gguf/file.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantflow.checkpoints.gguf.file import BLOCK, BLOCK_TYPES
from quantflow.errors import FormatError, Problem
from quantflow.formats.base import (
    ConfigRequest,
    Spec,
    check_tensor,
    exact_scales,
    expect_shape,
    grid_problems,
    setting,
    take,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantflow.quant.numbers import QuantizedTensor
    from quantflow.quant.scheme import Scheme

_BYTES = dict(BLOCK_TYPES.values())  # a block


def type_of(scheme: Scheme) -> str | None:
    """The type that holds a scheme; None for none."""
    if scheme.kind == "minimum":
        return "q4_1" if scheme.bits == 4 else None
    if scheme.kind == "integer":
        return {(4, True): "q4_0", (4, False): "q4_1", (8, True): "q8_0"}.get(
            (scheme.bits, scheme.symmetric)
        )
    return None


@dataclass(frozen=True)
class Gguf:
    name: str = "gguf"
    container: str = "gguf"
    dtype: str | None = None
    min_zero: int = 0
    kinds: tuple[str, ...] = ("integer", "minimum")
    kv_scales: tuple[str, ...] = ()
    parallel: bool = False
    holds_index: bool = False
    suffixes: tuple[str, ...] = (".q4_0", ".q4_1", ".q8_0")
    marks: tuple[str, ...] = (".q4_0", ".q4_1", ".q8_0")

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
        problems = grid_problems(module, shape, scheme, 1, None, act_order_index, kinds=self.kinds)
        if type_of(scheme) is None and scheme.kind in self.kinds:
            problems.append(
                Problem(
                    module,
                    f"{scheme}",
                    "W4, or W8 symmetric: what Q4_0, Q4_1 and Q8_0 hold",
                    "Use 4 bits, or gptq",
                )
            )
        if shape[1] % BLOCK:
            problems.append(
                Problem(
                    module,
                    f"{shape[1]} input channels",
                    f"a multiple of {BLOCK}",
                    "Ignore this module",
                )
            )
        elif scheme.group_of(shape[1]) % BLOCK:
            problems.append(
                Problem(
                    module,
                    f"group_size {scheme.group_size}",
                    f"a multiple of {BLOCK}, GGUF's block",
                )
            )
        if act_order_index:
            problems.append(
                Problem(
                    module,
                    "a group index, which GGUF cannot hold",
                    hint="Use act_order: static, or gptq",
                )
            )
        return problems

    def nearest(self, module: str, scheme: Scheme, shape: tuple[int, int]) -> Scheme:
        group = scheme.group_size if scheme.group_of(shape[1]) % BLOCK == 0 else BLOCK
        if scheme.bits == 4 and (scheme.kind not in self.kinds or not scheme.symmetric):
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

    def shares_scheme(self, module: str) -> bool:
        return False

    def specs(
        self, module: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: str, has_index: bool
    ) -> dict[str, Spec]:
        kind = type_of(scheme)
        assert kind is not None
        return {f"{module}.{kind}": ("U8", (shape[0], shape[1] // BLOCK * _BYTES[kind]))}

    def encode(
        self, module: str, tensor: QuantizedTensor, model_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        import torch

        from quantflow.quant.numbers.integer import IntegerTensor
        from quantflow.quant.numbers.minimum import MinimumTensor

        scheme, (n, k) = tensor.scheme, tensor.shape
        problems = self.check(module, (n, k), scheme, act_order_index=tensor.indexed)
        if problems:
            raise FormatError(problems)
        check_tensor(module, tensor)
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
        kind, said = types[module], schemes.get(module)
        if kind not in tuple(_BYTES):
            raise FormatError(
                Problem(
                    f"quantization_config.types {module}",
                    f"{kind!r}"[:80],
                    f"one of {', '.join(_BYTES)}",
                )
            )
        if said is None:
            return Scheme(
                8 if kind == "q8_0" else 4,
                BLOCK,
                kind != "q4_1",
                "minimum" if kind == "q4_1" else "integer",
            )
        wrong = FormatError(
            Problem(
                f"quantflow.schemes {module}",
                f"{said!r}"[:80],
                f"bits, group size, symmetry and kind of a {kind}",
            )
        )
        if not isinstance(said, list) or [type(part) for part in said] != [int, int, bool, str]:
            raise wrong
        scheme = Scheme(*said)
        if type_of(scheme) != kind or (
            scheme.group_size != -1 and (scheme.group_size < BLOCK or scheme.group_size % BLOCK)
        ):
            raise wrong
        return scheme

    def decode(
        self, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedTensor:
        import torch

        from quantflow.quant.numbers.integer import IntegerTensor
        from quantflow.quant.numbers.minimum import MinimumTensor

        scheme = self.scheme_of(module, config)
        if scheme is None:
            raise FormatError(Problem(module, "not quantised"))
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

    def quantization_config(self, request: ConfigRequest) -> dict[str, Any]:
        if request.act_order:
            raise FormatError(
                Problem(
                    "act_order",
                    "a group index, which GGUF cannot hold",
                    hint="Use act_order: static, or gptq",
                )
            )
        schemes = {
            name: [s.bits, s.group_size, s.symmetric, s.kind] for name, s in request.modules.items()
        }
        return {
            "quant_method": "gguf",
            "types": {name: type_of(scheme) for name, scheme in request.modules.items()},
            "schemes": schemes,
        }

    def doubts(self, request: ConfigRequest) -> list[Problem]:
        return []

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {}


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
