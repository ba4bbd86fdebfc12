"""The operations of a model, by Triton kernels on a GPU, by compiled C or plain torch on a CPU.
Nothing else of the engine imports kernels.

Shapes: `T` tokens of all sequences of a step one after the other, `H` heads, `G` KV heads, `D`
head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from quantflow_kernels import cpu_attention, cpu_kernels
from quantflow_kernels import linear as kernels
from quantflow_kernels.configs import DEFAULT, Tuned, tuned
from quantflow_kernels.paging import Batch, KVCache, decode_batch, make_batch, splits_of
from torch import Tensor

from quantflow.decoder.native import normalize
from quantflow.engine.tensor_parallel import Ranks
from quantflow.models.config import DecoderConfig
from quantflow.quant.numbers.integer import IntegerTensor

# keys that one program of a decode takes on a GPU that nothing was measured on
SPLIT = DEFAULT.attention.split
__all__ = ["Batch", "KVCache", "Linear", "Ops"]


@dataclass(frozen=True)
class Linear:
    """A linear layer as it is computed. weight: `[N, K]` in the model's dtype, or a quantised
    weight in its kernel's layout."""

    weight: Tensor | kernels.QuantWeight
    bias: Tensor | None = None

    @property
    def way(self) -> str:
        """How it is computed, in words."""
        return "torch dense" if isinstance(self.weight, Tensor) else kernels.way(self.weight)


def resident_bytes(weight: Tensor | kernels.QuantWeight) -> int:
    """What a weight takes in memory."""
    tensors = (
        [weight]
        if isinstance(weight, Tensor)
        else [t for t in vars(weight).values() if isinstance(t, Tensor)]
    )
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Ops:
    """exact: a row's result never depends on what else is in the batch, bit for bit. ranks: None
    without tensor parallelism."""

    device: torch.device
    dtype: torch.dtype
    exact: bool
    ranks: Ranks | None = None

    @cached_property
    def _tuned(self) -> Tuned:
        return tuned(torch.cuda.get_device_name(self.device)) if self.cuda else DEFAULT

    @cached_property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def compiled(self) -> bool:
        """Whether the CPU's kernels are there; else plain torch operations do what they would."""
        return not self.cuda and cpu_kernels.supports(self.dtype)

    @property
    def way(self) -> str:
        """What everything but the linears is computed by, in words."""
        if self.cuda:
            return "triton"
        return (
            "compiled C"
            if self.compiled
            else f"plain torch ({cpu_kernels.library()[1] or self.dtype})"
        )

    def prepare(self, tensor: IntegerTensor, bias: Tensor | None = None) -> Linear:
        """A quantised linear in the layout that it is computed from, on the device."""
        codes, scales, zeros = (
            t.to(self.device) for t in (tensor.codes, tensor.scales, tensor.zeros)
        )
        index = None if tensor.group_index is None else tensor.group_index.to(self.device)
        # codes of 5 to 7 bits are codes of 8 as well
        bits = tensor.scheme.bits if tensor.scheme.bits <= 4 else 8
        weight = kernels.prepare(
            codes, scales, zeros, tensor.scheme.group_size, bits, self.dtype, index
        )
        return Linear(weight, None if bias is None else bias.to(self.device, self.dtype))

    def dense(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return Linear(
            weight.to(self.device, self.dtype),
            None if bias is None else bias.to(self.device, self.dtype),
        )

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """`x Wᵀ + bias` `[T, N]`."""
        if not isinstance(linear.weight, Tensor):
            return kernels.linear(
                x, linear.weight, linear.bias, exact=self.exact, tuning=self._tuned
            )
        return kernels.dense(x, linear.weight, linear.bias, exact=self.exact)

    def norm(
        self, config: DecoderConfig, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """RMSNorm, or LayerNorm for OPT, over the last dimension. weight: float32."""
        if config.family == "opt" or not (self.cuda or self.compiled):
            return normalize(config, x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        return self._rms_norm(rows, weight, config.norm_eps, None).view(x.shape)

    def add_norm(
        self,
        config: DecoderConfig,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The norm of `x + residual`, which replaces `residual`, in place."""
        if config.family == "opt" or not (self.cuda or self.compiled):
            return normalize(config, residual.add_(x), weight, bias)
        return self._rms_norm(x, weight, config.norm_eps, residual)

    def _rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
        if not self.cuda:
            return cpu_kernels.rms_norm(x, weight, eps, residual)
        from quantflow_kernels.norm import rms_norm

        return rms_norm(x, weight, eps, residual)

    def gate(self, name: str, gate_up: Tensor) -> Tensor:
        """`activation(gate) · up` `[T, I]` from `[T, 2I]`."""
        if self.cuda and name == "silu":
            from quantflow_kernels.activation import silu_mul

            return silu_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        if self.compiled and name == "silu":
            return cpu_kernels.silu_mul(gate, up)
        return (_activate(name, gate.float()) * up.float()).to(gate_up.dtype)

    def activate(self, name: str, x: Tensor) -> Tensor:
        return _activate(name, x.float()).to(x.dtype)

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over all tensor-parallel ranks."""
        return self.ranks.sum(x, ordered=self.exact) if self.ranks else x

    def batch(
        self,
        lengths: Sequence[int],
        contexts: Sequence[int],
        block_table: Tensor,
        config: DecoderConfig,
    ) -> Batch:
        """How a step's queries lie over the cache: see `quantflow_kernels.paging`."""
        return make_batch(
            lengths, contexts, block_table, config.heads, config.kv_heads, self._tuned.attention
        )

    def splits(self, context: int) -> int:
        """Parts that attention over a context is computed in."""
        return splits_of(context, self._tuned.attention)

    def decode_batch(self, block_table: Tensor, contexts: Tensor, splits: int) -> Batch:
        """A step of one query a sequence, made of what is on the device."""
        return decode_batch(block_table, contexts, splits)

    def store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        slots: Tensor,
        cache: KVCache,
    ) -> None:
        """Rotates q `[T, H, D]` in place, and puts k, rotated, and v `[T, G, D]` into their slots
        of the cache."""
        if self.cuda:
            from quantflow_kernels.kv_store import kv_store

            kv_store(q, k, v, cos, sin, slots, cache)
        elif self.compiled and q.shape[-1] <= cpu_kernels.WIDEST:
            cpu_kernels.kv_store(q, k, v, cos, sin, slots, cache)
        else:
            cpu_attention.kv_store(q, k, v, cos, sin, slots, cache)

    def attention(
        self, config: DecoderConfig, q: Tensor, cache: KVCache, batch: Batch, window: int | None
    ) -> Tensor:
        """Attention of `q` `[T, H, D]` over the cache, which holds the new keys and values
        already."""
        scale, limits = config.score_scale, (window or 0, config.attention_cap or 0.0)
        if self.cuda:
            from quantflow_kernels.attention import paged_attention

            return paged_attention(q, cache, batch, scale, self._tuned.attention, *limits)
        if self.compiled and q.shape[-1] <= cpu_kernels.WIDEST:
            return cpu_kernels.paged_attention(q, cache, batch, scale, *limits)
        return cpu_attention.paged_attention(q, cache, batch, scale, *limits, exact=self.exact)


def _activate(name: str, x: Tensor) -> Tensor:
    """In float32, by operations that give an element the same bits wherever it stands: torch's own
    SiLU and GELU on a CPU differ in the last bit between the vectorised part of an array and its
    end."""
    if name == "silu":
        return x / (1 + (-x).exp())
    if name == "relu":
        return x.relu()
    if name == "gelu_tanh":
        inner = (x + 0.044715 * (x * x * x)) * math.sqrt(2 / math.pi)
        return 0.5 * x * (1 + inner.tanh())
    return 0.5 * x * (1 + (x * math.sqrt(0.5)).erf())
