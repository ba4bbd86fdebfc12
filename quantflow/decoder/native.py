"""The decoder in plain torch: one layer at a time, in steps that the sweep can stop between.

It is the reference that calibration, quantisation and evaluation share; parity with transformers is
tested for every architecture. Shapes: `B` windows, `L` tokens, `H` hidden, `D` head_dim, `T = B *
L`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from quantflow_kernels import cpu_kernels, cpu_library
from torch import Tensor

from quantflow.decoder.attention import causal_attention
from quantflow.decoder.block import ObserveKV, Reading, Streams, Tap
from quantflow.decoder.passage import NativePassage
from quantflow.decoder.rope import rotary_table, rotate
from quantflow.models.architecture import Architecture
from quantflow.models.config import DecoderConfig
from quantflow.models.segments import Role, segments
from quantflow.quant.product import linear


@dataclass(frozen=True)
class Sequences:
    """What all layers share for windows of one length: cos and sin `[L, D]` (None without rotary
    embedding). local: those of layers whose rotary embedding is the config's `local_rope`."""

    length: int
    cos: Tensor | None
    sin: Tensor | None
    local: tuple[Tensor, Tensor] | None = None


def sequences(config: DecoderConfig, length: int, device: torch.device | str = "cpu") -> Sequences:
    if config.family == "opt":
        return Sequences(length, None, None)
    cos, sin = rotary_table(config, length, device)
    local = rotary_table(config, length, device, kind=1) if config.local_rope else None
    return Sequences(length, cos, sin, local)


def activate(name: str, x: Tensor) -> Tensor:
    if name == "silu":
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


# elements that are normalised together: their float32 copies stay in the cache
NORM_ELEMENTS = 2**20


def normalize(
    config: DecoderConfig, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """RMSNorm or LayerNorm over the last dimension, in at least float32, in the dtype of `x`."""
    k = x.shape[-1]
    trained = _trained(x) or _trained(weight)
    if not trained and _compiled(x) and config.family != "opt":
        return cpu_kernels.rms_norm(x.reshape(-1, k), weight.float(), config.norm_eps).view(x.shape)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, shift = weight.to(wide), None if bias is None else bias.to(wide)
    if config.family == "opt":
        return F.layer_norm(x.to(wide), (k,), scale, shift, config.norm_eps).to(x.dtype)
    if trained:
        return F.rms_norm(x.to(wide), (k,), scale, config.norm_eps).to(x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = max(1, NORM_ELEMENTS // k) if x.device.type == "cpu" else x.numel()
    for source, target in zip(
        x.reshape(-1, k).split(rows), out.view(-1, k).split(rows), strict=True
    ):
        part = source.to(wide)
        # On a CPU the mean of squares from `vector_norm` takes a twelfth of the time of
        # `rms_norm`'s.
        power = torch.linalg.vector_norm(part, dim=-1, keepdim=True).square_().div_(k)
        target.copy_((part * power.add_(config.norm_eps).rsqrt_()).mul_(scale))
    return out


def norm_scale(config: DecoderConfig, weight: Tensor) -> Tensor:
    """What a norm with that weight multiplies by."""
    return weight.double() + config.norm_offset if config.norm_offset else weight


def _trained(x: Tensor) -> bool:
    """Whether a gradient goes through it: by torch's own operations alone, none in place."""
    return torch.is_grad_enabled() and x.requires_grad


def computed_by(device: str) -> str:
    """By what calibration and quantisation go on a device: their results' last bits depend on it. A
    compiler that is there is taken to work, since to plan must not compile."""
    return "compiled" if device == "cpu" and cpu_library.compiler_command() else "torch"


def _compiled(x: Tensor) -> bool:
    """Whether compiled kernels take it: in bfloat16 on a CPU, where torch's operations would take
    most of calibration's time."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return on_cpu and not _trained(x) and cpu_kernels.supports(x.dtype)


class NativeBlock:
    """Decoder layer `index` as its family's table has it; see `block.Block`."""

    def __init__(
        self,
        architecture: Architecture,
        config: DecoderConfig,
        index: int,
        tensors: Mapping[str, Tensor],
        seq: Sequences,
        dtype: torch.dtype,
        tap: Tap | None = None,
    ) -> None:
        self.names, self.config, self.index, self.seq, self.dtype, self.tap = (
            architecture.layer,
            config,
            index,
            seq,
            dtype,
            tap,
        )
        self.segments, self.everywhere = segments(architecture, config, index), False
        self.tensors = {
            n: t.to(dtype) if not n.endswith("norm.weight") and not n.endswith("norm.bias") else t
            for n, t in tensors.items()
        }

    @property
    def moe(self) -> bool:
        return self.config.is_moe(self.index)

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))
        if self.tap:
            self.tap(name, x, y)
        return y

    def norm(self, name: str, x: Tensor) -> Tensor:
        scale = norm_scale(self.config, self.tensors[f"{name}.weight"])
        return normalize(self.config, x, scale, self.tensors.get(f"{name}.bias"))

    def attention_input(self, x: Tensor) -> Tensor:
        return self.norm(self.names.attention_norm, x) if self.names.attention_norm else x

    def mlp_input(self, x: Tensor) -> Tensor:
        return self.norm(self.names.mlp_norm, x) if self.names.mlp_norm else x

    def _projected(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v `[B, L, heads * D]`."""
        config, names = self.config, self.names
        if names.qkv:
            kv = config.kv_heads * config.head_dim
            q, k, v = self.linear(names.qkv, h).split([config.heads * config.head_dim, kv, kv], -1)
        else:
            q, k, v = (self.linear(n, h) for n in (names.q, names.k, names.v))
        if config.qk_norm_whole:
            q, k = self.norm(names.q_norm, q), self.norm(names.k_norm, k)
        return q, k, v

    def context(self, h: Tensor, observe: ObserveKV | None = None) -> Tensor:
        """`o`'s input `[B, L, heads * D]`, from the normalised hidden states `h` `[B, L, H]`."""
        config, names, (b, length, _) = self.config, self.names, h.shape
        q, k, v = (
            part.view(b, length, -1, config.head_dim).transpose(1, 2) for part in self._projected(h)
        )
        if config.qk_norm and not config.qk_norm_whole:
            q, k = self.norm(names.q_norm, q), self.norm(names.k_norm, k)
        kind = config.rope_kind(self.index)
        cos, sin = (self.seq.cos, self.seq.sin) if not kind else (self.seq.local or (None, None))
        if cos is not None and sin is not None:
            cos, sin = cos[:length], sin[:length]
            order = config.ropes[kind].order(config.head_dim)
            q, k = rotate(q, cos, sin, order), rotate(k, cos, sin, order)
        if config.logn_length and length > config.logn_length:
            positions = torch.arange(1, length + 1, device=h.device, dtype=torch.float32)
            q = (
                q
                * (positions.log() / math.log(config.logn_length))
                .clamp(min=1.0)
                .to(q.dtype)[:, None]
            )
        if observe:
            k, v = observe(k, v)
        return (
            causal_attention(
                q,
                k,
                v,
                config.window(self.index),
                scale=config.attention_scale,
                cap=config.attention_cap,
            )
            .transpose(1, 2)
            .reshape(b, length, -1)
        )

    def attention_output(self, context: Tensor) -> Tensor:
        return self.linear(self.names.o, context)

    def inner(self, h: Tensor, expert: int | None = None) -> Tensor:
        """`down`'s input `[..., I]`, of the dense MLP or of one expert."""
        gate, up, _ = self.names.mlp(expert)
        if self.names.gate_up:
            left, right = self.linear(self.names.gate_up, h).chunk(2, dim=-1)
        elif not gate:
            return activate(self.config.activation, self.linear(up, h))
        else:
            left, right = self.linear(gate, h), self.linear(up, h)
        if self.config.activation == "silu" and _compiled(left):
            width = left.shape[-1]
            return cpu_kernels.silu_mul(left.view(-1, width), right.view(-1, width)).view(
                left.shape
            )
        activated = activate(self.config.activation, left)
        return activated * right if _trained(left) else activated.mul_(right)

    def mlp_output(self, inner: Tensor, expert: int | None = None) -> Tensor:
        return self.linear(self.names.mlp(expert)[2], inner)

    def add_attention(self, x: Tensor, context: Tensor) -> Tensor:
        """The residual stream after attention, whose `o` reads `context`."""
        return self._added(x, self.attention_output(context), self.names.attention_out_norm)

    def add_mlp(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual stream after the MLP, whose output is `y`."""
        return self._added(x, y, self.names.mlp_out_norm)

    def _added(self, x: Tensor, y: Tensor, norm: str) -> Tensor:
        if norm:
            y = self.norm(norm, y)
        if self.config.residual_scale != 1.0:
            y = y * self.config.residual_scale
        return y + x if self.tap else y.add_(x)  # a tap may have kept `y`

    def route(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Experts `[T, k]` and their weights `[T, k]` for tokens `h` `[T, H]`."""
        logits = self.linear(self.names.router, h)
        probabilities = logits.softmax(
            -1, dtype=torch.float64 if h.dtype == torch.float64 else torch.float32
        )
        weights, chosen = probabilities.topk(self.config.experts_per_token, dim=-1)
        if self.config.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights.to(h.dtype)

    def mlp(self, h: Tensor) -> Tensor:
        """The whole MLP, experts included, for `h` `[B, L, H]`."""
        if not self.moe:
            return self.mlp_output(self.inner(h))
        flat = h.reshape(-1, h.shape[-1])
        chosen, weights = self.route(flat)
        out = torch.zeros_like(flat)
        for expert in range(self.config.experts):
            tokens, slot = (chosen == expert).nonzero(as_tuple=True)
            if self.everywhere and self.tap:
                y = self.mlp_output(self.inner(flat, expert), expert)[tokens]
            elif len(tokens):
                y = self.mlp_output(self.inner(flat[tokens], expert), expert)
            if len(tokens):
                out.index_add_(0, tokens, y * weights[tokens, slot, None])
        return out.view_as(h)

    def readings(self, x: Tensor) -> Iterator[Reading]:
        """What each segment reads of hidden states `x` `[B, L, H]`, in execution order, with the
        weights as they are."""
        h = self.attention_input(x)
        attention_in, attention_out, *mlp = self.segments
        parent = lambda part: self.attention_output(self.context(part))  # noqa: E731
        yield Reading(attention_in, h, h, parent if attention_in.fold else None)
        context = self.context(h)
        yield Reading(attention_out, context, context)
        h = self.mlp_input(self.add_attention(x, context))
        flat = h.reshape(-1, h.shape[-1])
        chosen = self.route(flat)[0] if self.moe else None
        for segment in mlp:
            rows = flat if chosen is None else flat[chosen.eq(segment.expert or 0).any(-1)]
            if segment.role is Role.mlp_in:
                yield Reading(segment, rows, h, self.mlp if segment.fold else None)
            else:
                inner = self.inner(rows, segment.expert) if len(rows) else rows
                yield Reading(segment, inner, inner)

    def forward(self, x: Tensor, observe: ObserveKV | None = None) -> Tensor:
        """The residual stream `[B, L, H]` after this layer."""
        x = self.add_attention(x, self.context(self.attention_input(x), observe))
        return self.add_mlp(x, self.mlp(self.mlp_input(x)))

    def passage(self, streams: Streams, batch: int, observe: ObserveKV) -> NativePassage:
        return NativePassage(self, streams, batch, observe)


def embed(
    architecture: Architecture,
    config: DecoderConfig,
    tensors: Mapping[str, Tensor],
    tokens: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The residual stream `[B, L, H]` before the first layer, for `tokens` `[B, L]`."""
    x = F.embedding(tokens, tensors[f"{architecture.embedding}.weight"]).to(dtype)
    x = scaled_embedding(config, x)
    if architecture.positions:
        # OPT's first two rows are left over from padding.
        x = x + tensors[f"{architecture.positions}.weight"][2 : 2 + tokens.shape[1]].to(dtype)
    return x


def scaled_embedding(config: DecoderConfig, x: Tensor) -> Tensor:
    """By a factor in the dtype of `x`."""
    if config.embedding_scale == 1.0:
        return x
    return x * torch.tensor(config.embedding_scale, dtype=x.dtype, device=x.device)


def finished_logits(config: DecoderConfig, x: Tensor) -> Tensor:
    """What the model says, from what the head puts out."""
    if config.logit_divisor != 1.0:
        x = x / config.logit_divisor
    if config.logit_cap is not None:
        x = (x / config.logit_cap).tanh_() * config.logit_cap
    return x


def logits(
    architecture: Architecture, config: DecoderConfig, tensors: Mapping[str, Tensor], x: Tensor
) -> Tensor:
    """`[..., V]` from the residual stream after the last layer, in the dtype of `x`."""
    h = final_hidden(architecture, config, tensors, x)
    head = architecture.embedding if config.tied else architecture.head
    return finished_logits(config, linear(h, tensors[f"{head}.weight"].to(h.dtype)))


def final_hidden(
    architecture: Architecture, config: DecoderConfig, tensors: Mapping[str, Tensor], x: Tensor
) -> Tensor:
    """What the head reads, from the residual stream after the last layer."""
    norm = architecture.final_norm
    scale = norm_scale(config, tensors[f"{norm}.weight"])
    return normalize(config, x, scale, tensors.get(f"{norm}.bias"))


class NativeDecoder:
    """A decoder as its family's table has it, for windows of `length` tokens; see
    `block.Decoder`."""

    def __init__(
        self,
        architecture: Architecture,
        config: DecoderConfig,
        length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.architecture, self.config = architecture, config
        self.sequences = sequences(config, length, device)
        head = architecture.embedding if config.tied else architecture.head
        norm_parts = ("weight", "bias") if config.family == "opt" else ("weight",)
        self.embeds = tuple(
            f"{name}.weight" for name in (architecture.embedding, architecture.positions) if name
        )
        self.heads = (
            *(f"{architecture.final_norm}.{part}" for part in norm_parts),
            f"{head}.weight",
        )

    def embed(self, tensors: Mapping[str, Tensor], tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return embed(self.architecture, self.config, tensors, tokens, dtype)

    def logits(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return logits(self.architecture, self.config, tensors, x)

    def block(
        self, index: int, tensors: Mapping[str, Tensor], dtype: torch.dtype, tap: Tap | None = None
    ) -> NativeBlock:
        return NativeBlock(
            self.architecture, self.config, index, tensors, self.sequences, dtype, tap
        )
