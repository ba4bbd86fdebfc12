"""Weights on another grid, where a format cannot hold their own and that was asked for: for `export --requantize` and a recipe's
`pack: {requantize: true}`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantflow.errors import FormatError, Problem
from quantflow.formats.base import Format
from quantflow.models.architecture import linear_shapes
from quantflow.models.checkpoint import Checkpoint
from quantflow.models.sharding import parallel_dimension
from quantflow.quant.grid import AnyTensor, Scheme
from quantflow.quant.requantize import relative_error, requantize
from quantflow.quant.rtn import GridRules
from quantflow.stages.pack import PackJob, Results

RECORD = "requantized.json"  # beside a checkpoint that is no exact translation


def schemes_to_write(
    checkpoint: Checkpoint, target: Format, held: Mapping[int, Mapping[str, Scheme]], indexed: Callable[[str], bool], *, tp: int,
    requantize: bool,
) -> tuple[dict[int, dict[str, Scheme]], list[Problem]]:  # fmt: skip
    """The scheme of every quantised linear in `target`, by layer and name, and everything that keeps one from being written.

    held: the schemes as they are. indexed: whether a module carries a group index. requantize: where the format's nearest scheme is
    another one, take that.
    """
    architecture, config = checkpoint.architecture, checkpoint.config
    found: dict[int, dict[str, Scheme]] = {}
    problems = []
    for index, layer in held.items():
        found[index], shapes = {}, linear_shapes(architecture, config, index)
        prefix = architecture.layer_prefix(index)
        for linear, scheme in layer.items():
            has_index = indexed(f"{prefix}.{linear}")
            if requantize:
                scheme, has_index = target.nearest(scheme, shapes[linear]), has_index and target.holds_index
            cut = parallel_dimension(linear, architecture.layer) if tp > 1 else None
            problems += target.check(f"{prefix}.{linear}", shapes[linear], scheme, act_order_index=has_index, tp=tp, tp_dim=cut)
            found[index][linear] = scheme
    return found, problems


def one_scheme(schemes: Mapping[int, Mapping[str, Scheme]], scheme: Scheme) -> dict[int, dict[str, Scheme]]:
    """The same linears in one scheme, for a format that has but one; symmetry may differ, which AWQ does not tell apart."""
    return {index: {name: replace(scheme, symmetric=own.symmetric) for name, own in layer.items()} for index, layer in schemes.items()}


@dataclass(frozen=True)
class Requantizing:
    """`source`'s tensors, as `pack` asks for them: its own where the format holds them exactly, else on the grid of the job's scheme.

    plain: gives a weight that `source` does not hold quantised. errors: module -> relative error of what was put on another grid.
    """

    source: Results
    job: PackJob
    plain: Callable[[str], Tensor] | None = None
    errors: dict[str, float] = field(default_factory=dict)

    def linear(self, index: int, name: str, in_features: int) -> AnyTensor:
        checkpoint, target = self.job.checkpoint, self.job.format
        module, wanted = f"{checkpoint.architecture.layer_prefix(index)}.{name}", self.job.schemes[index][name]
        source = None if self.plain else self.source.linear(index, name, in_features)
        if source is not None and target.dtype:
            exact = source.dequantize()
            stored = exact.to(getattr(torch, target.dtype)).float()
            if not torch.equal(stored, exact):
                self.errors[module] = _shown(float((stored - exact).double().norm() / exact.double().norm()))
            return source
        if source is not None and source.scheme == wanted and self._holds(module, source):
            return source
        weight = self.plain(f"{module}.weight").float() if self.plain else source.dequantize()  # type: ignore[union-attr]
        rules = GridRules((getattr(torch, target.scale_dtype(checkpoint.config.dtype)),), target.min_zero)
        found = requantize(weight, source, wanted, rules)
        self.errors[module] = _shown(relative_error(found, weight))
        return found

    def _holds(self, module: str, tensor: AnyTensor) -> bool:
        try:
            self.job.format.encode(module, tensor, getattr(torch, self.job.checkpoint.config.dtype))
        except FormatError:  # some of its numbers, which no scheme tells
            return False
        return True

    def changed(self, index: int | None, name: str) -> Tensor | None:
        return self.source.changed(index, name)


def _shown(error: float) -> float:
    return float(f"{error:.4g}")
