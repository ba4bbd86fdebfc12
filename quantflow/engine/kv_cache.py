"""The paged KV cache of all layers: what a block takes, how many there are, and how keys and values
are stored.

Shapes: `G` KV heads, `D` head_dim, `B` tokens a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantflow.artifacts.artifact import kv_file, read_manifest
from quantflow.checkpoints.tensor_file import TensorFile
from quantflow.engine.config import SHARE, EngineConfig, KVPrecision
from quantflow.engine.ops import KVCache, Ops
from quantflow.errors import ModelError, Problem, ResourceError
from quantflow.machine import free_bytes
from quantflow.models.config import DecoderConfig

PARAMETERS = ("k_scale", "k_zero_point", "v_scale", "v_zero_point")


@dataclass(frozen=True)
class KVFormat:
    """parameters: a layer's calibrated k_scale, k_zero_point, v_scale, v_zero_point. int8 without:
    dynamic."""

    int8: bool
    parameters: tuple[Mapping[str, Tensor], ...] = ()

    def part(self, rank: int, tp: int) -> KVFormat:
        """With the parameters of one rank's heads."""
        cut = tuple(
            {n: t if not t.ndim else t.chunk(tp)[rank] for n, t in layer.items()}
            for layer in self.parameters
        )
        return KVFormat(self.int8, cut)

    def __str__(self) -> str:
        if not self.int8:
            return "full precision"
        return "int8, calibrated" if self.parameters else "int8, dynamic per token and head"


def kv_format(
    precision: KVPrecision,
    folder: Path,
    config: DecoderConfig,
    layer_prefix: str,
    own: Mapping[str, Tensor] | None = None,
) -> KVFormat:
    """What `precision` means for the model in `folder` (or the artifact that it is a part of).
    layer_prefix holds `{i}`. own: parameters that the checkpoint itself holds, named as in
    `kv_qparams.safetensors`, one a layer or one a rank."""
    if precision == KVPrecision.full:
        return KVFormat(False)
    parameters: tuple[Mapping[str, Tensor], ...] = ()
    if precision != KVPrecision.dynamic:
        parameters = (
            _of_checkpoint(own, config, layer_prefix)
            if own
            else calibrated(folder, config, layer_prefix)
        )
    return KVFormat(bool(parameters) or precision != KVPrecision.auto, parameters)


def _of_checkpoint(
    own: Mapping[str, Tensor], config: DecoderConfig, layer_prefix: str
) -> tuple[Mapping[str, Tensor], ...]:
    prefixes = [f"{layer_prefix.format(i=index)}.self_attn" for index in range(config.layers)]
    return tuple(
        {name: own[f"{prefix}.{name}"].float() for name in PARAMETERS} for prefix in prefixes
    )


def calibrated(
    folder: Path, config: DecoderConfig, layer_prefix: str
) -> tuple[Mapping[str, Tensor], ...]:
    """A layer's parameters each, or () where the artifact has none. Raises ModelError for a file
    that does not fit the model."""
    path = kv_file(folder)
    if path is None:
        return ()
    file = TensorFile(path)
    settings = (read_manifest(path.parent) or {}).get("kv_qparams")
    if isinstance(settings, dict) and settings.get("bits") != 8:
        raise ModelError(
            Problem(
                str(path),
                f"parameters for {settings.get('bits')} bits",
                "8",
                "Use --kv dynamic, or --kv full",
            )
        )
    layers, problems = [], []
    shapes = [(), (config.kv_heads,), (config.kv_heads, config.head_dim)]
    for i in range(config.layers):
        prefix = layer_prefix.format(i=i) + ".self_attn"
        layer = {}
        for name in PARAMETERS:
            full = f"{prefix}.{name}"
            if full not in file.tensors:
                problems.append(Problem(str(path), f"{full} is missing"))
            elif file.tensors[full].shape not in shapes:
                problems.append(
                    Problem(
                        f"{path} {full}",
                        f"shape {list(file.tensors[full].shape)}",
                        " or ".join(map(str, map(list, shapes))),
                    )
                )
            else:
                layer[name] = file.read(full).float()
                if not bool(layer[name].isfinite().all()) or (
                    name.endswith("scale") and bool((layer[name] <= 0).any())
                ):
                    problems.append(
                        Problem(
                            f"{path} {full}",
                            "numbers that are no scale",
                            "finite numbers, scales above 0",
                        )
                    )
        layers.append(layer)
    if problems:
        raise ModelError(problems)
    return tuple(layers)


def block_bytes(config: DecoderConfig, kv: KVFormat, dtype: torch.dtype, size: int) -> int:
    """What one block takes in all layers."""
    item = 1 if kv.int8 else dtype.itemsize
    scales = 8 if kv.int8 and not kv.parameters else 0  # two float32 a token and head
    return config.layers * config.kv_heads * size * (2 * config.head_dim * item + scales)


def block_count(
    config: EngineConfig, model: DecoderConfig, kv: KVFormat, context: int, ops: Ops
) -> int:
    """Blocks of the cache: as many as may be useful, in as much memory as may be taken. Raises
    ResourceError where that is none."""
    size = config.block_size
    each, longest = block_bytes(model, kv, ops.dtype, size), -(-context // size)
    if ops.cuda:
        torch.cuda.empty_cache()  # what loading took is free again
    share = config.cache_max_entry_count or SHARE[ops.device.type]
    limit = config.cache_bytes or int(free_bytes(ops.device) * share)
    count = min(limit // each, longest * config.max_batch_size)
    if ops.ranks:  # free memory differs between them, and all must decide the same
        count = ops.ranks.least(count)
    if count < 1:
        expected = f"at least {each} for one block of {size} tokens"
        raise ResourceError(Problem("KV cache", f"{limit} bytes", expected))
    return count


def make_caches(
    config: DecoderConfig,
    kv: KVFormat,
    dtype: torch.dtype,
    device: torch.device,
    blocks: int,
    size: int,
) -> list[KVCache]:
    """The layers' caches, empty."""
    shape = (blocks, config.kv_heads, size, config.head_dim)

    def layer(index: int) -> KVCache:
        # Not filled: nothing is read that was not written, and a CPU's pages are taken up when they
        # are.
        k, v = (
            torch.empty(shape, dtype=torch.int8 if kv.int8 else dtype, device=device)
            for _ in range(2)
        )
        if not kv.int8:
            return KVCache(k, v)
        if not kv.parameters:
            return KVCache(k, v, *(torch.empty(shape[:3], device=device) for _ in range(2)))
        p = {name: value.to(device) for name, value in kv.parameters[index].items()}
        if order := config.ropes[config.rope_kind(index)].order(config.head_dim):
            # as the engine's q and k have their channels
            for name in ("k_scale", "k_zero_point"):
                p[name] = p[name][:, order] if p[name].ndim == 2 else p[name]
        heads, channels = (config.kv_heads,), (config.kv_heads, config.head_dim)
        k_shape = channels if p["k_scale"].ndim == 2 else heads
        return KVCache(
            k,
            v,
            p["k_scale"].expand(k_shape).contiguous(),
            _by_channel(p["v_scale"], channels),
            _widened(p["k_zero_point"], k_shape),
            _by_channel(p["v_zero_point"], channels),
        )

    return [layer(i) for i in range(config.layers)]


def _by_channel(value: Tensor, channels: tuple[int, int]) -> Tensor:
    return (value[:, None] if value.ndim == 1 else value).expand(channels).contiguous()


def _widened(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (
        (value[:, None] if value.ndim == 1 and len(shape) == 2 else value)
        .expand(shape)
        .contiguous()
    )


def copy_block(caches: list[KVCache], source: int, target: int) -> None:
    """The content of a block, and its dynamic scales, into another."""
    for cache in caches:
        for part in (cache.k, cache.v):
            part[target].copy_(part[source])
        for scale in (cache.k_scale, cache.v_scale):
            if scale is not None and scale.ndim == 3:
                scale[target].copy_(scale[source])


def cache_bytes(caches: list[KVCache]) -> int:
    tensors = [t for c in caches for t in (c.k, c.v, c.k_scale, c.v_scale) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)
