"""What every checkpoint format offers, and what their implementations share. Nothing here imports
torch: recipe planning reads it.

A format translates one quantised weight to the tensors that other software reads, exactly or not at
all. Shapes: `N` output channels, `K` input channels, `G` groups a row. A module is named as in the
checkpoint, `model.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from quantflow.errors import FormatError, Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantflow.quant.numbers import QuantizedTensor
    from quantflow.quant.numbers.integer import IntegerTensor
    from quantflow.quant.scheme import Scheme

Spec = tuple[str, tuple[int, ...]]  # a tensor's dtype as safetensors spells it, and its shape

SAFETENSORS_DTYPE = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}

LEAST_GROUP = 16  # in smaller groups the scales take as much as the bits save
_LONGEST_PATTERN, _MOST_REPEATS = 100_000, 4
# Modules that inference engines fuse, and under whose name they then look for per-module settings.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class ConfigRequest:
    """What a checkpoint's configuration is to say.

    modules: the scheme of every quantised module. ignored: the linears that are not. default: the
    scheme that needs no naming. kv_scales: the kind of KV scales that are written too, one of the
    format's own `kv_scales`. act_order: some tensor has a group index. model_dtype: as torch names
    it.
    """

    modules: Mapping[str, Scheme]
    ignored: list[str]
    default: Scheme
    kv_scales: str | None = None
    act_order: bool = False
    model_dtype: str = "bfloat16"


class Format(Protocol):
    """A checkpoint format."""

    @property
    def name(self) -> str:
        """The name in a recipe."""

    @property
    def container(self) -> str:
        """What the tensors are written into: `directory` (safetensors and config.json), `gguf` or
        `workspace`."""

    @property
    def dtype(self) -> str | None:
        """What weights are dequantised into, as torch names it; None where codes are kept."""

    @property
    def holds_index(self) -> bool:
        """Whether it has a place for a group index."""

    @property
    def kv_scales(self) -> tuple[str, ...]:
        """The kinds of KV-cache scales that it has names for among the weights, as `kv_scales` of
        `pack` calls them."""

    @property
    def parallel(self) -> bool:
        """Whether it can be cut into tensor-parallel ranks."""

    @property
    def min_zero(self) -> int:
        """The least zero point that is held."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What follows the module in the names of its tensors."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Those suffixes of which every quantised module has one, and no other module any."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of numbers that it holds, by their names in `NUMBERS`."""

    def scale_dtype(self, model_dtype: str) -> str:
        """The dtype, as torch names it, in which the scales of a model in `model_dtype` are stored;
        of the weights themselves where they are dequantised."""

    def check(
        self,
        module: str,
        shape: tuple[int, int],
        scheme: Scheme,
        *,
        act_order_index: bool,
        tp: int = 1,
        tp_dim: int | None = None,
    ) -> list[Problem]:
        """Everything that keeps a weight of `shape` `(N, K)` from being written, known without
        reading it.

        act_order_index: the tensor has a group index. tp, tp_dim: the weight is cut into `tp` ranks
        along its outputs (0) or its inputs (1), and each rank must be writable; None where every
        rank holds all of it.
        """

    def nearest(self, module: str, scheme: Scheme, shape: tuple[int, int]) -> Scheme:
        """The scheme to quantise a weight with again that `check` refuses in `scheme`, which is
        `scheme` itself where it does not.
        shape: of what a rank holds. Where it is refused too, nothing helps."""

    def prefers_symmetric(self, *, experts: bool) -> bool:
        """Whether weights are symmetric where a recipe leaves it open: what every reader of the
        format loads. experts: of a mixture."""

    def shares_scheme(self, module: str) -> bool:
        """Whether a module's width and groups must be those of all others for which this is so."""

    def specs(
        self, module: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: str, has_index: bool
    ) -> dict[str, Spec]:
        """The tensors that `encode` writes, in its order. scale_dtype: as `scale_dtype` says."""

    def encode(
        self, module: str, tensor: QuantizedTensor, model_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The tensors of one weight, which may share memory with `tensor`. Raises FormatError for
        what cannot be held exactly."""

    def scheme_of(self, module: str, config: Mapping[str, Any]) -> Scheme | None:
        """The scheme that a `quantization_config` gives a module, or None if it leaves it alone.
        Raises FormatError for what QuantFlow cannot read."""

    def decode(
        self, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedTensor:
        """The weight of a module, from (at least) its tensors and the `quantization_config`. Raises
        FormatError if they do not fit."""

    def quantization_config(self, request: ConfigRequest) -> dict[str, Any]:
        """The `quantization_config` of config.json. Raises FormatError for what the format cannot
        say."""

    def doubts(self, request: ConfigRequest) -> list[Problem]:
        """What engines are known not to load, or to misread, of a checkpoint that is right: `where`
        is the engine, with its version. It keeps nothing from being written."""

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Further JSON files that readers of the format expect, by name, from its
        `quantization_config`."""


def grid_problems(
    module: str,
    shape: tuple[int, int],
    scheme: Scheme,
    tp: int,
    tp_dim: int | None,
    index: bool,
    *,
    kinds: tuple[str, ...],
) -> list[Problem]:
    """What is wrong with `scheme` on a weight of `shape` whatever the format: bits, group size,
    ranks. kinds: of numbers that it holds."""
    from quantflow.quant.numbers import NUMBERS

    problems = []
    if scheme.kind not in kinds:
        expected, stage = (
            " or ".join(f"a grid {NUMBERS[kind].grid}" for kind in kinds),
            NUMBERS[kinds[0]].stages,
        )
        hint = (
            f"A recipe's stage {stage} makes one; requantize: true in pack, or export --requantize,"
            " goes from one to the other"
        )
        problems.append(Problem(module, f"{scheme}, a grid {scheme.numbers.grid}", expected, hint))
    if not 2 <= scheme.bits <= 8:
        problems.append(Problem(module, f"{scheme.bits} bits", "2 to 8"))
    if tp > 1 and tp_dim is not None and shape[tp_dim] % tp:
        kind = ("output", "input")[tp_dim]
        problems.append(
            Problem(module, f"{shape[tp_dim]} {kind} channels", f"a multiple of tp = {tp}")
        )
        return problems
    if tp > 1 and tp_dim == 1 and index:
        problems.append(
            Problem(
                module,
                "a group index on a weight that is split along its inputs",
                "groups that do not cross ranks",
                "Use act_order: static",
            )
        )
    k = rank_shape(shape, tp, tp_dim)[1]
    group = scheme.group_of(k)
    if group < 1:
        problems.append(
            Problem(module, f"group_size {group}", "a positive number, or -1 for per channel")
        )
    elif k % group and scheme.numbers.fixed_groups:
        expected = f"a multiple of the blocks of {group}"
        problems.append(
            Problem(
                module, f"{k} input channels", expected, "Ignore this module: it stays in 16 bits"
            )
        )
    elif k % group:
        ranks = tp if tp_dim == 1 else 1
        each = f" on each of {ranks} ranks" if ranks > 1 else ""
        straddling = (
            ", so that a group straddles two of them" if ranks > 1 and shape[1] % group == 0 else ""
        )
        fitting = usual_group(k, group)
        # what kernels like, behind the largest
        sizes = [fitting, *(size for size in (64, 32, 16) if size < fitting and k % size == 0)]
        offered = f"{', '.join(str(size) for size in sizes if size > 0)} or -1".removeprefix(" or ")
        padded = -(-shape[1] // (group * ranks)) * group * ranks
        hint = f"Use group_size {offered} (per channel) for this module, or ignore it"
        hint += f"; {group} fits if the {shape[1]} inputs are padded with zeros to {padded}"
        problems.append(
            Problem(
                module,
                f"{k} input channels{each}{straddling}",
                f"a multiple of group_size {group}",
                hint,
            )
        )
    return problems


def rank_shape(shape: tuple[int, int], tp: int, tp_dim: int | None) -> tuple[int, int]:
    """`(N, K)` of what one rank holds."""
    if tp == 1 or tp_dim is None:
        return shape
    return (shape[0] // tp, shape[1]) if tp_dim == 0 else (shape[0], shape[1] // tp)


def check_tensor(module: str, tensor: QuantizedTensor) -> None:
    """Raises FormatError unless the tensor is what its scheme says: shapes, ranges of codes and
    zeros, finite scales, full groups."""
    scheme = tensor.scheme
    problems = grid_problems(
        module, tensor.shape, scheme, 1, None, False, kinds=(scheme.kind,)
    ) or tensor.problems(module)
    if problems:
        raise FormatError(problems)


def integer_scheme(scheme: Scheme, shape: tuple[int, int]) -> Scheme:
    """The scheme with integer zero points that is nearest to one of any kind, its groups no larger
    than they were."""
    group = scheme.group_of(shape[1])
    size = scheme.group_size if shape[1] % group == 0 else fitting_group(shape[1], group)
    return replace(scheme, group_size=size, kind="integer", double=False)


def fitting_group(k: int, most: int) -> int:
    """The largest group size up to `most` that divides `k` input channels."""
    return max(d for d in range(1, min(most, k) + 1) if k % d == 0)


def usual_group(k: int, most: int) -> int:
    """The largest group size up to `most` that divides `k` input channels and is worth its scales;
    -1, the whole row, for none."""
    size = fitting_group(k, most)
    return size if size >= min(LEAST_GROUP, most) else -1


def integer_grid(module: str, tensor: QuantizedTensor) -> IntegerTensor:
    """The tensor itself. Raises FormatError where its numbers are of another kind."""
    from quantflow.quant.numbers.integer import IntegerTensor

    if not isinstance(tensor, IntegerTensor):
        raise FormatError(Problem(module, f"{tensor.scheme}", f"a grid {IntegerTensor.grid}"))
    return tensor


def group_index(name: str, index: Tensor, groups: int) -> Tensor | None:
    """A stored group index, None where it says nothing. Raises FormatError for groups that are not
    full."""
    import torch

    from quantflow.quant.numbers.integer import groups_are_full

    k = index.numel()
    if torch.equal(index, plain_index(k, k // groups).to(index.device)):
        return None
    if not groups_are_full(index, groups):
        raise FormatError(
            Problem(name, "groups of unequal size", f"{groups} groups of {k // groups} channels")
        )
    return index


def plain_index(k: int, group: int) -> Tensor:
    """int32 `[K]`: the group of each channel where nothing was reordered."""
    import torch

    return torch.arange(k, dtype=torch.int32) // group


def exact_scales(name: str, scales: Tensor, dtype: torch.dtype, what: str = "scales") -> Tensor:
    """`scales` in `dtype`. Raises FormatError, with an example, if any value changes."""
    import torch

    stored = scales.to(dtype)
    # float64 holds all of these dtypes; a value that overflowed has become infinite and so differs.
    if stored.dtype != scales.dtype and not torch.equal(stored.double(), scales.double()):
        changed = stored.double() != scales.double()
        example = float(scales[changed][0])
        raise FormatError(
            Problem(
                name,
                f"{int(changed.sum())} of {scales.numel()} {what} are no exact"
                f" {str(dtype).removeprefix('torch.')} (one is {example:.9g})",
                f"{what} rounded to {str(dtype).removeprefix('torch.')} before the weights are"
                " quantised",
                "A weight is not quantised again unless asked for: export --requantize, or"
                " requantize: true in pack",
            )
        )
    return stored


def take(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | None = None, dims: int = 2
) -> Tensor:
    """The tensor called `name`. Raises FormatError if it is absent, or has another dtype (None: any
    floating one) or rank."""
    if name not in tensors:
        raise FormatError(Problem(name, "missing from the checkpoint"))
    tensor = tensors[name]
    if tensor.dim() != dims or (
        tensor.dtype != dtype if dtype is not None else not tensor.is_floating_point()
    ):
        expected = f"{dims} dimensions of {dtype or 'a floating dtype'}"
        raise FormatError(Problem(name, f"{tensor.dtype} {list(tensor.shape)}", expected))
    return tensor


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises FormatError unless `tensor` has `shape`."""
    if tuple(tensor.shape) != shape:
        raise FormatError(Problem(name, f"shape {list(tensor.shape)}", f"{list(shape)}"))


def setting(
    config: Mapping[str, Any],
    key: str,
    kind: type,
    where: str = "quantization_config",
    default: Any = None,
) -> Any:
    """`config[key]`, or `default` if it is absent or null. Raises FormatError if it is not of
    `kind` (a bool is no int)."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(
            Problem(
                f"{where}.{key}",
                "missing" if value is None else f"{value!r}",
                f"a value of type {kind.__name__}",
            )
        )
    return value


def texts(config: Mapping[str, Any], key: str, where: str = "quantization_config") -> list[str]:
    """The list of texts `config[key]`, [] if it is absent or null. Raises FormatError for anything
    else."""
    found = setting(config, key, list, where, default=[])
    if strange := [item for item in found if not isinstance(item, str)]:
        raise FormatError(Problem(f"{where}.{key}", f"{strange[0]!r}"[:80], "names"))
    return list(found)


def own_settings(config: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """What a `quantization_config` says of one module alone, over what it says of all: in
    GPTQModel's `dynamic`, where the first pattern counts, or in AutoRound's `extra_config`, by its
    name or the first expression found in it. None where it is left alone. Raises FormatError."""
    dynamic = setting(config, "dynamic", dict, default={})
    for pattern in dynamic:
        if matches(re.sub(r"^[+-]:", "", pattern), module):
            return (
                None
                if pattern.startswith("-:")
                else setting(dynamic, pattern, dict, "quantization_config.dynamic")
            )
    extra = setting(config, "extra_config", dict, default={})
    expressions = (key for key in extra if extra[key] and re.search(r"[^\w.-]", key))
    found = (
        module
        if module in extra
        else next((key for key in expressions if matches(_anywhere(key), module)), None)
    )
    if found is None:
        return {}
    own: Mapping[str, Any] = setting(extra, found, dict, "quantization_config.extra_config")
    if (
        own.get("bits") is not None
        and setting(own, "bits", int, f"quantization_config.extra_config.{found}") > 8
    ):
        return None
    return {key: value for key, value in own.items() if value is not None}


def _anywhere(pattern: str) -> str:
    """An expression that matches from the start what `pattern` finds anywhere."""
    return pattern if pattern.startswith((".*", "^")) and "|" not in pattern else f".*(?:{pattern})"


def matches(pattern: str, module: str) -> bool:
    """Whether a regular expression from a config matches the start of a module's name. Raises
    FormatError if it is none, or one that may take for ever."""
    return _compiled(pattern).match(module) is not None


@lru_cache(1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        if len(pattern) > _LONGEST_PATTERN or _backtracks(pattern):
            found = f"{pattern[:80]!r}, an expression that could take for ever"
            raise FormatError(
                Problem(
                    "quantization_config",
                    found,
                    "one without repeats of repeats, and with few of `.*`",
                )
            )
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(
            Problem("quantization_config", f"{pattern!r} is no regular expression: {error}")
        ) from error


def _backtracks(pattern: str) -> bool:
    """Whether an expression has an unbounded repeat within another, or so many that the ways to
    match a name are millions. A cheap guard: Python's engine has no limit of time."""
    text = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)  # escapes and sets are letters here
    repeat = re.compile(r"[*+]|\{\d*,\d*\}")
    depth: list[bool] = [False]  # whether each open group holds a repeat
    count = 0
    for at, letter in enumerate(text):
        if letter == "(":
            depth.append(False)
        elif letter == ")" and len(depth) > 1:
            inner = depth.pop()
            if inner and repeat.match(text, at + 1):
                return True
            depth[-1] = depth[-1] or inner
        elif repeat.match(text, at) and text[at - 1 : at] not in ("", "("):
            depth[-1] = True
            count += 1
    return count > _MOST_REPEATS


def read_scheme(bits: int, group_size: int, symmetric: bool, where: str) -> Scheme:
    """The scheme. Raises FormatError if its numbers are none that QuantFlow knows."""
    from quantflow.quant.scheme import BITS, PER_CHANNEL, Scheme

    if bits not in BITS:
        raise FormatError(Problem(where, f"{bits} bits", "2 to 8"))
    if group_size < 1 and group_size != PER_CHANNEL:
        raise FormatError(
            Problem(where, f"group_size {group_size}", "a positive number, or -1 for per channel")
        )
    return Scheme(bits, group_size, symmetric)


def main_scheme(modules: Mapping[str, Scheme], default: Scheme) -> Scheme:
    """The scheme that needs no naming of modules: `default` if any module has it, else the
    commonest (the first of equals)."""
    if not modules or default in modules.values():
        return default
    return Counter(modules.values()).most_common(1)[0][0]


def name_patterns(chosen: Collection[str], others: Collection[str]) -> tuple[list[str], list[str]]:
    """Regular expressions, and names, that together match all of `chosen` and none of `others`.

    Names that differ in their numbers alone (layers, experts) share an expression unless it would
    match one of `others`.
    """
    taken = {_template(name) for name in others}
    families: dict[str, list[str]] = {}
    for name in chosen:
        families.setdefault(_template(name), []).append(name)
    patterns, names = [], []
    for template, members in families.items():
        if len(members) > 1 and template not in taken:
            patterns.append(f"^{template}$")
        else:
            names.extend(members)
    return patterns, names


def _template(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def with_fused(names: Collection[str], *, complete: bool) -> list[str]:
    """`names` and those of the fused modules of which they hold all parts (`complete`) or any
    part."""
    result = dict.fromkeys(names)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for fused, parts in FUSED.items():
            if leaf in parts and (
                not complete or all(f"{parent}.{part}" in result for part in parts)
            ):
                result[f"{parent}.{fused}"] = None
    return list(result)
