"""`awq`: for each group of linears that share an input, the scale that least disturbs the parent
module's real output.

The search sees the quantised stream (a layer corrects what it will really be fed) on a sample of
whole windows. Its mathematics is in `quant/awq.py`; folding, in `stages/folding.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantflow.calibration.statistics import BlockHessian, Hessian
from quantflow.decoder.block import Block
from quantflow.models.segments import Fold, Role
from quantflow.quant.awq import candidates, linear_loss, rounded, weight_profile
from quantflow.quant.grid import GridRules
from quantflow.quant.scheme import Scheme
from quantflow.stages.folding import Folding
from quantflow.stages.rounded import Rounder, ScaledRounder
from quantflow.stages.work import LayerWork

if TYPE_CHECKING:
    from quantflow.stages.awq import Awq


@dataclass
class AwqResult:
    """folding: the scales. importance: linear -> blocks `[G, g, g]` of its folded input's Hessian
    (clip search). report: one line a group: the scale chosen and its loss relative to the
    identity's."""

    folding: Folding = field(default_factory=Folding)
    importance: dict[str, Tensor] = field(default_factory=dict)
    report: list[dict[str, object]] = field(default_factory=list)


SCREENING_SHARE = 4  # one part in so many of the sample sorts the candidates
FINALISTS = 5  # of them, and the identity, are tried on the whole sample
# output channels at least, evenly spaced, on which a linear's own loss is measured: they are
# rounded independently
LOSS_ROWS = 1024

_Candidate = tuple[str, Tensor]


@dataclass(frozen=True)
class _Search:
    """The search over one layer. round_finally: how the next stage rounds, where that is not to
    nearest (GPTQ)."""

    layer: Block
    schemes: Mapping[str, Scheme]
    rules: GridRules
    grid: int
    round_finally: Rounder | None

    def best(
        self,
        group: list[str],
        x: Tensor,
        parent: Callable[[Tensor], Tensor] | None,
        channels: _Channels,
    ) -> tuple[str, Tensor, float]:
        """The best candidate's name, its scale, and its loss over the identity's, for the quantised
        linears of `group`, which read `x`.

        parent: what the parent module makes of `x`, with whatever weights the layer holds. Without
        one the parent is the linear itself, and its loss comes exactly from the Hessian of `x`, for
        a sample of its rows. A part of `x` sorts the candidates out, the whole decides among the
        identity and the best few. Where GPTQ follows, which already looks after salient channels,
        the winner and its square root must then beat the identity rounded as GPTQ rounds.
        """
        # The linears, and what their losses are measured with.
        weights = {n: self.layer.tensors[f"{n}.weight"] for n in group}
        sample = {
            n: weight if parent else weight[:: max(1, len(weight) // LOSS_ROWS)]
            for n, weight in weights.items()
        }
        quantised = [n for n in group if n in self.schemes]
        flat = x.reshape(-1, x.shape[-1])
        # then a loss costs less from the rows than from their Hessian
        few = len(flat) < flat.shape[1]
        hessian = None
        if self.round_finally or (parent is None and not few):
            accumulated = Hessian(x.shape[-1], x.device)
            accumulated.add(flat)
            hessian = accumulated.matrix

        def losses(
            tried: list[_Candidate], rows: Tensor, by_next_stage: bool = False
        ) -> list[tuple[float, _Candidate]]:
            target = parent(rows) if parent else None
            rounder = (
                self.round_finally(hessian)
                if by_next_stage and self.round_finally and hessian is not None
                else None
            )
            return [(loss(scale, rows, target, rounder), (name, scale)) for name, scale in tried]

        def loss(
            scale: Tensor, rows: Tensor, target: Tensor | None, rounder: ScaledRounder | None
        ) -> float:
            full, total = channels.expand(scale), 0.0
            round_scaled = rounder(full) if rounder else None
            for n in quantised:
                scheme = self.schemes[n]
                weight = (
                    round_scaled(sample[n], scheme)
                    if round_scaled
                    else rounded(sample[n], full, scheme, self.rules)
                )
                if parent is None:
                    total += linear_loss(
                        sample[n], weight, hessian=hessian, rows=flat if few else None
                    )
                else:
                    self.layer.tensors[f"{n}.weight"] = weight.to(self.layer.dtype)
            if parent and target is not None:
                total = float((parent(rows) - target).float().square().mean())
            for n, weight in weights.items():
                self.layer.tensors[f"{n}.weight"] = weight
            return total if math.isfinite(total) else math.inf

        # A part sorts the candidates out; the whole decides.
        activation = channels.reduce(flat.abs().mean(0, dtype=torch.float32))
        profile = channels.reduce(
            weight_profile([weights[n] for n in quantised], self.schemes[quantised[0]])
        )
        tried = list(candidates(activation, profile, self.grid))
        identity = tried[0]
        part = x[: len(x) // SCREENING_SHARE]
        if parent and len(part) and len(tried) > FINALISTS:
            screened = sorted(losses(tried[1:], part), key=lambda pair: pair[0])
            tried = [identity, *(candidate for _, candidate in screened[:FINALISTS])]
        ranked = losses(tried, x)
        winner = min(ranked, key=lambda pair: pair[0])
        # Before a stage that looks after salient channels itself, the winner must do better.
        if self.round_finally and winner[1] is not identity:
            name, scale = winner[1]
            ranked = losses(
                [identity, (f"sqrt({name})", scale.sqrt()), (name, scale)], x, by_next_stage=True
            )
            winner = min(ranked, key=lambda pair: pair[0])
        reference = ranked[0][0]
        return (
            winner[1][0],
            winner[1][1],
            winner[0] / reference if 0 < reference < math.inf else 1.0,
        )


@dataclass(frozen=True)
class _Channels:
    """Between a linear's input channels and the channels that can be scaled: heads of `size`
    channels, each of which stands `times` times in the input, one after the other."""

    times: int = 1
    size: int = 1

    def reduce(self, channels: Tensor) -> Tensor:
        return (
            channels.view(-1, self.times, self.size).mean(1).reshape(-1)
            if self.times > 1
            else channels
        )

    def expand(self, scale: Tensor) -> Tensor:
        return (
            scale.view(-1, 1, self.size).expand(-1, self.times, -1).reshape(-1)
            if self.times > 1
            else scale
        )


def search_layer(
    layer: Block,
    stored: dict[str, Tensor],
    x: Tensor,
    schemes: Mapping[str, Scheme],
    rules: GridRules,
    *,
    grid: int,
    clip: bool,
    round_finally: Rounder | None = None,
    step: Callable[[str], None] = lambda group: None,
) -> AwqResult:
    """Scales for one layer. `x` is the residual stream of the sample, `[B, L, H]`; `stored` holds
    the layer's tensors as stored.

    schemes: linear -> scheme of those that are quantised; the others are folded too, but only those
    count in the loss. Grouped queries share the value head they read: its scale is searched on the
    mean of their channels and expanded over them. A linear that stays in 16 bits is never a
    producer: dividing its rows would round it. step: is told each group that has been searched.
    """
    result, norms = AwqResult(), set[str]()
    folding, search = result.folding, _Search(layer, schemes, rules, grid, round_finally)

    def note(group: str, chosen: str, ratio: float) -> None:
        result.report.append({"group": group, "scale": chosen, "loss_ratio": round(ratio, 6)})
        step(group)

    def fold_into_norm(
        norm: str,
        fold: Fold,
        group: list[str],
        h: Tensor,
        parent: Callable[[Tensor], Tensor] | None,
    ) -> None:
        if any(n in schemes for n in group):
            chosen, scale, ratio = search.best(group, h, parent, _Channels())
            note(norm, chosen, ratio)
            if chosen != "identity":
                folding.fold_norm(norm, stored, [*group, *fold.beside], scale, fold.offset)

    def remember(group: list[str], rows: Tensor) -> None:
        if not clip or not len(rows):
            return
        known: dict[tuple[int, bool], Tensor] = {}  # of readers of one input, folded or not
        for n in group:
            size = schemes[n].group_of(rows.shape[-1])
            key = (size, n in folding.columns)
            if key not in known:
                scaled = rows.float() / folding.columns[n] if n in folding.columns else rows
                if size == rows.shape[-1]:
                    known[key] = scaled.reshape(-1, size).float().square().sum(0)[None]
                else:
                    block = BlockHessian(rows.shape[-1], size, rows.device)
                    block.add(scaled)
                    known[key] = block.matrix
            result.importance[n] = known[key]

    # Segment by segment: a norm's scale is searched once, for all that read it.
    for reading in layer.readings(x):
        segment, fold, rows = reading.segment, reading.segment.fold, reading.rows
        quantised = [n for n in segment.names if n in schemes]
        if fold and fold.norm and fold.norm not in norms:
            norms.add(fold.norm)
            readers = [
                n
                for other in layer.segments
                if other.fold and other.fold.norm == fold.norm
                for n in other.names
            ]
            fold_into_norm(fold.norm, fold, readers, reading.source, reading.parent)
        elif segment.expert is not None and not len(rows) and segment.role is Role.mlp_out:
            note(segment.names[0], "identity: no token of the sample reached this expert", 1.0)
        # A linear's scale goes into its rows, which are rounded anyway.
        elif fold and fold.linear and fold.linear in schemes and quantised:
            channels = _Channels(*fold.heads)
            chosen, scale, ratio = search.best(quantised, rows, None, channels)
            note(segment.names[0], chosen, ratio)
            if chosen != "identity":
                folding.fold_linear(
                    fold.linear, segment.names[0], stored, scale, channels.expand(scale)
                )
        elif fold is None and quantised and segment.expert is None:
            note(segment.part, "identity: nothing that could take the scale feeds it", 1.0)
        remember(quantised, rows)
    return result


@torch.inference_mode()
def awq_layer(settings: Awq, work: LayerWork) -> None:
    """Scales on a sample of the stream's windows, evenly spaced; they are folded by whoever
    rounds."""
    assert work.streams is not None
    x = work.streams.x
    count = settings.windows_of(x.windows, x.shape[1])
    sample = torch.cat([x.read(i, i + 1) for i in (n * x.windows // count for n in range(count))])
    result = search_layer(
        work.make_block(work.stored),
        dict(work.stored),
        sample,
        work.schemes,
        work.rules,
        grid=settings.grid,
        clip=settings.clip and work.round_finally is None,  # GPTQ searches its own ranges
        round_finally=work.round_finally,
        step=lambda group: work.tell(f"scales of {group}"),
    )
    work.folding, work.importance = result.folding, result.importance
    work.report["awq"] = result.report
    work.changed |= result.folding.changed
    for linear in (n for n in result.folding.columns if n not in work.schemes):
        # A router, or a linear that stays in 16 bits, reads the scaled norm too.
        name = f"{linear}.weight"
        stored = work.stored[name]
        work.changed[name] = result.folding.weight(linear, stored).to(stored.dtype)
