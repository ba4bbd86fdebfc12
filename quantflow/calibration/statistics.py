"""Statistics of activations, gathered as they stream by.

Shapes: activations `[..., K]`; one statistic a channel, `[K]`. K and V of attention: `[B, kv_heads,
L, D]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

HESSIAN_ROWS = 2048  # rows of one partial product
FEW_ROWS = 1024  # fewer are multiplied exactly
HESSIAN_BLOCK = 256  # rows of the symmetric sum that are computed together, from the diagonal on


def evenly(rows: Tensor, most: int) -> Tensor:
    """At most `most` of `[R, K]`, from the first to the last. A whole step would meet the same
    places of every window again."""
    picked = torch.linspace(
        0, len(rows) - 1, min(most, len(rows)), device=rows.device, dtype=torch.float64
    )
    return rows[picked.round().long()]


class ChannelStatistics:
    """max, min, mean, absmax and absmean of every channel, as LMDeploy's `lite calibrate` records
    them."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._rows = 0

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            return
        high, low = rows.amax(0).float(), rows.amin(0).float()
        total, absolute = rows.sum(0, dtype=torch.float32), rows.abs().sum(0, dtype=torch.float32)
        if not self._rows:
            self._values = {
                "max": high,
                "min": low,
                "sum": total.double(),
                "abssum": absolute.double(),
            }
        else:
            v = self._values
            torch.maximum(v["max"], high, out=v["max"])
            torch.minimum(v["min"], low, out=v["min"])
            v["sum"] += total
            v["abssum"] += absolute
        self._rows += len(rows)

    def result(self) -> dict[str, Tensor]:
        """`max, min, mean, absmax, absmean`, float32 `[K]`; empty if nothing was seen."""
        if not self._rows:
            return {}
        v = self._values
        return {
            "max": v["max"],
            "min": v["min"],
            "mean": (v["sum"] / self._rows).float(),
            "absmax": torch.maximum(v["max"].abs(), v["min"].abs()),
            "absmean": (v["abssum"] / self._rows).float(),
        }


class KVStatistics:
    """max, min and absmax of K and V for every KV head and channel, `[kv_heads, D]`."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Sees `[B, kv_heads, L, D]` and hands them on unchanged."""
        for name, x in (("key", k), ("value", v)):
            high, low = x.amax((0, 2)).float(), x.amin((0, 2)).float()
            if f"{name}.max" in self._values:
                high = torch.maximum(high, self._values[f"{name}.max"])
                low = torch.minimum(low, self._values[f"{name}.min"])
            self._values[f"{name}.max"], self._values[f"{name}.min"] = high, low
        return k, v

    def result(self) -> dict[str, Tensor]:
        """`key.max, key.min, key.absmax, value.max, …`, float32."""
        out = dict(self._values)
        for name in ("key", "value"):
            if f"{name}.max" in out:
                out[f"{name}.absmax"] = torch.maximum(
                    out[f"{name}.max"].abs(), out[f"{name}.min"].abs()
                )
        return out


class Hessian:
    """`Xᵀ X` `[K, K]` in float32, over all rows seen.

    Many bfloat16 rows are multiplied as they are, `HESSIAN_ROWS` at a time, and summed in float32:
    on a CPU with bf16 arithmetic that is two to five times as fast, and the rounding of many
    partial products averages out. Few rows (an expert's) have nothing to average over, and a
    float16 product overflows: both are multiplied in float32, and so are all if `exact`. Only
    blocks on and above the diagonal are computed.
    rounded: whether some product was not exact.
    """

    def __init__(
        self, channels: int, device: torch.device | str = "cpu", *, exact: bool = False
    ) -> None:
        self._exact, self.rounded = exact, False
        self._sum = torch.zeros(channels, channels, device=device)
        self._blocks = [
            slice(a, min(a + HESSIAN_BLOCK, channels)) for a in range(0, channels, HESSIAN_BLOCK)
        ]
        self.rows = 0

    @property
    def matrix(self) -> Tensor:
        """`Xᵀ X`, symmetric."""
        for block in self._blocks:
            self._sum[block.stop :, block] = self._sum[block, block.stop :].T
        return self._sum

    def add(self, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        exact = self._exact or flat.dtype != torch.bfloat16 or len(flat) < FEW_ROWS
        self.rounded |= not exact
        for part in flat.split(HESSIAN_ROWS):
            rows = part.float() if exact else part
            for block in self._blocks:
                left, right, total = (
                    rows[:, block].T,
                    rows[:, block.start :],
                    self._sum[block, block.start :],
                )
                if exact:
                    total.addmm_(left, right)
                else:
                    total += left @ right
        self.rows += len(flat)


class BlockHessian:
    """The diagonal blocks `[G, g, g]` of `Xᵀ X` in float32, over all rows seen."""

    def __init__(self, channels: int, group: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(channels // group, group, group, device=device)

    def add(self, x: Tensor) -> None:
        for rows in x.reshape(-1, x.shape[-1]).float().split(HESSIAN_ROWS):
            parts = rows.reshape(len(rows), self.matrix.shape[0], -1).permute(1, 0, 2)
            self.matrix += torch.bmm(parts.transpose(1, 2), parts)
