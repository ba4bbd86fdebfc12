"""`kv_qparams`: scales and zero points of an int8 KV cache, from the K and V that the quantised model produced."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

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


def rounding(of_layer: Callable[[int], Mapping[str, KVParameters]]) -> Callable[[int], ObserveKV]:
    """For each layer, an observer that rounds K and V as the cache would."""

    def for_layer(index: int) -> ObserveKV:
        parameters = of_layer(index)
        return lambda k, v: (round_kv(k, parameters["key"]), round_kv(v, parameters["value"]))

    return for_layer
