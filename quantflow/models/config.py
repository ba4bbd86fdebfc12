"""What a decoder computes, independent of how its checkpoint spells it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. kind: default, linear, dynamic, llama3, yarn or qwen (the first
    Qwen's stepwise dynamic one, which no `rope_scaling` names); parameters: the numbers of that
    kind."""

    theta: float = 10000.0
    kind: str = "default"
    parameters: Mapping[str, float] = field(default_factory=dict)
    share: float = 1.0  # of a head's channels that turn, its first ones
    interleaved: bool = False  # neighbours turn into each other, not the halves' (GLM-4)

    def turning(self, head_dim: int) -> int:
        """How many channels of a head turn."""
        return int(head_dim * self.share)

    def order(self, head_dim: int) -> tuple[int, ...] | None:
        """A head's channels, put so that `[i]` turns into `[i + D/2]`, those that do not turn
        paired among themselves; None where they stand so already. Permuting q's and k's channels
        alike changes no score."""
        turning = self.turning(head_dim)
        if turning == head_dim and not self.interleaved:
            return None
        step, first = (2, 1) if self.interleaved else (1, turning // 2)
        still = range(turning, head_dim)
        half = len(still) // 2
        pairs = [(i * step, i * step + first) for i in range(turning // 2)]
        pairs += zip(still[:half], still[half:], strict=True)
        return tuple(a for a, _ in pairs) + tuple(b for _, b in pairs)


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers of a decoder-only transformer.

    Letters used in shapes: `H` hidden, `I` intermediate, `D` head_dim, `V` vocabulary.
    """

    # "llama" (RMSNorm, rotary, gated MLP), "opt" (LayerNorm, learned positions, plain MLP), or what
    # does more than Llama: "olmo2", "granite", "phi3", "glm", "gemma2", "gemma3"
    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    norm_eps: float
    activation: str  # silu, gelu, gelu_tanh, relu
    dtype: str  # of the checkpoint: float32, float16, bfloat16
    rope: Rope = Rope()
    attention_bias: bool = False  # on q, k and v
    output_bias: bool = False  # on o
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k (Qwen3)
    qk_norm_whole: bool = False  # over all heads of q, or of k, together (OLMo 2)
    norm_offset: float = 0.0  # what norms add to their weight before they multiply (1 in Gemma)
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    logit_divisor: float = 1.0
    attention_scale: float | None = None  # of scores; None: 1 / √D
    attention_cap: float | None = None  # scores become cap · tanh(score / cap)
    logit_cap: float | None = None  # logits, the same
    local_rope: Rope | None = None  # of layers with a sliding window, where that is another
    uncut: str = ""  # why tensor parallelism has no parts of its linears
    tied: bool = False  # the head is the embedding
    sliding_windows: tuple[int | None, ...] = ()  # one a layer
    # queries beyond this position are scaled by log_length(position) (Qwen 1)
    logn_length: int | None = None
    experts: int = 0
    experts_per_token: int = 0
    renormalize: bool = True  # expert weights sum to one after the top-k
    dense_layers: frozenset[int] = frozenset()  # layers of a mixture model that have one plain MLP
    dense_intermediate: int = 0  # their width

    @property
    def context(self) -> int:
        """Tokens of the longest text: the trained length times the factor that a linear or yarn
        embedding stretches it by, unless max_position_embeddings is longer and so the stretched
        length itself. For llama3, whose factor is no ratio of lengths, it always is; dynamic
        changes nothing up to it, and `stretches` beyond; without scaling,
        original_max_position_embeddings says nothing."""
        if self.rope.kind not in ("linear", "yarn"):
            return self.max_positions
        factor = self.rope.parameters["factor"]
        trained = self.rope.parameters.get(
            "original_max_position_embeddings", float(self.max_positions)
        )
        return max(self.max_positions, int(trained * factor))

    @property
    def stretches(self) -> bool:
        """Whether longer texts than `context` are served, too: the rotary embedding grows with
        them."""
        return self.rope.kind in ("dynamic", "qwen")

    def is_moe(self, layer: int) -> bool:
        return self.experts > 0 and layer not in self.dense_layers

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer: a query sees that many keys, itself included. None: all of
        them."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    @property
    def score_scale(self) -> float:
        """What q · k is multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The kinds of rotary embedding of the layers."""
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)

    def rope_kind(self, layer: int) -> int:
        """Which of `ropes` a layer has."""
        return int(self.local_rope is not None and self.window(layer) is not None)

    def width(self, layer: int) -> int:
        """The MLP's inner width in a layer (of one expert, in a mixture layer)."""
        return (
            self.dense_intermediate
            if self.experts and not self.is_moe(layer)
            else self.intermediate
        )


def stretched(config: DecoderConfig) -> Iterator[str]:
    """What a user should know of a context that is longer than config.json's number."""
    if config.context > config.max_positions:
        how = (
            f"max_position_embeddings is {config.max_positions}, and {config.rope.kind} rope"
            " scaling stretches what was trained"
        )
        yield (
            f"texts may have {config.context} tokens: {how} {config.rope.parameters['factor']:g}"
            " times"
        )


class ConfigProblem(ValueError):
    """A config.json that QuantFlow cannot follow: the message says which key."""


def number(config: Mapping[str, Any], key: str, kind: type = int, default: Any = None) -> Any:
    """`config[key]` as a positive, finite number of `kind`; raises ConfigProblem where it is
    missing or something else."""
    value = config.get(key)
    value = default if value is None else value
    # JSON as Python reads it has NaN and Infinity, and integers of any length.
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**63
    if not fits or (kind is int and value != int(value)):
        raise ConfigProblem(
            f"{key} is {value!r}, expected a positive {'integer' if kind is int else 'number'}"
        )
    return kind(value)


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """`config[key]` as true or false; raises ConfigProblem for something else (a string "false"
    would count as true)."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ConfigProblem(f"{key} is {value!r}, expected true or false")
    return value


MOST_LAYERS, MOST_EXPERTS = 10_000, 100_000  # experts of all layers together


def layer_count(config: Mapping[str, Any]) -> int:
    """`num_hidden_layers`; raises ConfigProblem for a number that no model has, which would take
    for ever to plan."""
    layers: int = number(config, "num_hidden_layers")
    if layers > MOST_LAYERS:
        raise ConfigProblem(f"num_hidden_layers is {layers}, expected at most {MOST_LAYERS}")
    return layers


def default_theta(config: Mapping[str, Any]) -> float:
    """rope_theta where config.json says nothing, as transformers has it for the family."""
    return 1e6 if config.get("model_type") == "mixtral" else 10000.0


_ROPE_NUMBERS = (
    "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip


def read_rope(config: Mapping[str, Any]) -> Rope:
    """The rotary embedding of a Hugging Face config: `rope_scaling` beside `rope_theta` or else,
    whole, `rope_parameters` (transformers 5), whose own rope_theta goes before that beside it."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise ConfigProblem(f"{key} is {config[key]!r}, expected an object")
    scaling: dict[str, Any] = dict(
        config.get("rope_scaling") or config.get("rope_parameters") or {}
    )
    stated = scaling.pop("rope_theta", None) or config.get("rope_theta")
    theta = number({"rope_theta": stated}, "rope_theta", float, default_theta(config))
    if theta < 1:
        raise ConfigProblem(f"rope_theta is {theta}, expected at least 1")
    kind = str(scaling.pop("rope_type", None) or scaling.pop("type", None) or "default")
    scaling.pop("type", None)
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise ConfigProblem(
            f"rope scaling of type {kind!r}; QuantFlow knows default, linear, dynamic, llama3 and"
            " yarn"
        )
    partial = scaling.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor")
    if number({"partial_rotary_factor": partial}, "partial_rotary_factor", float, 1.0) != 1.0:
        raise ConfigProblem("partial_rotary_factor is not 1; QuantFlow rotates whole heads only")
    if wrong := [k for k in _ROPE_NUMBERS if not isinstance(scaling.get(k), int | float | None)]:
        raise ConfigProblem(f"rope scaling has {wrong[0]} {scaling[wrong[0]]!r}, expected a number")
    if wrong := [
        k for k, v in scaling.items() if isinstance(v, (int, float)) and not 0 <= v < 2**63
    ]:
        raise ConfigProblem(
            f"rope scaling has {wrong[0]} {scaling[wrong[0]]!r}, expected a number of at least 0"
        )
    parameters = {k: float(v) for k, v in scaling.items() if isinstance(v, (int, float))}
    # transformers prefers it to the nested one
    if isinstance(trained := config.get("original_max_position_embeddings"), int):
        parameters["original_max_position_embeddings"] = float(trained)
    trained = parameters.get("original_max_position_embeddings")
    if kind == "yarn" and "factor" not in parameters and trained:
        parameters["factor"] = number(config, "max_position_embeddings") / trained
    scaled = [
        name
        for name in ("beta_fast", "beta_slow", "original_max_position_embeddings")
        if name in parameters
    ]
    needed = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(
        kind, ("factor",)
    )
    if missing := [name for name in (*needed, *scaled) if parameters.get(name, 0.0) <= 0]:
        raise ConfigProblem(f"rope scaling of type {kind} has no positive {' and '.join(missing)}")
    if kind != "default" and (factor := parameters.get("factor", 1.0)) < 1:
        raise ConfigProblem(f"rope scaling of type {kind} has factor {factor}, expected at least 1")
    if kind == "llama3" and parameters["high_freq_factor"] <= parameters["low_freq_factor"]:
        raise ConfigProblem(
            "rope scaling of type llama3 has a high_freq_factor that is not above its"
            " low_freq_factor"
        )
    if kind == "yarn" and theta <= 1:
        raise ConfigProblem(f"rope_theta is {theta}, expected more than 1")
    return Rope(theta, kind, parameters)


def read_partial_rope(
    config: Mapping[str, Any], share: float, *, interleaved: bool = False
) -> Rope:
    """`read_rope` of a family whose heads turn in part. share: of their channels, where config.json
    does not say."""
    key, plain = "partial_rotary_factor", dict(config)
    stated = [plain.pop(key, None)]
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(plain.get(name), Mapping):
            plain[name] = dict(plain[name])
            stated.insert(0, plain[name].pop(key, None))
    given = next((value for value in stated if value is not None), None)
    share = number({key: given}, key, float, share)
    rope = read_rope(plain)
    if share > 1 or (share < 1 and rope.kind != "default"):
        raise ConfigProblem(f"{key} is {share} with rope scaling of type {rope.kind}")
    return replace(rope, share=share, interleaved=interleaved)


def check_head(head_dim: int, rope: Rope) -> None:
    """Raises ConfigProblem for a head whose channels do not turn in pairs, or that is too small for
    the kind of rotary embedding."""
    if head_dim % 2:
        raise ConfigProblem(
            f"head_dim is {head_dim}, expected an even number: channels are rotated in pairs"
        )
    if rope.turning(head_dim) % 2 or not rope.turning(head_dim):
        raise ConfigProblem(
            f"partial_rotary_factor {rope.share} turns {rope.turning(head_dim)} channels of"
            f" {head_dim}, expected an even number"
        )
    if rope.kind in ("dynamic", "qwen") and head_dim == 2:
        raise ConfigProblem(f"head_dim is 2, expected more with rope scaling of type {rope.kind}")


def read_dtype(config: Mapping[str, Any]) -> str:
    """float32 (where config.json says nothing), float16 or bfloat16; raises ConfigProblem for
    another."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise ConfigProblem(f"dtype is {name!r}; QuantFlow knows float32, float16 and bfloat16")
    return name
