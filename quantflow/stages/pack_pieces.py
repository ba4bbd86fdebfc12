"""What a checkpoint consists of, in the order in which it is written: native tensors and quantised
modules, each read and packed while the one before it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from quantflow.checkpoints.rounding import converted
from quantflow.checkpoints.tensor_file import ITEM_BYTES, dtype_name, torch_dtype
from quantflow.formats.base import SAFETENSORS_DTYPE, Spec
from quantflow.formats.weight import Weight
from quantflow.models.architecture import Joined, Source
from quantflow.models.sharding import shard_plain, shard_shape
from quantflow.quant.numbers import QuantizedTensor
from quantflow.quant.scheme import Scheme
from quantflow.stages.pack_job import PackJob

Step = Callable[[str], None]
_Loaded = tuple[dict[str, Tensor], dict[str, float]]
_KV = "kv"  # a piece that is no tensor of the layer, but the scales of its cache


class Results(Protocol):
    """What the sweep left (see `pipeline/sweep.py`). changed: a tensor that is not the checkpoint's
    any more, else None; index is None outside the layers."""

    def linear(self, index: int | None, name: str, in_features: int) -> QuantizedTensor: ...

    def changed(self, index: int | None, name: str) -> Tensor | None: ...


class Writer(Protocol):
    def write(self, name: str, tensor: Tensor) -> None: ...


@dataclass(frozen=True)
class Piece:
    """A native tensor, or a quantised module (`scheme`), and the tensors it becomes. joined: where
    the native tensors lie in it, of which it is made."""

    name: str
    layer: int | None
    relative: str
    specs: dict[str, Spec]
    scheme: Scheme | None = None
    shape: tuple[int, ...] = ()
    cut: int | None = None
    last_of_layer: bool = False
    joined: Mapping[str, Source] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in self.specs.values())


def pieces_of(job: PackJob) -> Iterator[Piece]:
    checkpoint, scale_dtype = job.checkpoint, job.format.scale_dtype(job.checkpoint.config.dtype)
    for name in checkpoint.outer_names():
        shape, module = checkpoint.shape_of(name), name.removesuffix(".weight")
        scheme = job.outer.get(module)
        if scheme is None:
            yield Piece(name, None, name, {name: (_plain_dtype(job, name), shape)}, shape=shape)
        else:
            specs = job.format.specs(Weight(module, (shape[0], shape[1]), scheme), scale_dtype)
            yield Piece(module, None, module, specs, scheme, shape)
    for index in range(checkpoint.config.layers):
        prefix = checkpoint.architecture.layer_prefix(index) + "."
        schemes = job.schemes.get(index, {})
        yield from _kv_pieces(job, index)
        linears = checkpoint.linears(index)
        whole = {
            part: each for each in checkpoint.joined(index, job.format.name) for part in each.parts
        }
        # a tensor of many is written where the first of them would be
        names = [
            name
            for name in checkpoint.layer_names(index)
            if name not in whole or name == next(iter(whole[name].parts))
        ]
        for name in names:
            last = name == names[-1]
            if name in whole:
                yield _joined_piece(job, index, whole[name], last=last)
                continue
            relative = name.removeprefix(prefix)
            linear, _, part = relative.rpartition(".")
            cut = linears[linear].cut if job.tp > 1 and linear in linears else None
            shape = checkpoint.shape_of(name)
            local = shard_shape(name, shape, cut, job.tp)
            if part == "weight" and linear in schemes:
                module = name.removesuffix(".weight")
                weight = Weight(module, (local[0], local[1]), schemes[linear])
                specs = job.format.specs(weight, scale_dtype)
                yield Piece(module, index, linear, specs, schemes[linear], shape, cut, last)
            else:
                yield Piece(
                    name,
                    index,
                    relative,
                    {name: (_plain_dtype(job, name), local)},
                    None,
                    shape,
                    cut,
                    last,
                )
    for name in job.copied:
        shape = checkpoint.shape_of(name)
        yield Piece(name, None, name, {name: (_plain_dtype(job, name), shape)}, shape=shape)


def _joined_piece(job: PackJob, index: int, whole: Joined, *, last: bool) -> Piece:
    prefix = job.checkpoint.architecture.layer_prefix(index) + "."
    linears = {name.removeprefix(prefix).rpartition(".")[0] for name in whole.parts}
    dtype = _plain_dtype(job, next(iter(whole.parts)))
    if not linears.isdisjoint(job.held(index)) and not whole.name.endswith("bias"):
        dtype = SAFETENSORS_DTYPE[
            job.checkpoint.config.dtype
            if job.format.keeps_codes
            else job.format.scale_dtype(job.checkpoint.config.dtype)
        ]
    specs: dict[str, Spec] = {whole.name: (dtype, whole.shape)}
    relative = whole.name.removeprefix(prefix)
    return Piece(whole.name, index, relative, specs, last_of_layer=last, joined=whole.parts)


def _plain_dtype(job: PackJob, name: str) -> str:
    """What an unquantised tensor is written in: as it is stored, or in the 16 bits that a plain
    checkpoint is to have."""
    if job.format.dtype not in (None, "float32"):
        return SAFETENSORS_DTYPE[str(job.format.dtype)]
    return (
        SAFETENSORS_DTYPE[job.checkpoint.config.dtype]
        if name in job.unpacked
        else job.checkpoint.dtype_of(name)
    )


def _kv_pieces(job: PackJob, index: int) -> Iterator[Piece]:
    """The scales of a layer's KV cache, for a format that holds them among the weights."""
    if job.kv and job.kv_scales and index in job.checkpoint.cached_layers:
        attention = job.checkpoint.attention(index)
        scales = {name: job.kv[name] for name in (f"{attention}.k_scale", f"{attention}.v_scale")}
        specs: dict[str, Spec] = {
            name: (dtype_name(scale.dtype), tuple(scale.shape)) for name, scale in scales.items()
        }
        yield Piece(attention, index, _KV, specs)


def specs_of(pieces: list[Piece]) -> dict[str, Spec]:
    return {name: spec for piece in pieces for name, spec in piece.specs.items()}


def fill(
    writer: Writer, pieces: list[Piece], job: PackJob, results: Results, step: Step
) -> dict[str, float]:
    errors: dict[str, float] = {}
    for piece, (tensors, off) in _ahead(pieces, lambda piece: _load(piece, job, results)):
        errors |= {name: error for name, error in off.items() if error}
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        if piece.last_of_layer:
            step(f"layer {piece.layer}")
    return errors


def _ahead(
    pieces: list[Piece], load: Callable[[Piece], _Loaded]
) -> Iterator[tuple[Piece, _Loaded]]:
    """Each piece with its tensors, the next one being read and packed while the caller writes."""
    with ThreadPoolExecutor(1) as loader:
        coming = loader.submit(load, pieces[0])
        for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
            tensors = coming.result()
            if following is not None:
                coming = loader.submit(load, following)
            yield piece, tensors


def _load(piece: Piece, job: PackJob, results: Results) -> _Loaded:
    """The tensors of a piece, and the relative error of each that a dtype made inexact."""
    model_dtype = getattr(torch, job.checkpoint.config.dtype)
    if piece.relative == _KV:
        assert job.kv is not None
        return {name: job.kv[name] for name in piece.specs}, {}
    if piece.joined:
        return _join(piece, job, results)
    if piece.scheme is not None:
        quantised = results.linear(piece.layer, piece.relative, piece.shape[1])
        if piece.cut is not None:
            quantised = quantised.cut(piece.cut, job.rank, job.tp)
        return job.format.encode(piece.name, quantised, model_dtype), {}
    changed = results.changed(piece.layer, piece.relative)
    value = job.checkpoint.tensor(piece.name) if changed is None else changed
    value = shard_plain(piece.name, value, piece.cut, job.rank, job.tp)
    value, error = converted(
        piece.name, value, torch_dtype(piece.specs[piece.name][0]), rounded=job.rounded
    )
    return {piece.name: value}, {piece.name: error}


def _join(piece: Piece, job: PackJob, results: Results) -> _Loaded:
    """A tensor of many native ones, quantised ones as the numbers that their codes stand for. A
    format that keeps codes has it in the model's dtype, to which those are rounded."""
    checkpoint, ((dtype, shape),) = job.checkpoint, piece.specs.values()
    assert piece.layer is not None
    prefix = checkpoint.architecture.layer_prefix(piece.layer) + "."
    whole, off = torch.empty(shape, dtype=torch_dtype(dtype)), 0.0
    model_dtype = getattr(torch, checkpoint.config.dtype)
    schemes = job.held(piece.layer)
    for name, place in piece.joined.items():
        linear, _, part = name.removeprefix(prefix).rpartition(".")
        if part == "weight" and linear in schemes:
            quantised = results.linear(piece.layer, linear, checkpoint.shape_of(name)[1])
            if job.format.keeps_codes:
                value = quantised.dequantize().to(whole.dtype)
            else:
                (value,) = job.format.encode(name, quantised, model_dtype).values()
        else:
            changed = results.changed(piece.layer, f"{linear}.{part}")
            value = checkpoint.tensor(name) if changed is None else changed
            value, error = converted(name, value, whole.dtype, rounded=job.rounded)
            off = max(off, error)
        place.put_into(whole, value)
    return {piece.name: whole}, {piece.name: off}
