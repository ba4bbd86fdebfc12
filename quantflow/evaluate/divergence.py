"""How far a quantised model is from its reference: perplexity of both, KL divergence and top-1
agreement, in float32.

Both models run layer by layer over all windows, and hidden states over the activation budget lie in
files: memory holds two layers, whatever the model's size and the text's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quantflow.calibration.statistics import evenly
from quantflow.decoder.block import ObserveKV
from quantflow.decoder.decoder import open_decoder
from quantflow.decoder.stream import Room, Stream
from quantflow.decoder.walk import through
from quantflow.evaluate.distributions import Head, Output, compared, mean
from quantflow.formats.reader import Weights
from quantflow.quant.fit import shown

BATCH_TOKENS = 2048
POSITION_BINS = 64  # at most, that a window's positions are put into
SAMPLED = 128  # positions whose residual stream is compared after every layer


@dataclass(frozen=True)
class Profile:
    """Where a divergence lies. bin: positions of a window that make one entry of `kl`, the mean of
    their divergence. layers: what each layer leaves in the residual stream against the reference's:
    the mean of `||x̂ - x||² / ||x||²` over a sample of positions; none for the engine, and for a
    model of another width."""

    bin: int
    kl: tuple[float, ...]
    layers: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "bin": self.bin,
            "kl": [shown(v) for v in self.kl],
            "layers": [shown(v) for v in self.layers],
        }


@dataclass(frozen=True)
class Divergence:
    """How far a model is from its reference, on text.

    Attributes:
        perplexity: The model's, over each window's tokens but its first.
        reference_perplexity: The reference's.
        kl_mean: The mean of KL(reference || model) over all positions, in nats a token.
        kl_p99: Its 99th percentile.
        top1: The share of positions with the same most likely token, from 0 to 1.
        tokens: How many positions were compared.
        profile: Where the divergence lies: by position, and by layer.
    """

    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_p99: float
    top1: float
    tokens: int
    profile: Profile

    def as_dict(self) -> dict[str, float]:
        """The figures, without the profile."""
        return {k: v for k, v in vars(self).items() if k != "profile"}


Watch = Callable[[int, int, Tensor], None]
"""Sees a layer's index, a window's number, and the residual stream `[B, L, H]` after the layer from
that window on: all windows of a layer, in order, before the next layer's."""


Step = Callable[[float], None]
"""Is told the share of a layer that has just been computed: a model of N layers tells N in all."""


class Model(Protocol):
    """A model to compare: hidden states of all windows first, then distributions, a few rows at a
    time."""

    def states(self, tokens: Tensor, room: Room, name: str, step: Step, watch: Watch) -> Stream:
        """`[W, L, H]` for `tokens` `[W, L]`, in a stream of that name; calls `step` as it goes on,
        and `watch` where it has layers to show."""

    def head(self, device: torch.device) -> Head:
        """For what `states` gave."""


@dataclass(frozen=True)
class Variant:
    """A model computed in float32, layer by layer: its weights, and what its KV cache does to K and
    V of each layer (None: nothing)."""

    weights: Weights
    kv: Callable[[int], ObserveKV | None] | None = None

    def states(
        self,
        tokens: Tensor,
        room: Room,
        name: str = "states",
        step: Step = lambda share: None,
        watch: Watch = lambda index, start, x: None,
    ) -> Stream:
        """The residual stream after the last layer."""
        config = self.weights.checkpoint.config
        decoder = open_decoder(self.weights.checkpoint, tokens.shape[1], room.device)
        channels = self.weights.checkpoint.row_channels(tokens.shape[1], torch.float32)
        x = compared_stream(room, name, (*tokens.shape, channels))

        def work(index: int, stored: dict[str, Tensor]) -> None:
            layer = decoder.block(index, stored, torch.float32)
            observe = self.kv(index) if self.kv else None
            for start, stop in x.spans(together(tokens)):
                after = layer.forward(x.read(start, stop), observe)
                x.write(start, after)
                step((stop - start) / x.windows)
                watch(index, start, after[..., : config.hidden])

        try:
            embed_windows(self.weights, tokens, x)
            through(self.weights.layer, range(config.layers), room.device, work)
        except BaseException:
            x.close()
            raise
        return x

    def head(self, device: torch.device) -> Head:
        return _Head(self, device)


def together(tokens: Tensor) -> int:
    """Windows of `tokens` `[W, L]` that go through a layer at once."""
    return max(1, BATCH_TOKENS // tokens.shape[1])


def compared_stream(room: Room, name: str, shape: tuple[int, int, int]) -> Stream:
    """A stream in float32, of which two are open at once: a model's, and its reference's."""
    return room.sharing(2 * 4 * math.prod(shape)).stream(name, shape, torch.float32)


def embed_windows(weights: Weights, tokens: Tensor, x: Stream) -> None:
    """Fills `x` with the residual stream before the first layer, for `tokens` `[W, L]`."""
    decoder = open_decoder(weights.checkpoint, tokens.shape[1], x.device)
    outer = {n: weights.tensor(n).to(x.device) for n in decoder.embeds}
    for start, stop in x.spans(together(tokens)):
        x.write(start, decoder.embed(outer, tokens[start:stop].to(x.device), x.dtype))


class _Head:
    """The final norm and head of a model."""

    def __init__(self, variant: Variant, device: torch.device) -> None:
        checkpoint = variant.weights.checkpoint
        self.decoder = open_decoder(checkpoint, 1, device)
        self.tensors = {
            n: variant.weights.tensor(n).to(device, torch.float32) for n in self.decoder.heads
        }
        self.vocabulary = checkpoint.config.vocabulary

    def __call__(self, x: Tensor) -> Tensor:
        """log-probabilities `[T, V]` of hidden states `[T, H]`."""
        return self.decoder.logits(self.tensors, x).log_softmax(-1)


def compare(
    reference: Model,
    variants: Mapping[str, Model],
    windows: list[list[int]],
    room: Room | None = None,
    step: Step = lambda share: None,
) -> dict[str, Divergence]:
    """The divergence of each variant from the reference on `windows` (all of one length). room:
    where it is computed, and where hidden states may lie."""
    room = room or Room(torch.device("cpu"))
    tokens = torch.tensor(windows)
    samples = _Samples(*tokens.shape)
    divergences: dict[str, Divergence] = {}
    with torch.inference_mode():
        expected = reference.states(tokens, room, "reference", step, samples.keep)
        try:
            target = Output(expected, reference.head(room.device))
            for name, variant in variants.items():
                errors: list[float] = []
                states = variant.states(tokens, room, "variant", step, samples.against(errors))
                try:
                    output = Output(states, variant.head(room.device))
                    divergences[name] = _compare(target, output, tokens, tuple(errors))
                    del output  # and with it a head, or an engine
                finally:
                    states.close()
        finally:
            expected.close()
    return divergences


class _Samples:
    """The residual stream after every layer of the reference, at `SAMPLED` positions at most,
    evenly spaced over the windows; and how far others are from it."""

    def __init__(self, windows: int, length: int) -> None:
        self._windows, self._length = windows, length
        self._positions = evenly(torch.arange(windows * length)[:, None], SAMPLED)[:, 0]
        self._kept: list[Tensor] = []  # a layer each

    def keep(self, index: int, start: int, x: Tensor) -> None:
        """Of the reference: a `Watch`."""
        picked = self._pick(start, x)
        if start == 0:
            self._kept.append(picked)
        else:
            self._kept[index] = torch.cat([self._kept[index], picked])

    def against(self, errors: list[float]) -> Watch:
        """Of another model: appends the error of each layer, but for one of another width."""
        parts: list[Tensor] = []

        def watch(index: int, start: int, x: Tensor) -> None:
            # else it is another architecture
            if index >= len(self._kept) or x.shape[-1] != self._kept[index].shape[-1]:
                return
            parts.append(self._pick(start, x))
            if start + len(x) == self._windows:
                expected = self._kept[index]
                difference = (torch.cat(parts) - expected).square().sum(-1)
                errors.append(float((difference / expected.square().sum(-1)).mean()))
                parts.clear()

        return watch

    def _pick(self, start: int, x: Tensor) -> Tensor:
        """A copy of the sampled positions `[positions, H]` of the windows from `start` on."""
        first, last = start * self._length, (start + len(x)) * self._length
        inside = (self._positions >= first) & (self._positions < last)
        return x.reshape(-1, x.shape[-1])[(self._positions[inside] - first).to(x.device)]


def _compare(
    target: Output, output: Output, tokens: Tensor, layers: tuple[float, ...]
) -> Divergence:
    length, tokens = tokens.shape[1], tokens.to(target.states.device)
    # The token each position predicts; the last of a window predicts nothing that was measured.
    following = tokens.roll(-1, 1).reshape(-1)
    predicts = (torch.arange(length, device=tokens.device) < length - 1).repeat(len(tokens))
    divergences, same, nll_target, nll = [], 0, 0.0, 0.0
    for _, part in compared(target, [output]):
        a, b = part.reference, part.other
        # Of a row of NaN, argmax gives the first: two such rows do not agree on anything.
        same += int(((a.argmax(-1) == b.argmax(-1)) & ~(a.sum(-1) + b.sum(-1)).isnan()).sum())
        counted, wanted = predicts[part.positions], following[part.positions, None]
        nll_target -= float(a.gather(1, wanted)[counted].double().sum())
        nll -= float(b.gather(1, wanted)[counted].double().sum())
        divergences.append(part.kl)
        del part, a, b  # before the next ones are computed
    kl = torch.cat(divergences).double()
    predicted = int(predicts.sum())
    p99 = float(kl.kthvalue(max(1, math.ceil(0.99 * len(kl)))).values)
    width = -(-length // POSITION_BINS)
    by_position = kl.view(-1, length).mean(0).split(width)
    return Divergence(
        math.exp(min(nll / predicted, 700)),
        math.exp(min(nll_target / predicted, 700)),
        mean(kl),
        p99,
        same / len(kl),
        len(kl),
        Profile(width, tuple(float(part.mean()) for part in by_position), layers),
    )
