"""`kv_qparams`: scales and zero points of an int8 KV cache, from the K and V that the quantised model produced."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantflow.errors import FormatError, Problem
from quantflow.models.decoder import ObserveKV
from quantflow.quant.kv import KVParameters, kv_parameters, round_kv
from quantflow.recipe import KvQparams


def layer_parameters(extremes: Mapping[str, Tensor], settings: KvQparams, rank: int = 0, tp: int = 1) -> dict[str, KVParameters]:
    """Parameters of `key` and `value` from a layer's extremes `[kv_heads, D]`; of one rank's heads, under tensor parallelism."""
    found = {}
    for name in ("key", "value"):
        low, high = (extremes[f"{name}.{end}"].chunk(tp)[rank] for end in ("min", "max"))
        found[name] = kv_parameters(low, high, bits=settings.bits, symmetric=settings.symmetric, granularity=settings.granularity)
    return found


def layer_tensors(parameters: Mapping[str, KVParameters]) -> dict[str, Tensor]:
    """`k_scale`, `k_zero_point`, `v_scale`, `v_zero_point`, float32."""
    tensors = {}
    for letter, name in (("k", "key"), ("v", "value")):
        tensors[f"{letter}_scale"] = parameters[name].scale
        tensors[f"{letter}_zero_point"] = parameters[name].zero_point
    return tensors


def parameter_tensors(prefix: str, parameters: Mapping[str, KVParameters]) -> dict[str, Tensor]:
    """The same under `{prefix}.`, as they are stored."""
    return {f"{prefix}.{name}": tensor for name, tensor in layer_tensors(parameters).items()}


def of_rank(tensors: Mapping[str, Tensor], kv_heads: int, rank: int, tp: int) -> dict[str, Tensor]:
    """The stored parameters for a rank's heads: those per tensor are everybody's."""

    def part(value: Tensor) -> Tensor:
        by_head = value.dim() > 0 and value.shape[0] == kv_heads
        return torch.chunk(value, tp)[rank].contiguous() if by_head else value

    return {name: part(value) for name, value in tensors.items()}


def per_rank(tensors: Mapping[str, Tensor], kv_heads: int, tp: int, *, rounded: bool = False) -> dict[str, Tensor]:
    """One scale and zero point for each layer and rank, `[]` or `[tp]`, which is what TurboMind holds.

    Raises FormatError where a rank's heads have several; with `rounded`, they get the range that spans theirs.
    """
    fine = {name for name, value in tensors.items() if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != tp)}
    if fine and not rounded:
        found = f"parameters by head or channel ({sorted(fine)[0]})"
        hint = "Use kv_qparams: {granularity: tensor}, or --requantize to widen them"
        raise FormatError(Problem("KV cache", found, "one scale for each layer and rank", hint))
    if not fine:
        return dict(tensors)
    whole: dict[str, Tensor] = {}
    for name in sorted(n.removesuffix("scale") for n in tensors if n.endswith("_scale")):
        scale, zero = (tensors[f"{name}{part}"] for part in ("scale", "zero_point"))
        scale, zero = ((t if t.dim() else t.expand(kv_heads)).reshape(tp, -1) for t in (scale, zero))
        if not bool(zero.any()):
            whole[f"{name}scale"], whole[f"{name}zero_point"] = scale.amax(1), zero[:, 0]
            continue
        low, high = (zero - 127.5 * scale).amin(1), (zero + 127.5 * scale).amax(1)
        whole[f"{name}scale"], whole[f"{name}zero_point"] = (high - low) / 255, (low + high) / 2
    return {name: value[0] if tp == 1 else value for name, value in whole.items()}


def rounding(of_layer: Callable[[int], Mapping[str, KVParameters]]) -> Callable[[int], ObserveKV]:
    """For each layer, an observer that rounds K and V as the cache would."""

    def for_layer(index: int) -> ObserveKV:
        parameters = of_layer(index)
        return lambda k, v: (round_kv(k, parameters["key"]), round_kv(v, parameters["value"]))

    return for_layer
