"""What QuantFlow knows of a model family, as data.

*Native* names are those that transformers' own class has on disk (Llama's for InternLM, Qwen2's for
the first Qwen): artifacts are written under them. A `Source` says where in a checkpoint a native
tensor comes from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantflow.models.config import DecoderConfig

if TYPE_CHECKING:
    from torch import Tensor

    from quantflow.models.library import Library

Json = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A native tensor inside a source tensor: `source.view(view)[index]`, its leading dimensions
    flattened into one row axis.

    view: None takes the tensor as it is. vector: the result has one dimension (a bias).
    transposed: the source holds inputs before outputs.
    unit_rows: each row is divided by its length, as the family's class does wherever it uses them.
    """

    name: str
    view: tuple[int, ...] | None = None
    index: tuple[int | slice, ...] = ()
    vector: bool = False
    transposed: bool = False
    unit_rows: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the source tensor's shape is one that can be viewed so."""
        return self.view is None or math.prod(self.view) == math.prod(shape)

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The native tensor's shape, from the source tensor's; raises ValueError where the view
        does not fit."""
        if self.view is None:
            return shape
        if not self.fits(shape):
            raise ValueError(f"{list(shape)} cannot be viewed as {list(self.view)}")
        left: list[int] = []
        for axis, size in enumerate(self.view):
            pick = self.index[axis] if axis < len(self.index) else slice(None)
            if isinstance(pick, slice):
                left.append(len(range(*pick.indices(size))))
        if self.vector:
            return (math.prod(left),)
        rows = math.prod(left[:-1]), left[-1]
        return rows[::-1] if self.transposed else rows

    def taken_from(self, tensor: Tensor) -> Tensor:
        """The native tensor, of the source tensor, in whose memory it may lie."""
        if self.unit_rows:
            for rows in tensor.split(1024):
                lengths = rows.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
                rows.copy_(rows.float() / lengths)
        if self.view is None:
            return tensor
        return self.arranged(tensor.view(self.view)[self.index])

    def put_into(self, tensor: Tensor, native: Tensor) -> None:
        """Writes the native tensor into the source tensor, its `view`."""
        place = tensor[self.index]
        place.copy_((native.T if self.transposed else native).reshape(place.shape))

    def arranged(self, part: Tensor) -> Tensor:
        """The native tensor, of what `index` picks."""
        if self.vector:
            return part.reshape(-1).contiguous()
        rows = part.reshape(-1, part.shape[-1])
        return (rows.T if self.transposed else rows).contiguous()


@dataclass(frozen=True)
class Joined:
    """A tensor of a checkpoint that holds native ones for which loaders have no names of their own.
    parts: their places in it. named_in: formats of which loaders do have such names, and know this
    tensor no more."""

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, Source]
    named_in: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Layer:
    """The names of a decoder layer's parts, relative to the layer.

    Empty strings mark what a family lacks: `gate` in a plain MLP, `router` in a dense model, a
    norm. `qkv`, `gate_up`: one linear in place of three, or of two. `expert` holds `{e}`. The out
    norms are those of what attention and MLP add to the residual stream.
    """

    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = ""
    o: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str = ""
    down: str = "mlp.down_proj"
    router: str = ""
    expert: str = ""
    expert_gate: str = "gate_proj"
    expert_up: str = "up_proj"
    expert_down: str = "down_proj"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention_out_norm: str = ""
    mlp_out_norm: str = ""
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"

    @property
    def norms(self) -> tuple[str, ...]:
        """Those of the hidden states."""
        names = (self.attention_norm, self.attention_out_norm, self.mlp_norm, self.mlp_out_norm)
        return tuple(name for name in names if name)

    def mlp(self, expert: int | None = None) -> tuple[str, str, str]:
        """gate (or ""), up and down of the dense MLP or of one expert."""
        if expert is None:
            return self.gate, self.up, self.down
        prefix = self.expert.format(e=expert)
        return (
            f"{prefix}.{self.expert_gate}",
            f"{prefix}.{self.expert_up}",
            f"{prefix}.{self.expert_down}",
        )


@dataclass(frozen=True)
class Architecture:
    """A model family.

    read_config: config.json -> DecoderConfig; raises ConfigProblem. native_config: config.json ->
    the config of the artifact, which transformers loads without remote code. sources: (source
    tensor name, its shape, config) -> the native tensors inside it, None for one that the family
    does not know. base, base_parts: in source names, what holds the base model within the class
    with a head, and what lies in it. notes: what a user should know, for the report. library: of a
    family without a table, the class of transformers that computes it. hosted_else: a config that
    the table does not follow is left to transformers' class. layered_rope: config.json has one
    rotary embedding for each kind of layer.
    """

    name: str
    model_types: tuple[str, ...]
    read_config: Callable[[Json], DecoderConfig]
    native_config: Callable[[Json], Json] = dict
    sources: Callable[[str, tuple[int, ...], DecoderConfig], dict[str, Source] | None] = field(
        default=lambda name, shape, config: {name: Source(name)}
    )
    layer: Layer = Layer()
    prefix: str = "model.layers.{i}"
    embedding: str = "model.embed_tokens"
    positions: str = ""
    final_norm: str = "model.norm"
    head: str = "lm_head"
    base: str = "model"
    base_parts: tuple[str, ...] = ("embed_tokens", "layers", "norm")
    notes: tuple[str, ...] = ()
    library: Library | None = None
    hosted_else: bool = False
    layered_rope: bool = False

    def layer_prefix(self, i: int) -> str:
        return self.prefix.format(i=i)

    def layer_of(self, native: str) -> int | None:
        """The decoder layer that a native tensor, or a part of one, belongs to; None outside the
        layers."""
        match = re.match(re.escape(self.prefix).replace(r"\{i\}", r"(\d+)") + r"\.", native)
        return int(match[1]) if match else None


# Buffers that old files hold. Whole names: Qwen's attn.c_attn.bias is a weight.
COMPUTED_TENSORS = re.compile(
    r"(^|\.)(rotary(_pos)?_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|attn\.masked_bias|attn\.bias)$"
)


def renamed(rules: Mapping[str, str]) -> Callable[[str], str]:
    """A function that applies the first regular expression of `rules` that matches the whole
    name."""
    compiled = [(re.compile(pattern), target) for pattern, target in rules.items()]

    def apply(name: str) -> str:
        for pattern, target in compiled:
            if match := pattern.fullmatch(name):
                return match.expand(target)
        return name

    return apply


def split_rows(
    name: str,
    shape: tuple[int, ...],
    view: tuple[int, ...],
    parts: Mapping[str, tuple[int | slice, ...]],
) -> dict[str, Source]:
    """Native tensors cut out of one fused source tensor; `view` is that of its rows, the input axis
    (if any) is appended."""
    vector = len(shape) == 1
    full = view if vector else (*view, shape[-1])
    return {native: Source(name, full, index, vector) for native, index in parts.items()}
