"""A checkpoint's weights in the layouts that the engine computes from, streamed to the device one
linear at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantflow.decoder.native import norm_scale
from quantflow.engine.families import engine_problem
from quantflow.engine.model import Layer, Mixture, Mlp, Model, Norm
from quantflow.engine.ops import Linear, Ops, resident_bytes
from quantflow.errors import ModelError, Problem
from quantflow.formats.reader import Weights, checkpoint_folder
from quantflow.formats.tensors import integer_grid
from quantflow.formats.weight import Weight, grid_problems
from quantflow.models.architecture import Layer as LayerNames
from quantflow.models.config import DecoderConfig
from quantflow.models.segments import Segment
from quantflow.models.sharding import shard_plain
from quantflow.quant.numbers.integer import IntegerTensor

# the kinds of numbers that kernels compute from; others are dequantised at the start
COMPUTED = ("integer",)


@dataclass(frozen=True)
class Loaded:
    """ways: how linears are computed, in words -> how many. weight_bytes: what weights take on the
    device."""

    model: Model
    ways: dict[str, int]
    weight_bytes: int


def load_model(weights: Weights, ops: Ops, step: Callable[[], None] = lambda: None) -> Loaded:
    """The model of a checkpoint, quantised or not; under tensor parallelism this rank's part of it,
    from the rank's own files or cut out of the whole. step is called after each layer. Raises
    ModelError for what cannot be cut."""
    return _Loader(weights, ops).load(step)


def open_weights(model: Path, rank: int, tp: int) -> Weights:
    """The whole checkpoint, or this rank's files where the artifact has them. Raises ModelError for
    a family that has no table, which the engine cannot compute."""
    own = checkpoint_folder(model) / f"tp{tp}" / f"rank-{rank}"
    weights = Weights(own, tp=tp) if tp > 1 and own.is_dir() else Weights(model)
    if problem := engine_problem(weights.checkpoint):
        raise ModelError(problem)
    return weights


def rank_config(config: DecoderConfig, tp: int) -> DecoderConfig:
    """What one of `tp` ranks computes. Raises ModelError where heads do not divide, and for a
    family whose linears have no parts."""
    if config.uncut and tp > 1:
        raise ModelError(Problem("tensor parallel", config.uncut, "1 rank for this family"))
    wrong = [
        f"{n} {kind}"
        for n, kind in ((config.heads, "heads"), (config.kv_heads, "KV heads"))
        if n % tp
    ]
    if wrong:
        raise ModelError(Problem("tensor parallel", " and ".join(wrong), f"multiples of {tp}"))
    return replace(config, heads=config.heads // tp, kv_heads=config.kv_heads // tp)


class _Loader:
    def __init__(self, weights: Weights, ops: Ops) -> None:
        self.weights, self.ops = weights, ops
        self.rank, self.tp = (ops.ranks.rank, ops.ranks.size) if ops.ranks else (0, 1)
        self.architecture, self.config = (
            weights.checkpoint.architecture,
            rank_config(weights.checkpoint.config, self.tp),
        )
        self._orders: dict[str, Tensor] = {}  # of the layer that is loaded
        self.ways: Counter[str] = Counter()
        self.bytes = 0

    def load(self, step: Callable[[], None]) -> Loaded:
        architecture, config = self.architecture, self.config
        embedding = self._plain(f"{architecture.embedding}.weight")
        positions = (
            self._plain(f"{architecture.positions}.weight") if architecture.positions else None
        )
        layers = []
        for index in range(config.layers):
            layers.append(self._layer(index))
            step()
        head = (
            Linear(embedding) if config.tied else self._linears((architecture.head,), bias=False)[0]
        )
        final = self._norm(architecture.final_norm)
        model = Model(config, self.ops, embedding, positions, tuple(layers), final, head)
        return Loaded(model, dict(self.ways), self.bytes)

    def _plain(self, name: str) -> Tensor:
        tensor = self.weights.tensor(name).to(self.ops.device, self.ops.dtype)
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor

    def _norm(self, name: str, order: Tensor | None = None) -> Norm:
        """order: of its channels."""
        bias = (
            self.weights.tensor(f"{name}.bias").to(self.ops.device).float()
            if self.config.family == "opt"
            else None
        )
        scale = norm_scale(self.config, self.weights.tensor(f"{name}.weight")).float()
        return Norm((scale if order is None else scale[order]).to(self.ops.device), bias)

    def _norm_if(self, prefix: str, name: str) -> Norm | None:
        return self._norm(prefix + name) if name else None

    def _layer(self, index: int) -> Layer:
        names, config, prefix = (
            self.architecture.layer,
            self.config,
            self.architecture.layer_prefix(index) + ".",
        )
        rope = config.rope_kind(index)
        self._orders = _channel_orders(names, config, rope)
        head_norms = [
            self._norm(prefix + n, self._orders.get(n)) if config.qk_norm else None
            for n in (names.q_norm, names.k_norm)
        ]
        attention_in, attention_out, *inner = self.weights.checkpoint.segments(index)
        experts = tuple(
            self._mlp(prefix, reads, writes)
            for reads, writes in zip(inner[::2], inner[1::2], strict=True)
        )
        mlp: Mlp | Mixture
        if config.is_moe(index):
            router = self._linears((prefix + names.router,), bias=False)[0]
            mlp = Mixture(router, experts)
        else:
            (mlp,) = experts
        return Layer(
            attention_norm=self._norm_if(prefix, names.attention_norm),
            qkv=self._segment(prefix, attention_in),
            q_norm=head_norms[0],
            k_norm=head_norms[1],
            o=self._segment(prefix, attention_out)[0],
            attention_out_norm=self._norm_if(prefix, names.attention_out_norm),
            mlp_norm=self._norm_if(prefix, names.mlp_norm),
            mlp=mlp,
            mlp_out_norm=self._norm_if(prefix, names.mlp_out_norm),
            window=config.window(index),
            rope=rope,
        )

    def _mlp(self, prefix: str, reads: Segment, writes: Segment) -> Mlp:
        return Mlp(
            self._segment(prefix, reads),
            self._segment(prefix, writes)[0],
            gated=len(reads.linears) == 2 or bool(self.architecture.layer.gate_up),
        )

    def _segment(self, prefix: str, segment: Segment) -> tuple[Linear, ...]:
        orders = {prefix + name: self._orders.get(name) for name in segment.names}
        return self._linears(tuple(orders), bias=segment.linears[0].bias, orders=orders)

    def _linears(
        self,
        modules: tuple[str, ...],
        *,
        bias: bool,
        orders: Mapping[str, Tensor | None] | None = None,
    ) -> tuple[Linear, ...]:
        """Linears that read the same input, as one where they can be fused. orders: of a module's
        rows."""
        orders = orders or dict.fromkeys(modules)
        row_parallel = self.weights.checkpoint.cut(f"{modules[0]}.weight") == 1
        if row_parallel and self.rank:
            bias = False  # it is added once
        biases = (
            [
                _ordered(self._part(f"{m}.bias", self.weights.tensor(f"{m}.bias")), orders[m])
                for m in modules
            ]
            if bias
            else []
        )
        schemes = [self.weights.scheme_of(m) for m in modules]
        quantised = [scheme is not None and scheme.kind in COMPUTED for scheme in schemes]
        linears: list[Linear]
        if not any(quantised):
            stored = (
                _ordered(self._part(f"{m}.weight", self.weights.tensor(f"{m}.weight")), orders[m])
                for m in modules
            )
            dense = [tensor.to(self.ops.device, self.ops.dtype) for tensor in stored]
            linears = [self.ops.dense(_joined(dense), _joined(biases) if biases else None)]
            if schemes[0] is not None:
                self.ways[
                    f"{linears[0].way} ({schemes[0]} has no kernel: dequantised at the start)"
                ] += 1
                self.bytes += resident_bytes(linears[0].weight)
                return tuple(linears)
        elif all(quantised) and _fusable(
            tensors := [_rows_ordered(self._quantised(m), orders[m]) for m in modules]
        ):
            first = tensors[0]
            codes, scales, zeros = (
                _joined([getattr(t, part) for t in tensors])
                for part in ("codes", "scales", "zeros")
            )
            together = IntegerTensor(first.scheme, codes, scales, zeros, first.group_index)
            linears = [self.ops.prepare(together, _joined(biases) if biases else None)]
        else:
            linears = [self._linears((m,), bias=bias, orders=orders)[0] for m in modules]
            return tuple(linears)
        for linear in linears:
            self.ways[linear.way] += 1
            self.bytes += resident_bytes(linear.weight)
        return tuple(linears)

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of an unquantised tensor."""
        cut = self.weights.checkpoint.cut(name)
        if self.tp == self.weights.checkpoint.tp or cut is None:
            return tensor
        if tensor.shape[cut] % self.tp:
            raise ModelError(
                Problem(
                    name,
                    f"shape {list(tensor.shape)}",
                    f"a multiple of tp = {self.tp} along dimension {cut}",
                )
            )
        return shard_plain(name, tensor, cut, self.rank, self.tp)

    def _quantised(self, module: str) -> IntegerTensor:
        tensor, cut = (
            integer_grid(module, self.weights.quantized(module)),
            self.weights.checkpoint.cut(f"{module}.weight"),
        )
        if self.tp == self.weights.checkpoint.tp or cut is None:
            return tensor
        weight = Weight(module, tensor.shape, tensor.scheme, tensor.indexed, self.tp, cut)
        if problems := grid_problems(weight, COMPUTED):
            raise ModelError(problems)
        return tensor.cut(cut, self.rank, self.tp)


def _channel_orders(names: LayerNames, config: DecoderConfig, rope: int) -> dict[str, Tensor]:
    """How the rows of what makes q and k are put, for the kernels, which turn the halves of a head
    into each other: name -> index. {} where they stand so already."""
    order = config.ropes[rope].order(config.head_dim)
    if order is None:
        return {}
    head, d = torch.tensor(order), config.head_dim
    q, k = (
        (torch.arange(n)[:, None] * d + head).flatten() for n in (config.heads, config.kv_heads)
    )
    v = torch.arange(config.kv_heads * d)
    if names.qkv:
        return {names.qkv: torch.cat((q, len(q) + k, len(q) + len(k) + v))}
    whole = {names.q_norm: q, names.k_norm: k}
    each = {names.q_norm: head, names.k_norm: head}
    return {names.q: q, names.k: k, **(whole if config.qk_norm_whole else each)}


def _ordered(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor[order.to(tensor.device)]


def _rows_ordered(tensor: IntegerTensor, order: Tensor | None) -> IntegerTensor:
    return replace(
        tensor,
        codes=_ordered(tensor.codes, order),
        scales=_ordered(tensor.scales, order),
        zeros=_ordered(tensor.zeros, order),
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _fusable(tensors: list[IntegerTensor]) -> bool:
    first = tensors[0]
    return all(
        t.scheme == first.scheme
        and t.scales.dtype == first.scales.dtype
        and (
            t.group_index is None
            if first.group_index is None
            else t.group_index is not None and t.group_index.equal(first.group_index)
        )
        for t in tensors
    )
