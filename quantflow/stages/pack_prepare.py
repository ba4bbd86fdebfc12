"""Which checkpoint to write: each weight in a scheme that the format holds, and everything that
stands against it before a weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.errors import FormatError, Problem
from quantflow.formats.base import Format
from quantflow.formats.weight import Weight, fitting_group, grid_problems
from quantflow.quant.scheme import PER_CHANNEL, Scheme
from quantflow.stages.containers import container_of
from quantflow.stages.pack_job import Held, PackJob


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
    held, plain = _apart(checkpoint, form, held)
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
        plain=plain,
    )
    return Prepared(job, problems, refused + _whole_problems(job))


def _apart(checkpoint: Checkpoint, form: Format, held: Held) -> tuple[Held, Held]:
    """What the format has a place for, and what it has none for: linears that a checkpoint holds
    in one tensor, of which codes have no name."""
    if not form.keeps_codes:
        return held, {}
    kept: dict[int, dict[str, Scheme]] = {}
    plain: dict[int, dict[str, Scheme]] = {}
    for index, layer in held.items():
        joined = checkpoint.joined_linears(index, form.name)
        kept[index] = {name: scheme for name, scheme in layer.items() if name not in joined}
        if lost := {name: scheme for name, scheme in layer.items() if name in joined}:
            plain[index] = lost
    return kept, plain


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
    form, modules = job.format, job.modules
    problems = _rank_problems(job) + container_of(job).problems(job)
    alike = {
        replace(scheme, symmetric=True)
        for module, scheme in modules.items()
        if form.shares_scheme(module)
    }
    if len(alike) > 1:
        schemes = ", ".join(
            sorted(
                {str(scheme) for module, scheme in modules.items() if form.shares_scheme(module)}
            )
        )
        problems.append(
            Problem(
                form.name,
                f"several schemes ({schemes})",
                "one width and group size",
                "Use gptq or compressed-tensors",
            )
        )
        return problems
    try:
        job.quantization_config()
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
    if any(checkpoint.joined(index, job.format.name) for index in range(checkpoint.config.layers)):
        return [
            Problem(
                where,
                f"experts that a checkpoint of {checkpoint.architecture.name} holds in one tensor",
                "1",
                "What reads it cuts the whole itself",
            )
        ]
    config = checkpoint.config
    counts = (("attention heads", config.heads), ("KV heads", config.kv_heads))
    problems = [
        Problem(where, f"{count} {name}", f"a multiple of {tp}")
        for name, count in counts
        if count % tp
    ]
    modules, linears = job.modules, job.linears()
    uncut = [linear for linear, spec in linears.items() if spec.cut is None]
    architecture = checkpoint.architecture
    if (architecture.library or config.uncut) and uncut:  # every rank would get them whole
        name = f"{architecture.name}{' of transformers' if architecture.library else ''}"
        problems.append(
            Problem(
                where,
                f"{len(uncut)} linears that {name} does not cut, such as {uncut[0]}",
                "1",
                "What reads it cuts the whole itself",
            )
        )
    for linear, spec in linears.items():
        if spec.cut is None or linear in modules:
            continue
        if (channels := spec.shape[spec.cut]) % tp:
            kind = ("output", "input")[spec.cut]
            problems.append(
                Problem(linear, f"{channels} {kind} channels", f"a multiple of tp = {tp}")
            )
    return problems
