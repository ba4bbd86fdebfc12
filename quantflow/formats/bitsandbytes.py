"""bitsandbytes' NF4, serialized: read by bitsandbytes itself, transformers and vLLM. What people
know as `load_in_4bit`.

`weight` uint8 `[N*K/2, 1]`, two codes a byte, the first in the high nibble; `weight.absmax` float32
`[N*K/g]` and `weight.quant_map` float32 `[16]`. Double quantisation has `absmax` uint8 with
`weight.nested_absmax` float32 (one for 256) and `weight.nested_quant_map` float32 `[256]`.
`weight.quant_state.bitsandbytes__nf4` is JSON in uint8. Blocks run through the flattened weight;
here each lies within a row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantflow.errors import FormatError, Problem
from quantflow.formats.abilities import Ability
from quantflow.formats.base import ConfigRequest, Format, Spec
from quantflow.formats.engines import refusals
from quantflow.formats.settings import names, setting
from quantflow.formats.tensors import expect_shape, take
from quantflow.formats.weight import Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantflow.quant.numbers import QuantizedTensor
    from quantflow.quant.numbers.nf4 import NestedScales
    from quantflow.quant.scheme import Scheme

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes computes
# dtypes that the bytes of the codes may be stored as
STORAGE = ("uint8", "float16", "bfloat16", "float32")
_STATE = ".weight.quant_state.bitsandbytes__nf4"
# of fp4 and int8, recognised to be refused by name
_UNREAD = (".weight.quant_state.bitsandbytes__fp4", ".SCB", ".weight_format")
_NESTED_BLOCK = 256


@dataclass(frozen=True)
class Bitsandbytes(Format):
    title = "bitsandbytes"
    ability = Ability(
        "NF4, single or double; no experts",
        (),
        "blocks of 64 (32 to 4096)",
        asymmetric="no",
        mixed_bits="no",
        tensor_parallel="no",
    )
    kinds = ("nf4",)
    suffixes = (
        ".weight",
        ".weight.absmax",
        ".weight.quant_map",
        ".weight.nested_absmax",
        ".weight.nested_quant_map",
        _STATE,
        *_UNREAD,
    )
    marks = (_STATE, *_UNREAD[:2])
    parallel = False

    name: str = "bitsandbytes"

    def scale_dtype(self, model_dtype: str) -> str:
        return "float32"

    def _refused(self, weight: Weight) -> Iterator[Problem]:
        module, scheme = weight.module, weight.scheme
        if self.holds_numbers(scheme.kind) and scheme.group_size not in BLOCK_SIZES:
            expected = f"one of {', '.join(map(str, BLOCK_SIZES))}"
            yield Problem(module, f"blocks of {scheme.group_size}", expected)
        if ".experts." in module:
            expected = "a linear of its own, or experts that are ignored"
            hint = (
                "transformers joins a layer's experts into one tensor, which it cannot do with"
                " these"
            )
            yield Problem(module, "an expert of a mixture", expected, hint)

    def nearest(self, weight: Weight) -> Scheme:
        scheme = weight.scheme
        if self.holds_numbers(scheme.kind) and scheme.group_size in BLOCK_SIZES:
            return scheme
        return replace(scheme, bits=4, group_size=64, symmetric=True, kind="nf4")

    def shares_scheme(self, module: str) -> bool:
        return True

    def specs(self, weight: Weight, scale_dtype: str) -> dict[str, Spec]:
        module, (n, k), scheme = weight.module, weight.shape, weight.scheme
        groups = n * scheme.groups(k)
        specs: dict[str, Spec] = {
            f"{module}.weight": ("U8", (n * k // 2, 1)),
            f"{module}.weight.absmax": ("U8" if scheme.double else "F32", (groups,)),
            f"{module}.weight.quant_map": ("F32", (16,)),
        }
        if scheme.double:
            specs[f"{module}.weight.nested_absmax"] = ("F32", (-(-groups // _NESTED_BLOCK),))
            specs[f"{module}.weight.nested_quant_map"] = ("F32", (256,))
        specs[f"{module}{_STATE}"] = ("U8", (_STATE_BYTES,))
        return specs

    def _encode(
        self, module: str, tensor: QuantizedTensor, model_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        import torch

        from quantflow.quant.numbers.nf4 import NF4, Nf4Tensor

        assert isinstance(tensor, Nf4Tensor)
        flat, nested = tensor.codes.reshape(-1), tensor.nested
        if (nested is not None) != tensor.scheme.double or (
            nested and not torch.equal(nested.scales(), tensor.scales.reshape(-1))
        ):
            raise FormatError(
                Problem(
                    f"{module} scales",
                    "others than the nested ones stand for",
                    "the same, where the scheme is double",
                )
            )
        encoded = {
            f"{module}.weight": (flat[::2] << 4 | flat[1::2])[:, None],
            f"{module}.weight.absmax": nested.codes if nested else tensor.scales.reshape(-1),
            f"{module}.weight.quant_map": torch.tensor(NF4, dtype=torch.float32),
        }
        if nested:
            encoded[f"{module}.weight.nested_absmax"] = nested.absmax
            encoded[f"{module}.weight.nested_quant_map"] = nested.table
        encoded[f"{module}{_STATE}"] = _state(
            tensor.scheme, tensor.shape, str(model_dtype).removeprefix("torch."), nested
        )
        return encoded

    def scheme_of(self, module: str, config: Mapping[str, Any]) -> Scheme | None:
        """As the protocol says; the block size is the library's usual 64 here, and `decode` refuses
        another."""
        from quantflow.quant.scheme import Scheme

        if not setting(config, "load_in_4bit", bool, default=False):
            raise FormatError(
                Problem(
                    "quantization_config.load_in_4bit",
                    "false",
                    "true: 8-bit checkpoints of bitsandbytes are not read",
                )
            )
        if (kind := config.get("bnb_4bit_quant_type", "fp4")) != "nf4":
            raise FormatError(
                Problem("quantization_config.bnb_4bit_quant_type", f"{kind!r}", "'nf4'")
            )
        skipped = names(config, "llm_int8_skip_modules")
        if module == "lm_head" or any(
            module == name or module.endswith(f".{name}") for name in skipped
        ):
            return None
        group = setting(config, "bnb_4bit_blocksize", int, default=64)
        if group not in BLOCK_SIZES:
            raise FormatError(
                Problem(
                    "quantization_config.bnb_4bit_blocksize",
                    f"{group}",
                    f"one of {', '.join(map(str, BLOCK_SIZES))}",
                )
            )
        return Scheme(
            4, group, True, "nf4", setting(config, "bnb_4bit_use_double_quant", bool, default=False)
        )

    def _decode(
        self, module: str, scheme: Scheme, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedTensor:
        import torch

        from quantflow.quant.numbers.nf4 import NF4, NestedScales, Nf4Tensor

        # What the tensor's own state says, against the configuration.
        where = f"{module}{_STATE}"
        state = _read_state(where, take(tensors, where, torch.uint8, dims=1))
        n, k = state["shape"]
        if (state["blocksize"], "nested_blocksize" in state) != (scheme.group_size, scheme.double):
            blocks = (
                f"blocks of {state['blocksize']}{', double' if 'nested_blocksize' in state else ''}"
            )
            hint = "Say so there: bnb_4bit_blocksize and bnb_4bit_use_double_quant"
            raise FormatError(Problem(where, blocks, f"{scheme}, says quantization_config", hint))
        if k % scheme.group_size:
            hint = (
                "Its blocks run from one row into the next: load it with bitsandbytes, and save it"
                " dequantised"
            )
            raise FormatError(
                Problem(
                    where,
                    f"{k} input channels",
                    f"a multiple of the blocks of {scheme.group_size}",
                    hint,
                )
            )
        groups = n * k // scheme.group_size
        storage = setting(config, "bnb_4bit_quant_storage", str, default="uint8")
        if storage not in STORAGE:
            raise FormatError(
                Problem(
                    "quantization_config.bnb_4bit_quant_storage",
                    f"{storage!r}",
                    f"one of {', '.join(STORAGE)}",
                )
            )
        # Codes, table and scales, of the shapes that follow.
        packed = take(tensors, f"{module}.weight", getattr(torch, storage))
        expect_shape(f"{module}.weight", packed, (n * k // 2 // packed.element_size(), 1))
        table = take(tensors, f"{module}.weight.quant_map", torch.float32, dims=1)
        if not torch.equal(table, torch.tensor(NF4, dtype=torch.float32)):
            raise FormatError(Problem(f"{module}.weight.quant_map", "another table", "NF4's"))
        name = f"{module}.weight.absmax"
        absmax = take(tensors, name, torch.uint8 if scheme.double else torch.float32, dims=1)
        expect_shape(name, absmax, (groups,))
        nested = None
        if scheme.double:
            outer, inner = f"{module}.weight.nested_absmax", f"{module}.weight.nested_quant_map"
            nested = NestedScales(
                absmax,
                take(tensors, outer, torch.float32, dims=1),
                take(tensors, inner, torch.float32, dims=1),
                state["nested_offset"],
            )
            expect_shape(outer, nested.absmax, (-(-groups // _NESTED_BLOCK),))
            expect_shape(inner, nested.table, (256,))
        # Two codes a byte, the first in the upper half.
        flat = packed.view(torch.uint8).view(-1)
        codes = torch.stack((flat >> 4, flat & 15), -1).view(n, k)
        scales = (nested.scales() if nested else absmax).view(n, -1)
        return Nf4Tensor(scheme, codes, scales, nested)

    def _unsayable(self, request: ConfigRequest) -> list[Problem]:
        problems = super()._unsayable(request)
        schemes = sorted({str(scheme) for scheme in request.modules.values()})
        if len(schemes) > 1:
            expected = "one scheme for all linears"
            problems.append(Problem("bitsandbytes", " and ".join(schemes), expected))
        return problems

    def _config(self, request: ConfigRequest) -> dict[str, Any]:
        scheme = next(iter(request.modules.values()), request.default)
        # readers go by each weight's own state
        size = {} if scheme.group_size == 64 else {"bnb_4bit_blocksize": scheme.group_size}
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": scheme.double,
            **size,
            "bnb_4bit_compute_dtype": request.model_dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(request.ignored),
        }

    def doubts(self, request: ConfigRequest) -> list[Problem]:
        return list(refusals(self.name, request.modules))


_STATE_BYTES = 224  # room for every state that is written, filled with blanks, which JSON allows


def _state(
    scheme: Scheme, shape: tuple[int, int], dtype: str, nested: NestedScales | None
) -> Tensor:
    """The quantisation state as JSON in uint8, `[_STATE_BYTES]`: its length must be known before
    the offset is."""
    import torch

    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": scheme.group_size,
        "dtype": dtype,
        "shape": list(shape),
    }
    if nested:
        state |= {
            "nested_blocksize": nested.BLOCK,
            "nested_dtype": "float32",
            "nested_offset": nested.offset,
        }
    return torch.tensor(list(json.dumps(state).ljust(_STATE_BYTES).encode()), dtype=torch.uint8)


def _read_state(where: str, stored: Tensor) -> dict[str, Any]:
    if stored.numel() > 4096:
        raise FormatError(Problem(where, f"{stored.numel()} bytes", "a short JSON object"))
    try:
        state = json.loads(bytes(stored.tolist()))
    except (ValueError, RecursionError) as error:
        raise FormatError(Problem(where, f"not JSON ({error})", "a JSON object")) from error
    state = state if isinstance(state, dict) else {"state": state}
    shape = state.get("shape")
    numbers = [*shape, state.get("blocksize")] if isinstance(shape, list) else []
    good = (
        len(numbers) == 3
        and all(type(number) is int and 0 < number < 2**31 for number in numbers)
        and state.get("quant_type") == "nf4"
    )
    offset = state.get("nested_offset", 0.0)
    if (
        not good
        or type(offset) is not float
        or not math.isfinite(offset)
        or state.get("nested_blocksize", _NESTED_BLOCK) != _NESTED_BLOCK
    ):
        expected = (
            "quant_type nf4, blocksize and a shape [N, K]; nested blocks of 256 with a finite"
            " offset"
        )
        raise FormatError(Problem(where, f"{state!r}"[:120], expected))
    return {**state, "nested_offset": offset}
