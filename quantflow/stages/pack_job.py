"""One checkpoint to write: in which schemes, into what, and everything that stands against it
before a weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.checkpoints.gguf.writer import decoder_problems
from quantflow.checkpoints.turbomind.workspace import workspace_problems
from quantflow.errors import FormatError, ModelError, Problem
from quantflow.formats.base import ConfigRequest, Format
from quantflow.formats.weight import Weight, fitting_group, grid_problems
from quantflow.models.segments import LinearSpec
from quantflow.quant.scheme import PER_CHANNEL, Scheme
from quantflow.tokenizers.gguf_vocabulary import vocabulary_metadata
from quantflow.tokenizers.tokenizer import has_tokenizer

Held = Mapping[int, Mapping[str, Scheme]]  # layer -> name in the layer -> scheme


@dataclass(frozen=True)
class PackJob:
    """One checkpoint to write. schemes: layer -> relative name -> scheme. outer: module -> scheme
    of what is quantised outside the layers. has_index: tensors carry a group index. ranks: how many
    there will be; rank, tp: which one this is, of how many, where it is not the whole. kv: what the
    checkpoint holds of the KV cache: a workspace int8 parameters, `[]` or `[ranks]`; others scales,
    `[1]`, of the kind kv_scales, one of the format's own.
    unpacked: weights outside the layers that the source holds quantised and the format does not.
    rounded: what a dtype does not hold exactly is rounded."""

    checkpoint: Checkpoint
    format: Format
    schemes: Held
    default: Scheme
    max_shard_bytes: int
    has_index: bool = False
    ranks: int = 1
    rank: int = 0
    tp: int = 1
    kv: Mapping[str, Tensor] | None = None
    kv_scales: str | None = None
    outer: Mapping[str, Scheme] = field(default_factory=dict)
    unpacked: frozenset[str] = frozenset()
    rounded: bool = False

    @property
    def modules(self) -> dict[str, Scheme]:
        """The scheme of every quantised module by its full name, those outside the layers last."""
        prefixes = {
            index: self.checkpoint.architecture.layer_prefix(index) for index in self.schemes
        }
        return {
            f"{prefixes[i]}.{name}": scheme
            for i, layer in self.schemes.items()
            for name, scheme in layer.items()
        } | dict(self.outer)

    @property
    def request(self) -> ConfigRequest:
        """What its configuration is to say."""
        dtype = self.checkpoint.config.dtype
        return ConfigRequest(
            self.modules, _ignored(self), self.default, self.kv_scales, self.has_index, dtype
        )

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What engines are known not to load of it, each in a sentence. It is right all the same,
        and is written."""
        return tuple(f"{self.format.name}, {doubt}" for doubt in self.format.doubts(self.request))


@dataclass(frozen=True)
class Prepared:
    """A job, and what stands against it: of single modules, and of the whole."""

    job: PackJob
    modules: list[Problem]
    whole: list[Problem]


def prepare(
    checkpoint: Checkpoint,
    form: Format,
    held: Held,
    *,
    indexed: Callable[[str], bool],
    max_shard_bytes: int,
    ranks: int = 1,
    requantize: bool = False,
    default: Scheme | None = None,
    outer: Mapping[str, Scheme] | None = None,
) -> Prepared:
    """The job that writes `held` in `form`.

    held: the schemes as they are; outer: those of quantised modules outside the layers. indexed:
    whether a module carries a group index.
    requantize: modules may take the format's nearest scheme, and numbers may be rounded. default:
    the scheme that needs no naming.
    """
    weights: dict[tuple[int, str], Weight] = {}
    for index, layer in held.items():
        linears = checkpoint.linears(index)
        for name, scheme in layer.items():
            module = f"{checkpoint.architecture.layer_prefix(index)}.{name}"
            spec, cut = linears[name], linears[name].cut if ranks > 1 else None
            weights[index, name] = Weight(
                module, spec.shape, scheme, indexed(module), ranks if cut is not None else 1, cut
            )
    problems: list[Problem] = []
    if requantize:  # from a grid that the weight must have first
        for weight in weights.values():
            problems += grid_problems(replace(weight.whole, indexed=False))
        if not problems:
            settled = _settled(form, list(weights.values()))
            weights = dict(zip(weights, settled, strict=True))
    for weight in weights.values():
        problems += form.check(weight)
    kept, unpacked, refused = _outside(checkpoint, form, outer or {}, indexed, requantize)
    schemes: dict[int, dict[str, Scheme]] = {index: {} for index in held}
    for (index, name), weight in weights.items():
        schemes[index][name] = weight.scheme
    used = Counter(weight.scheme for weight in weights.values())
    if default is None or default not in used:
        default = used.most_common(1)[0][0] if used else Scheme(4, 128, False)
    has_index = form.holds_index and any(weight.indexed for weight in weights.values())
    job = PackJob(
        checkpoint,
        form,
        schemes,
        default,
        max_shard_bytes,
        has_index,
        ranks,
        outer=kept,
        unpacked=unpacked,
        rounded=requantize,
    )
    return Prepared(job, problems, refused + _whole_problems(job))


def _settled(form: Format, weights: list[Weight]) -> list[Weight]:
    """Each weight in the format's nearest scheme, and those that must be alike in one: the
    commonest, its groups small enough for all."""
    weights = [
        replace(weight, scheme=form.nearest(weight), indexed=weight.indexed and form.holds_index)
        for weight in weights
    ]
    alike = [weight for weight in weights if form.shares_scheme(weight.module)]
    if len({replace(weight.scheme, symmetric=True) for weight in alike}) < 2:
        return weights
    common = Counter(weight.scheme for weight in alike).most_common(1)[0][0]
    k = math.gcd(*(weight.rank_shape[1] for weight in alike))
    size = common.group_size
    if size != PER_CHANNEL or any(weight.scheme.group_size != PER_CHANNEL for weight in alike):
        size = fitting_group(k, min(k, 128) if size == PER_CHANNEL else size)
    return [
        replace(weight, scheme=replace(common, group_size=size, symmetric=weight.scheme.symmetric))
        if form.shares_scheme(weight.module)
        else weight
        for weight in weights
    ]


def _outside(
    checkpoint: Checkpoint,
    form: Format,
    outer: Mapping[str, Scheme],
    indexed: Callable[[str], bool],
    requantize: bool,
) -> tuple[dict[str, Scheme], frozenset[str], list[Problem]]:
    """What becomes of quantised modules outside the layers: kept in their scheme, or unpacked, or
    the reasons why neither."""
    kept: dict[str, Scheme] = {}
    unpacked, problems = set(), []
    for module, scheme in outer.items():
        n, k = checkpoint.shape_of(f"{module}.weight")
        refusals = form.check(Weight(module, (n, k), scheme, indexed(module)))
        if module == checkpoint.architecture.embedding and not form.holds_embedding:
            hint = f"{form.name} quantises linears alone"
            refusals.append(Problem(module, "a quantised embedding", "a plain one", hint))
        if not refusals:
            kept[module] = scheme
        elif requantize:
            unpacked.add(f"{module}.weight")
        else:
            problems += refusals
    return kept, frozenset(unpacked), problems


def _whole_problems(job: PackJob) -> list[Problem]:
    """What stands against the checkpoint as a whole: in its container, in the format's config, in
    its ranks."""
    checkpoint, form = job.checkpoint, job.format
    config, modules = checkpoint.architecture.native_config(checkpoint.raw_config), job.modules
    problems = _rank_problems(job)
    if form.container == "gguf":
        problems += decoder_problems(str(config.get("model_type")), checkpoint.config)
        if not problems and has_tokenizer(checkpoint.tokenizer_path):
            try:
                vocabulary_metadata(checkpoint.tokenizer_path, config, checkpoint.config.vocabulary)
            except (FormatError, ModelError) as error:
                problems += error.problems
    if form.container == "workspace":
        problems += workspace_problems(
            checkpoint.config, tp=job.ranks, int4=bool(modules), group_size=job.default.group_size
        )
        plain = (
            [linear for linear in _linears(checkpoint) if linear not in modules] if modules else []
        )
        if plain:
            more = f" and {len(plain) - 1} more" if len(plain) > 1 else ""
            problems.append(
                Problem(
                    f"{plain[0]}{more}",
                    "plain, where other linears are int4",
                    "all linears of the layers of one kind",
                )
            )
    alike = {
        replace(scheme, symmetric=True)
        for module, scheme in modules.items()
        if form.shares_scheme(module)
    }
    if len(alike) > 1:
        found = ", ".join(
            sorted(
                {str(scheme) for module, scheme in modules.items() if form.shares_scheme(module)}
            )
        )
        problems.append(
            Problem(
                form.name,
                f"several schemes ({found})",
                "one width and group size",
                "Use gptq or compressed-tensors",
            )
        )
        return problems
    try:
        quantization_config(job)
    except FormatError as error:
        problems += error.problems
    return problems


def _rank_problems(job: PackJob) -> list[Problem]:
    checkpoint, tp = job.checkpoint, job.ranks
    if tp == 1:
        return []
    where = f"tp {tp}"
    if not job.format.parallel:
        return [
            Problem(
                where, f"{job.format.name} has no ranks", "1", "What reads it cuts the whole itself"
            )
        ]
    config = checkpoint.config
    counts = (("attention heads", config.heads), ("KV heads", config.kv_heads))
    problems = [
        Problem(where, f"{count} {name}", f"a multiple of {tp}")
        for name, count in counts
        if count % tp
    ]
    modules = job.modules
    for linear, spec in _linears(checkpoint).items():
        if spec.cut is None or linear in modules:
            continue
        if (channels := spec.shape[spec.cut]) % tp:
            kind = ("output", "input")[spec.cut]
            problems.append(
                Problem(linear, f"{channels} {kind} channels", f"a multiple of tp = {tp}")
            )
    return problems


def _linears(checkpoint: Checkpoint) -> dict[str, LinearSpec]:
    """Every linear of the layers, by its full name."""
    return {
        f"{checkpoint.architecture.layer_prefix(index)}.{name}": spec
        for index in range(checkpoint.config.layers)
        for name, spec in checkpoint.linears(index).items()
    }


def quantization_config(job: PackJob) -> dict[str, Any]:
    """The `quantization_config`; {} where nothing is quantised. Raises FormatError for what the
    format cannot say."""
    return job.format.quantization_config(job.request) if job.modules else {}


def _ignored(job: PackJob) -> list[str]:
    """The linears that stay as they are: the head, those of the layers, and routers."""
    checkpoint, modules = job.checkpoint, job.modules
    architecture = checkpoint.architecture
    ignored = [] if architecture.head in modules else [architecture.head]
    for index in range(checkpoint.config.layers):
        prefix = architecture.layer_prefix(index)
        ignored += [
            f"{prefix}.{linear}"
            for linear in checkpoint.linears(index)
            if f"{prefix}.{linear}" not in modules
        ]
        if checkpoint.config.is_moe(index):
            ignored.append(f"{prefix}.{architecture.layer.router}")
    return ignored
