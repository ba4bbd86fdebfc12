"""Weights on another grid, where a format cannot hold their own and that was asked for: for `export
--requantize` and a recipe's `pack: {requantize: true}`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantflow.checkpoints.rounding import converted
from quantflow.errors import FormatError
from quantflow.quant.grid import GridRules
from quantflow.quant.numbers import QuantizedTensor
from quantflow.quant.requantize import relative_error, requantize
from quantflow.stages.pack_job import PackJob
from quantflow.stages.pack_pieces import Results


@dataclass(frozen=True)
class Requantizing:
    """`source`'s tensors, as `pack` asks for them: its own where the format holds them exactly,
    else on the grid of the job's scheme.

    plain: gives a weight that `source` does not hold quantised. errors: module -> relative error of
    what another grid made inexact.
    """

    source: Results
    job: PackJob
    plain: Callable[[str], Tensor] | None = None
    errors: dict[str, float] = field(default_factory=dict)

    def linear(self, index: int | None, name: str, in_features: int) -> QuantizedTensor:
        checkpoint, target = self.job.checkpoint, self.job.format
        if index is None:
            return self.source.linear(index, name, in_features)
        module, wanted = (
            f"{checkpoint.architecture.layer_prefix(index)}.{name}",
            self.job.schemes[index][name],
        )
        source = None if self.plain else self.source.linear(index, name, in_features)
        if source is not None and target.dtype:
            _, error = converted(
                f"{module}.weight", source.dequantize(), getattr(torch, target.dtype), rounded=True
            )
            if error:
                self.errors[module] = error
            return source
        if source is not None and source.scheme == wanted and self._holds(module, source):
            return source
        weight = self.plain(f"{module}.weight").float() if self.plain else source.dequantize()  # type: ignore[union-attr]
        rules = GridRules(
            (getattr(torch, target.scale_dtype(checkpoint.config.dtype)),), target.min_zero
        )
        tensor = requantize(weight, source, wanted, rules)
        if error := relative_error(tensor, weight):
            self.errors[module] = error
        return tensor

    def _holds(self, module: str, tensor: QuantizedTensor) -> bool:
        try:
            self.job.format.encode(module, tensor, getattr(torch, self.job.checkpoint.config.dtype))
        except FormatError:  # some of its numbers, which no scheme tells
            return False
        return True

    def changed(self, index: int | None, name: str) -> Tensor | None:
        return self.source.changed(index, name)


def record(errors: dict[str, float]) -> dict[str, float]:
    """Errors as they are written down: sorted, four digits."""
    return {name: float(f"{error:.4g}") for name, error in sorted(errors.items())}
