"""`quantflow export`: a quantised checkpoint in another format. Codes, scales and zero points are moved, never rounded again."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantflow.artifacts.artifact import KV_FILE, building
from quantflow.errors import FormatError, OutputError, Problem
from quantflow.formats import FORMATS
from quantflow.formats.awq import Awq
from quantflow.formats.base import Format
from quantflow.formats.reader import Weights, checkpoint_folder
from quantflow.models.architecture import linear_shapes
from quantflow.models.checkpoint import resolve_model
from quantflow.models.sharding import parallel_dimension
from quantflow.models.tensor_file import TensorFile, save_tensors
from quantflow.pipeline.progress import Progress, Silent
from quantflow.quant.grid import QuantizedTensor, Scheme
from quantflow.stages.pack import PackJob, write_checkpoint, write_ranks

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Exported:
    """modules: how many quantised weights were moved. scheme: of most of them."""

    output: Path
    source_format: str
    format: str
    modules: int
    scheme: Scheme


@dataclass(frozen=True)
class _Moved:
    """The source's own tensors, as `pack` asks for them. A tensor whose zero points happen to lie in the middle is asymmetric like the
    others."""

    weights: Weights
    schemes: list[dict[str, Scheme]]

    def linear(self, index: int, name: str, in_features: int) -> QuantizedTensor:
        tensor = self.weights.quantized(f"{self.weights.checkpoint.architecture.layer_prefix(index)}.{name}")
        return replace(tensor, scheme=self.schemes[index][name])

    def changed(self, index: int, name: str) -> Tensor | None:
        return None


def export(
    source: str | Path, format_name: str, output: Path, *, tp: int = 1, max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Exported:  # fmt: skip
    """Writes `source`, an artifact or any quantised checkpoint that is read, into `output` in the format `format_name`; with tp > 1 the
    ranks beside it. Raises FormatError, with every reason, where the format cannot hold it exactly; ModelError where the source is wrong;
    OutputError. Nothing is left behind then."""
    if format_name not in FORMATS:
        raise FormatError(Problem("--format", repr(format_name), f"one of {', '.join(FORMATS)}"))
    path = resolve_model(str(source))
    weights, target = Weights(path), FORMATS[format_name]
    if weights.format is None:
        raise FormatError(Problem(str(path), "no quantised checkpoint", "one in a format QuantFlow reads", "quantflow run quantises"))
    if output.resolve() == path.resolve() or path.resolve().is_relative_to(output.resolve()):
        raise OutputError(Problem(str(output), "the source itself", "another directory"))
    schemes = _schemes(weights)
    default = Counter(scheme for layer in schemes for scheme in layer.values()).most_common(1)[0][0]
    indexed = _indexed(weights)
    problems = _problems(weights, target, schemes, indexed, tp)
    if problems:
        raise FormatError(problems)
    checkpoint = weights.checkpoint
    job = PackJob(
        checkpoint, target, dict(enumerate(schemes)), default, lambda name: parallel_dimension(name, checkpoint.architecture.layer),
        target.scale_dtypes(checkpoint.config.dtype)[0], bool(indexed), max_shard_bytes,
    )  # fmt: skip
    told = progress or Silent()
    told.phase("export", checkpoint.config.layers * (1 + tp * (tp > 1)))
    kv = _kv_file(path)
    with building(output) as folder:
        write_checkpoint(folder, job, _Moved(weights, schemes), told.step)
        if kv is not None:
            shutil.copyfile(kv, folder / KV_FILE)
        for rank, place in write_ranks(folder, job, tp, _Moved(weights, schemes), told.step):
            if kv is not None:
                save_tensors(place / KV_FILE, _kv_of_rank(TensorFile(kv), checkpoint.config.kv_heads, rank, tp))
    return Exported(output, weights.format.name, format_name, sum(map(len, schemes)), default)


def _schemes(weights: Weights) -> list[dict[str, Scheme]]:
    """For each layer, the scheme of every quantised linear by its name in the layer."""
    checkpoint, found = weights.checkpoint, []
    for index in range(checkpoint.config.layers):
        prefix = checkpoint.architecture.layer_prefix(index)
        layer: dict[str, Scheme] = {}
        for linear in linear_shapes(checkpoint.architecture, checkpoint.config, index):
            scheme = weights.scheme_of(f"{prefix}.{linear}")
            if scheme is not None:
                layer[linear] = scheme
        found.append(layer)
    if isinstance(weights.format, Awq) and _all_symmetric(weights, weights.format):  # its config says the same of either kind
        found = [{name: replace(scheme, symmetric=True) for name, scheme in layer.items()} for layer in found]
    if not any(found):
        raise FormatError(Problem(str(checkpoint.path), "no quantised linear in its layers", "at least one"))
    return found


def _all_symmetric(weights: Weights, awq: Awq) -> bool:
    return all(awq.is_symmetric(weights.checkpoint.read_source(f"{module}.qzeros")) for module in weights.modules)


def _indexed(weights: Weights) -> set[str]:
    """Modules whose channels are not in the order of their groups."""
    found = set()
    names = set(weights.checkpoint.source_names)
    for module in weights.modules:
        if f"{module}.g_idx" in names:
            index = weights.checkpoint.read_source(f"{module}.g_idx")
            if bool((index[1:] < index[:-1]).any()):
                found.add(module)
    return found


def _problems(weights: Weights, target: Format, schemes: list[dict[str, Scheme]], indexed: set[str], tp: int) -> list[Problem]:
    checkpoint, problems = weights.checkpoint, []
    for index, layer in enumerate(schemes):
        shapes = linear_shapes(checkpoint.architecture, checkpoint.config, index)
        prefix = checkpoint.architecture.layer_prefix(index)
        for linear, scheme in layer.items():
            module = f"{prefix}.{linear}"
            cut = parallel_dimension(linear, checkpoint.architecture.layer) if tp > 1 else None
            problems += target.check(module, shapes[linear], scheme, act_order_index=module in indexed, tp=tp, tp_dim=cut)
    distinct = {scheme for layer in schemes for scheme in layer.values()}
    if len(distinct) > 1 and not target.mixed_bits:
        problems.append(Problem(target.name, "modules of " + ", ".join(sorted(map(str, distinct))), "one scheme for all"))
    return problems


def _kv_file(path: Path) -> Path | None:
    """The KV-cache parameters that lie in a checkpoint, or in the artifact that it is a part of."""
    return next((p for p in (path / KV_FILE, checkpoint_folder(path) / KV_FILE) if p.is_file()), None)


def _kv_of_rank(file: TensorFile, heads: int, rank: int, tp: int) -> dict[str, Tensor]:
    """The part for a rank's heads: parameters per tensor are everybody's."""

    def part(value: Tensor) -> Tensor:
        by_head = value.dim() > 0 and value.shape[0] == heads
        return torch.chunk(value, tp)[rank].contiguous() if by_head else value

    return {name: part(file.read(name)) for name in file.tensors}
