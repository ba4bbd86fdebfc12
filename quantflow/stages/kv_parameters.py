"""`kv_qparams`: scales and zero points of an int8 KV cache, from the K and V that the quantised
model produced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantflow.decoder.block import ObserveKV
from quantflow.errors import FormatError, Problem
from quantflow.quant.kv import KVParameters, kv_parameters, round_kv

if TYPE_CHECKING:  # settings need pydantic, and this needs their values alone
    from quantflow.stages.kv_qparams import KvQparams
    from quantflow.stages.work import LayerWork


def keep_extremes(settings: KvQparams, work: LayerWork) -> None:
    """Stores the extremes of K and V that whoever rounded the layer has seen. They serve all
    settings."""
    work.tensors |= {f"kv.{name}": value for name, value in work.kv.result().items()}


def layer_parameters(
    extremes: Mapping[str, Tensor], settings: KvQparams, rank: int = 0, tp: int = 1
) -> dict[str, KVParameters]:
    """Parameters of `key` and `value` from a layer's extremes `[kv_heads, D]`; of one rank's heads,
    under tensor parallelism. Of a layer that caches none, none."""
    parameters = {}
    for name in ("key", "value") if extremes else ():
        low, high = (extremes[f"{name}.{end}"].chunk(tp)[rank] for end in ("min", "max"))
        parameters[name] = kv_parameters(
            low,
            high,
            bits=settings.bits,
            symmetric=settings.symmetric,
            granularity=settings.granularity,
        )
    return parameters


def layer_tensors(parameters: Mapping[str, KVParameters]) -> dict[str, Tensor]:
    """`k_scale`, `k_zero_point`, `v_scale`, `v_zero_point`, float32."""
    tensors = {}
    for name, values in parameters.items():
        tensors[f"{name[0]}_scale"], tensors[f"{name[0]}_zero_point"] = (
            values.scale,
            values.zero_point,
        )
    return tensors


def parameter_tensors(prefix: str, parameters: Mapping[str, KVParameters]) -> dict[str, Tensor]:
    """The same under `{prefix}.`, as they are stored."""
    return {f"{prefix}.{name}": tensor for name, tensor in layer_tensors(parameters).items()}


FP8_MAX = 448.0  # the largest float8_e4m3fn


def fp8_scales(prefix: str, largest: Mapping[str, float], dtype: torch.dtype) -> dict[str, Tensor]:
    """`{prefix}.k_scale` and `v_scale`, `[1]` in `dtype`, of an fp8 cache: `largest / 448`, rounded
    up, since a smaller scale would clip.

    largest: the largest magnitudes of `key` and `value`; 0, of nothing but zeros, has scale 1.
    """
    scales = {}
    for letter, name in (("k", "key"), ("v", "value")):
        exact = torch.tensor([largest[name] / FP8_MAX or 1.0], dtype=torch.float64)
        near = exact.to(dtype)
        # float32 parameters give the largest magnitude back to within so much
        if bool(near < exact * (1 - 2**-20)):
            near = torch.nextafter(near, torch.full_like(near, torch.inf))
        scales[f"{prefix}.{letter}_scale"] = near
    return scales


def largest_of_extremes(extremes: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest magnitude of `key` and of `value`, from a layer's extremes `[kv_heads, D]`."""
    return {
        name: float(torch.maximum(-extremes[f"{name}.min"], extremes[f"{name}.max"]).max())
        for name in ("key", "value")
    }


def largest_of_parameters(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, float]:
    """The same from the int8 parameters of a layer, whatever their granularity: never less than it
    was. What is constant has a scale of 1, as other channels may, and counts for the whole range
    that this holds: no parameter tells the two apart, and less would clip."""
    largest = {}
    for letter, name in (("k", "key"), ("v", "value")):
        scale, zero = (
            tensors[f"{prefix}.{letter}_{part}"].double() for part in ("scale", "zero_point")
        )
        # Asymmetric codes span 255 steps around the zero point, symmetric ones 127 on each side.
        largest[name] = float((zero.abs() + scale * (127.5 if bool(zero.any()) else 127.0)).max())
    return largest


def of_rank(tensors: Mapping[str, Tensor], kv_heads: int, rank: int, tp: int) -> dict[str, Tensor]:
    """The stored parameters for a rank's heads: those per tensor are everybody's."""

    def part(value: Tensor) -> Tensor:
        by_head = value.dim() > 0 and value.shape[0] == kv_heads
        return torch.chunk(value, tp)[rank].contiguous() if by_head else value

    return {name: part(value) for name, value in tensors.items()}


def per_rank(
    tensors: Mapping[str, Tensor], kv_heads: int, tp: int, *, rounded: bool = False
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One scale and zero point for each layer and rank, `[]` or `[tp]`, which is what TurboMind
    holds; and by how much each scale had to be widened, as a share of the smallest it replaces.

    Raises FormatError where a rank's heads have several, unless `rounded`: then they get the range
    that spans theirs.
    """
    whole: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for name in sorted(n.removesuffix("scale") for n in tensors if n.endswith("_scale")):
        # [tp, values of a rank]
        scale, zero = (
            _by_head(tensors[f"{name}{part}"], kv_heads).reshape(tp, -1)
            for part in ("scale", "zero_point")
        )
        if not bool((scale != scale[:, :1]).any() or (zero != zero[:, :1]).any()):
            parameters = scale[:, 0], zero[:, 0]
        elif not rounded:
            hint = (
                "Use kv_qparams: {granularity: tensor}; or export --requantize, requantize: true in"
                " pack, which widens them"
            )
            what = f"parameters by head or channel ({name}scale)"
            raise FormatError(Problem("KV cache", what, "one scale for each layer and rank", hint))
        else:
            low, high = (zero - 127.5 * scale).amin(1), (zero + 127.5 * scale).amax(1)
            parameters = (
                ((high - low) / 255, (low + high) / 2)
                if bool(zero.any())
                else (scale.amax(1), zero[:, 0])
            )
            errors[f"{name}scale"] = float((parameters[0][:, None] / scale).max()) - 1
        for part, values in zip(("scale", "zero_point"), parameters, strict=True):
            whole[f"{name}{part}"] = values[0] if bool((values == values[0]).all()) else values
    return whole, errors


def _by_head(value: Tensor, kv_heads: int) -> Tensor:
    return value if value.dim() else value.expand(kv_heads)


def rounding(
    of_layer: Callable[[int], Mapping[str, KVParameters]],
) -> Callable[[int], ObserveKV | None]:
    """For each layer, an observer that rounds K and V as the cache would; None for a layer that has
    none."""

    def for_layer(index: int) -> ObserveKV | None:
        parameters = of_layer(index)
        if not parameters:
            return None
        return lambda k, v: (round_kv(k, parameters["key"]), round_kv(v, parameters["value"]))

    return for_layer
