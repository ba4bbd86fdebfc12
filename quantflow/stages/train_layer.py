"""Training a layer's linears together, so that the rounded layer on the rounded model's stream
leaves what the plain layer leaves on the plain model's: what `block_ap` and `signround` share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from quantflow.calibration.statistics import KVStatistics
from quantflow.decoder.block import Block
from quantflow.decoder.stream import Stream
from quantflow.quant.fit import shown
from quantflow.quant.numbers.integer import IntegerTensor, quantize_rtn
from quantflow.quant.scheme import Scheme
from quantflow.stages.nearest_layer import carry_on
from quantflow.stages.rounded import Quantized, line
from quantflow.stages.work import LayerWork

if TYPE_CHECKING:
    from quantflow.stages.training import TrainingStage

HELD_SHARE = 4  # at most one of so many windows is held out


class Learner(Protocol):
    """What is trained of a linear."""

    scheme: Scheme

    def parameters(self) -> list[Tensor]:
        """The tensors that get gradients, which are changed in place."""

    def value(self) -> Tensor:
        """The rounded weight `[N, K]`, which can be differentiated."""

    def keep_in_range(self) -> None:
        """After every step."""

    def tensor(self) -> IntegerTensor:
        """What is stored."""


@dataclass(frozen=True)
class Course:
    """batches: of windows, a step each. checks: after so many steps the held-out windows are looked
    at. optimizer, and the factor on its rates, by the step. signed: it sees the signs of gradients
    alone."""

    batches: Sequence[Sequence[int]]
    checks: int
    optimizer: torch.optim.Optimizer
    factors: Sequence[float]
    signed: bool = False


class Lesson:
    """A layer on its way through training. block: over the trained weights. seen: windows that are
    trained on; held: those that choose the best step."""

    def __init__(self, settings: TrainingStage, work: LayerWork) -> None:
        self.told = settings.told
        streams = work.streams
        assert streams is not None and streams.full is not None
        self.work, self.entry, self.target = work, streams.entry or streams.x, streams.full
        _take_on(work, self.target)
        self.block = work.make_block({**work.stored, **work.changed})
        held = min(settings.held_out, self.entry.windows // HELD_SHARE)
        self.seen = range(self.entry.windows - held)
        self.held = range(len(self.seen), self.entry.windows) if held else self.seen

    def starts(self) -> Iterator[tuple[str, Tensor, IntegerTensor]]:
        """Each linear's name, its weight in float32 and the grid that it begins on: what a stage
        before has left, the weight as near to its own as rounds to the same codes; else the grid
        of least error."""
        work = self.work
        for name in (name for segment in work.segments for name in work.names(segment)):
            weight, scheme = work.unrounded.weight(name).float(), work.schemes[name]
            if name not in work.rounded:
                importance = work.importance.get(name)  # which AWQ has, where it searched ranges
                yield (
                    name,
                    weight,
                    quantize_rtn(weight, scheme, work.rules, search=True, importance=importance),
                )
                continue
            rounded = work.rounded[name].tensor
            assert isinstance(rounded, IntegerTensor) and not rounded.indexed
            value = rounded.dequantize()
            group = scheme.group_of(weight.shape[1])
            reach = 0.49 * rounded.scales.float().repeat_interleave(group, 1)
            yield name, value + (weight - value).clamp(-reach, reach), rounded

    def learn(self, learners: Mapping[str, Learner], course: Course) -> list[float]:
        """Trains in place; returns the loss on the held-out windows before, and at every check.
        The learners are left as they were where it was least."""
        parameters = [p.requires_grad_() for each in learners.values() for p in each.parameters()]
        optimizer, steps = course.optimizer, len(course.batches)
        rates = [group["lr"] for group in optimizer.param_groups]
        losses, best = [self._checked(learners)], [p.detach().clone() for p in parameters]
        for step, picked in enumerate(course.batches, 1):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * course.factors[step - 1]
            optimizer.zero_grad(set_to_none=True)
            self._set(learners)
            loss = self._loss(picked)
            loss.backward()
            if course.signed:
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad.sign_()
            optimizer.step()
            with torch.no_grad():
                for learner in learners.values():
                    learner.keep_in_range()
            for _ in range(step * self.told // steps - (step - 1) * self.told // steps):
                self.work.tell(f"loss {float(loss.detach()):.2e}")
            if step % course.checks == 0 or step == steps:
                losses.append(self._checked(learners))
                if losses[-1] == min(losses):
                    best = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, best, strict=True):
                parameter.requires_grad_(False).copy_(value)
        return losses

    @torch.inference_mode()
    def leave(self, learners: Mapping[str, Learner], method: str, losses: list[float]) -> None:
        """Hands the rounded linears on, and takes the stream through them."""
        work = self.work
        for name, learner in learners.items():
            tensor = learner.tensor()
            before = work.rounded[name].report["method"] if name in work.rounded else ""
            report = line(
                work.unrounded.weight(name), tensor, work.rules, method=method, begun=before
            )
            work.rounded[name] = Quantized(tensor, report)
            self.block.tensors[f"{name}.weight"] = tensor.dequantize(work.dtype)
        work.kv = KVStatistics()  # whoever rounded before has seen other ones
        carry_on(work, self.block, self.entry)
        work.report["training"] = {"losses": [shown(loss) for loss in losses]}

    def _set(self, learners: Mapping[str, Learner]) -> None:
        for name, learner in learners.items():
            self.block.tensors[f"{name}.weight"] = learner.value().to(self.work.dtype)

    def _loss(self, picked: Sequence[int]) -> Tensor:
        """The error of what the layer leaves of some windows."""
        inputs, outputs = (
            torch.cat([stream.read(window, window + 1) for window in picked])
            for stream in (self.entry, self.target)
        )
        return _relative_error(self.block.forward(inputs).float(), outputs.float())

    @torch.no_grad()
    def _checked(self, learners: Mapping[str, Learner]) -> float:
        self._set(learners)
        size, held = self.work.batch, self.held
        parts = [held[at : at + size] for at in range(0, len(held), size)]
        return sum(float(self._loss(part)) * len(part) for part in parts) / len(held)


def _relative_error(x: Tensor, wanted: Tensor) -> Tensor:
    """The mean of `||x̂ - x||² / ||x||²` over tokens: the norms behind divide every token by its
    size, and a few tokens (the first, often) are a thousand times as large as the others."""
    power = wanted.square().sum(-1)
    return ((x - wanted).square().sum(-1) / power.clamp(min=1e-12)).mean()


@torch.inference_mode()
def _take_on(work: LayerWork, full: Stream) -> None:
    """Takes the full-precision model's stream through the layer as it is stored."""
    plain: Block = work.make_block(work.stored)
    for start, stop in full.spans(work.batch):
        full.write(start, plain.forward(full.read(start, stop)))
