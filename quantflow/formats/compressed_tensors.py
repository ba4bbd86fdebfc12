"""compressed-tensors, "pack-quantized": read by vLLM and transformers. 2 to 8 bits, scales in the
model's dtype.

`weight_packed` int32 `[N, ceil(K*b/32)]`, `weight_scale` `[N, G]`, `weight_zero_point` int32
`[ceil(N*b/32), G]` for asymmetric weights alone, `weight_shape` int64 `[N, K]`. The package counts
codes and zero points from `-2^(b-1)` and adds that back when it packs them, so our unsigned ones
are what is stored. Each scheme is a group in `config_groups`.

3 bits are dense since the package's 0.18; before, ten codes filled a word. `weight_g_idx` went in
0.19, which refuses `actorder: group` and would read the weights in the wrong groups without it: it
is read here, never written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantflow.errors import FormatError, Problem
from quantflow.formats.abilities import Ability
from quantflow.formats.base import SAFETENSORS_DTYPE, ConfigRequest, Format, Spec
from quantflow.formats.engines import LMDEPLOY, TRANSFORMERS, refusals, unlike_parts
from quantflow.formats.naming import main_scheme, name_patterns
from quantflow.formats.settings import matches, names, read_scheme, setting
from quantflow.formats.tensors import exact_scales, expect_shape, group_index, integer_grid, take
from quantflow.formats.weight import Weight, integer_scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantflow.quant.numbers import QuantizedTensor
    from quantflow.quant.numbers.integer import IntegerTensor
    from quantflow.quant.scheme import Scheme

_FORMAT = "pack-quantized"
# The package's other layouts, but `dense` -> what their weights are.
UNREAD_LAYOUTS = {
    "float-quantized": "FP8 weights",
    "naive-quantized": "8-bit weights, one a byte",
    "int-quantized": "INT8 weights, one a byte",
    "marlin-24": "weights repacked for the Marlin-24 kernel",
    "sparse-bitmask": "sparse weights",
    "sparse-24-bitmask": "sparse weights (2 of 4)",
    "nvfp4-pack-quantized": "NVFP4 weights",
    "mxfp4-pack-quantized": "MXFP4 weights",
    "mxfp6-pack-quantized": "MXFP6 weights",
    "mxfp8-quantized": "MXFP8 weights",
}


@dataclass(frozen=True)
class CompressedTensors(Format):
    title = "compressed-tensors"
    ability = Ability(
        "integers",
        (2, 3, 4, 5, 6, 7, 8),
        "any divisor, per channel",
        asymmetric="yes, not for experts",
        act_order_index="read",
        kv_scales="beside it, or fp8 ones inside (--kv-scales fp8)",
    )
    suffixes = (
        ".weight_packed",
        ".weight_scale",
        ".weight_zero_point",
        ".weight_shape",
        ".weight_g_idx",
    )
    marks = (".weight_packed",)
    index_suffixes = (".weight_g_idx",)
    kv_scales = ("fp8",)

    name: str = "compressed-tensors"

    def scale_dtype(self, model_dtype: str) -> str:
        return model_dtype

    def _refused(self, weight: Weight) -> Iterator[Problem]:
        if _is_expert(weight.module) and not weight.scheme.symmetric:
            # transformers hands only packed codes, scales and shape of an expert to the package,
            # which then misses the zero points.
            what = "an asymmetric expert, which readers of compressed-tensors cannot load"
            hint = "Use symmetric: true for the experts, or awq or gptq"
            yield Problem(weight.module, what, hint=hint)

    def _no_index(self, where: str) -> Problem:
        what = "a group index: compressed-tensors holds none since its version 0.19"
        return Problem(where, what, hint="Use act_order: static, or gptq")

    def nearest(self, weight: Weight) -> Scheme:
        scheme = integer_scheme(weight)
        return replace(scheme, symmetric=True) if _is_expert(weight.module) else scheme

    def prefers_symmetric(self, *, experts: bool) -> bool:
        return experts

    def shares_scheme(self, module: str) -> bool:
        return _is_expert(module)

    def specs(self, weight: Weight, scale_dtype: str) -> dict[str, Spec]:
        module, (n, k), scheme = weight.module, weight.shape, weight.scheme
        groups = scheme.groups(k)
        specs: dict[str, Spec] = {
            f"{module}.weight_packed": ("I32", (n, _words(k, scheme.bits))),
            f"{module}.weight_scale": (SAFETENSORS_DTYPE[scale_dtype], (n, groups)),
        }
        if not scheme.symmetric:
            specs[f"{module}.weight_zero_point"] = ("I32", (_words(n, scheme.bits), groups))
        specs[f"{module}.weight_shape"] = ("I64", (2,))
        return specs

    def _encode(
        self, module: str, tensor: QuantizedTensor, model_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        import torch

        from quantflow.quant.packing import pack_columns, pack_rows

        tensor = integer_grid(module, tensor)
        scheme = tensor.scheme
        encoded = {
            f"{module}.weight_packed": pack_rows(tensor.codes, scheme.bits),
            f"{module}.weight_scale": (
                exact_scales(f"{module}.weight_scale", tensor.scales, model_dtype).contiguous()
            ),
        }
        if not scheme.symmetric:
            encoded[f"{module}.weight_zero_point"] = pack_columns(tensor.zeros, scheme.bits)
        encoded[f"{module}.weight_shape"] = torch.tensor(tensor.shape, dtype=torch.int64)
        return encoded

    def scheme_of(self, module: str, config: Mapping[str, Any]) -> Scheme | None:
        """As the protocol says. A target or an ignored entry is a name, an expression after `re:`,
        or a class, of which `Linear` is taken to be every quantised module's; names come before
        expressions, and those before classes."""
        if any(_match(entry, module) for entry in names(config, "ignore")):
            return None
        best: tuple[int, str, Mapping[str, Any]] | None = None
        all_groups = setting(config, "config_groups", dict, default={})
        for name in all_groups:
            group = setting(all_groups, name, dict, "config_groups")
            for target in names(group, "targets", f"config_groups.{name}"):
                rank = _match(target, module) or (3 if target == "Linear" else 0)
                if rank and (best is None or rank < best[0]):
                    best = (rank, name, group)
        if best is None:
            return None
        _, name, group = best
        where = f"config_groups.{name}"
        form = group.get("format") or config.get("format")
        if form != _FORMAT:
            raise FormatError(Problem(f"{where}.format", f"{form!r}", f"{_FORMAT!r}"))
        weights = setting(group, "weights", dict, where)
        if (
            group.get("input_activations")
            or group.get("output_activations")
            or weights.get("dynamic")
        ):
            raise FormatError(Problem(where, "quantised activations", "quantised weights alone"))
        if weights.get("type", "int") != "int":
            raise FormatError(Problem(f"{where}.weights.type", f"{weights['type']!r}", "'int'"))
        group_size = weights.get("group_size")
        strategy = weights.get("strategy") or (
            "channel" if group_size == -1 else "group" if group_size else "tensor"
        )
        if strategy == "channel":
            group_size = -1
        elif strategy != "group":
            raise FormatError(
                Problem(f"{where}.weights.strategy", f"{strategy!r}", "'group' or 'channel'")
            )
        weights = {**weights, "group_size": group_size}
        numbers = (
            setting(weights, "num_bits", int, where),
            setting(weights, "group_size", int, where),
        )
        return read_scheme(
            *numbers, setting(weights, "symmetric", bool, where, default=True), where
        )

    def _decode(
        self, module: str, scheme: Scheme, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> IntegerTensor:
        import torch

        from quantflow.quant.numbers.integer import IntegerTensor
        from quantflow.quant.packing import unpack_columns, unpack_rows

        bits = scheme.bits
        stored_shape = take(tensors, f"{module}.weight_shape", torch.int64, dims=1)
        expect_shape(f"{module}.weight_shape", stored_shape, (2,))
        n, k = stored_shape.tolist()
        if n < 1 or k < 1 or k % scheme.group_of(k):
            raise FormatError(
                Problem(f"{module}.weight_shape", f"[{n}, {k}]", f"one that fits {scheme}")
            )
        groups = scheme.groups(k)
        packed, scales = (
            take(tensors, f"{module}.weight_packed", torch.int32),
            take(tensors, f"{module}.weight_scale"),
        )
        expect_shape(f"{module}.weight_packed", packed, (n, _words(k, bits)))
        expect_shape(f"{module}.weight_scale", scales, (n, groups))
        if scheme.symmetric:
            if f"{module}.weight_zero_point" in tensors and bool(
                tensors[f"{module}.weight_zero_point"].any()
            ):
                raise FormatError(
                    Problem(
                        f"{module}.weight_zero_point",
                        "zero points",
                        "none, says quantization_config (symmetric)",
                    )
                )
            zeros = torch.full(
                (n, groups), scheme.midpoint, dtype=torch.uint8, device=packed.device
            )
        else:
            words = take(tensors, f"{module}.weight_zero_point", torch.int32)
            expect_shape(f"{module}.weight_zero_point", words, (_words(n, bits), groups))
            zeros = unpack_columns(words, bits, n)
        index = None
        if f"{module}.weight_g_idx" in tensors:
            index = take(tensors, f"{module}.weight_g_idx", torch.int32, dims=1)
            expect_shape(f"{module}.weight_g_idx", index, (k,))
            # -1 is how the package marked an index that was never set.
            index = (
                None
                if bool((index == -1).all())
                else group_index(f"{module}.weight_g_idx", index, groups)
            )
        return IntegerTensor(scheme, unpack_rows(packed, bits, k), scales, zeros, index)

    def _unsayable(self, request: ConfigRequest) -> list[Problem]:
        problems = super()._unsayable(request)
        # transformers and vLLM fuse experts and read all of them with one scheme.
        experts = {scheme: name for name, scheme in request.modules.items() if _is_expert(name)}
        if len(experts) > 1:
            schemes = " and ".join(f"{scheme} ({name})" for scheme, name in experts.items())
            hint = "Change weights.overrides"
            problems.append(Problem("experts", schemes, "one scheme for all experts", hint))
        return problems

    def _config(self, request: ConfigRequest) -> dict[str, Any]:
        # transformers takes the first group for all that is dense, and for experts the one with an
        # expression that names them, if any.
        dense = {name: scheme for name, scheme in request.modules.items() if not _is_expert(name)}
        main = main_scheme(dense or request.modules, request.default)
        groups = [_group(main, ["Linear"])]
        for own in dict.fromkeys(request.modules.values()):
            if own != main:
                chosen = [name for name in request.modules if request.modules[name] == own]
                others = [
                    name for name in request.modules if request.modules[name] != own
                ] + request.ignored
                patterns, others = name_patterns(chosen, others)
                groups.append(_group(own, [f"re:{pattern}" for pattern in patterns] + others))
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": _FORMAT,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
            "ignore": list(request.ignored),
            "kv_cache_scheme": {**_KV_SCHEME, "type": "float"} if request.kv_scales else None,
        }
        if (
            any(not scheme.symmetric for scheme in request.modules.values())
            and len(set(dense.values())) == 1
        ):
            # With the package's 0.18 to 0.20, transformers 5.23 expects packed zero points in their
            # unpacked shape, and refuses the checkpoint unless it unpacks each weight while it
            # reads it. It then takes the first group's scheme for all that is dense, so that this
            # helps nothing where schemes are mixed: vLLM, transformers 5.17 or the package's 0.17
            # read those.
            config["dequantize"] = True
        return config

    def doubts(self, request: ConfigRequest) -> list[Problem]:
        doubts = unlike_parts(request.modules, request.ignored)
        dense = {scheme for name, scheme in request.modules.items() if not _is_expert(name)}
        if len(dense) > 1 and not all(scheme.symmetric for scheme in dense):
            unlike = ", ".join(sorted(map(str, dense)))
            doubts.append(
                Problem(
                    TRANSFORMERS,
                    f"does not load zero points beside unlike schemes: {unlike}",
                    "one scheme, or symmetric ones",
                    "weights.symmetric: true",
                )
            )
        refused = list(refusals(self.name, request.modules, act_order=request.act_order))
        if len({scheme.group_size for scheme in request.modules.values()}) > 1 and LMDEPLOY not in {
            problem.where for problem in refused
        }:
            doubts.append(
                Problem(
                    LMDEPLOY,
                    "takes all groups to be of one size, and these are not",
                    "one group_size",
                )
            )
        return doubts + refused

    def stored_kv_scales(self, config: Mapping[str, Any]) -> str | None:
        """As the base says. int8 is what QuantFlow once wrote; transformers applies it, vLLM
        refuses it."""
        scheme = config.get("kv_cache_scheme")
        if not isinstance(scheme, Mapping):
            return None
        plain = all(scheme.get(key) == value for key, value in _KV_SCHEME.items())
        kind = {"float": "fp8", "int": "int8"}.get(str(scheme.get("type"))) if plain else None
        return kind or ", ".join(
            f"{key} {scheme[key]}" for key in ("type", *_KV_SCHEME) if key in scheme
        )


_KV_SCHEME = {"num_bits": 8, "strategy": "tensor", "symmetric": True, "dynamic": False}


def _words(codes: int, bits: int) -> int:
    """As `packing.word_count`, which importing would bring torch along."""
    return -(-codes * bits // 32)


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": _FORMAT,  # LMDeploy looks for it here, others at the top
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": scheme.strategy,
            "group_size": scheme.group_size if scheme.strategy == "group" else None,
            "actorder": None,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }


def _is_expert(module: str) -> bool:
    return ".experts." in module


def _match(target: str, module: str) -> int:
    """1 if `target` is the module's name, 2 if it is an expression that matches it, else 0."""
    if target.startswith("re:"):
        return 2 if matches(target.removeprefix("re:"), module) else 0
    return 1 if target == module else 0
