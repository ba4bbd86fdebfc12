"""The normalised output error of linears that were rounded without a Hessian: `||(W - Ŵ) X||² / ||W
X||²`, on a sample of their input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from quantflow.calibration.statistics import evenly
from quantflow.quant.fit import shown

ROWS = 1024  # of each linear's input, evenly spaced


@dataclass(frozen=True)
class OutputErrors:
    """A tap on a layer whose weights are quantised. difference: name -> (W, W - Ŵ), float32 `[N,
    K]`, or None for a linear that is not measured. of_linears: name -> what its line of the report
    says, from the first rows it sees."""

    difference: Callable[[str], tuple[Tensor, Tensor] | None]
    of_linears: dict[str, dict[str, float | int | None]] = field(default_factory=dict)

    def __call__(self, name: str, x: Tensor, y: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        if name in self.of_linears or not len(flat) or (weights := self.difference(name)) is None:
            return
        rows = evenly(flat, ROWS).float()
        power, error = (float((rows @ weight.T).square().sum()) for weight in weights)
        self.of_linears[name] = {
            "error": shown(error / power if power else error),
            "tokens": len(rows),
        }
