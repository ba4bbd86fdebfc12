"""How far a quantised model is from its reference: perplexity of both, KL divergence and top-1
agreement, in float32.

Both models run layer by layer over all windows, so memory holds two layers and the hidden states,
whatever the model's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quantflow.calibration.statistics import evenly
from quantflow.decoder.block import ObserveKV
from quantflow.decoder.decoder import open_decoder
from quantflow.formats.reader import Weights
from quantflow.quant.fit import shown

LOGIT_ELEMENTS = 2**23  # logits computed at once, an upper bound
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
    """perplexity and reference_perplexity: over each window's tokens but its first. kl_mean,
    kl_p99: KL(reference || model) in nats a token, over all positions. top1: share of positions
    with the same most likely token. tokens: positions compared."""

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


class Head(Protocol):
    """From hidden states to distributions."""

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""

    def __call__(self, x: Tensor) -> Tensor:
        """Log-probabilities `[T, V]` in float32 of hidden states `[T, H]`."""


Watch = Callable[[int, Tensor], None]
"""Sees a layer's index and the residual stream `[W, L, H]` after it."""


Step = Callable[[float], None]
"""Is told the share of a layer that has just been computed: a model of N layers tells N in all."""


class Model(Protocol):
    """A model to compare: hidden states of all windows first, then distributions, a few rows at a
    time."""

    def states(self, tokens: Tensor, device: torch.device, step: Step, watch: Watch) -> Tensor:
        """`[W, L, H]` for `tokens` `[W, L]`; calls `step` as it goes on, and `watch` where it has
        layers to show."""

    def head(self, device: torch.device) -> Head:
        """For what `states` gave."""


@dataclass(frozen=True)
class Variant:
    """A model computed in float32, layer by layer: its weights, and what its KV cache does to K and
    V of each layer (None: nothing)."""

    weights: Weights
    kv: Callable[[int], ObserveKV] | None = None

    def states(
        self,
        tokens: Tensor,
        device: torch.device,
        step: Step = lambda share: None,
        watch: Watch = lambda index, x: None,
    ) -> Tensor:
        return hidden_states(self, tokens, device, step, watch)

    def head(self, device: torch.device) -> Head:
        return _Head(self, device)


def embedded(weights: Weights, tokens: Tensor, device: torch.device) -> Tensor:
    """The residual stream `[W, L, H]` before the first layer, float32, for `tokens` `[W, L]`."""
    return torch.cat(list(embedded_parts(weights, tokens, device)))


def embedded_parts(weights: Weights, tokens: Tensor, device: torch.device) -> Iterator[Tensor]:
    """`embedded`, some windows at a time."""
    decoder = open_decoder(weights.checkpoint, tokens.shape[1], device)
    outer = {n: weights.tensor(n).to(device) for n in decoder.embeds}
    batch = max(1, BATCH_TOKENS // tokens.shape[1])
    for part in tokens.split(batch):
        yield decoder.embed(outer, part.to(device), torch.float32)


def hidden_states(
    variant: Variant,
    tokens: Tensor,
    device: torch.device,
    step: Step = lambda share: None,
    watch: Watch = lambda index, x: None,
) -> Tensor:
    """The residual stream `[W, L, H]` after the last layer, float32, for `tokens` `[W, L]`."""
    checkpoint = variant.weights.checkpoint
    decoder = open_decoder(checkpoint, tokens.shape[1], device)
    batch = max(1, BATCH_TOKENS // tokens.shape[1])
    x = embedded(variant.weights, tokens, device)
    for index in range(checkpoint.config.layers):
        stored = {n: t.to(device) for n, t in variant.weights.layer(index).items()}
        layer = decoder.block(index, stored, torch.float32)
        observe = variant.kv(index) if variant.kv else None
        for start in range(0, len(x), batch):
            x[start : start + batch] = layer.forward(x[start : start + batch], observe)
            step(len(x[start : start + batch]) / len(x))
        watch(index, x)
    return x


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
    device: str = "cpu",
    step: Step = lambda share: None,
) -> dict[str, Divergence]:
    """The divergence of each variant from the reference on `windows` (all of one length)."""
    tokens, on = torch.tensor(windows), torch.device(device)
    kept: list[Tensor] = []  # of the reference, a layer each
    with torch.inference_mode():
        target = reference.states(tokens, on, step, lambda index, x: kept.append(_sample(x)))
        reference_head = reference.head(on)
        found: dict[str, Divergence] = {}
        for name, variant in variants.items():
            errors: list[float] = []

            def look(index: int, x: Tensor, errors: list[float] = errors) -> None:
                # else it is another architecture
                if index < len(kept) and x.shape[-1] == kept[index].shape[-1]:
                    difference = (_sample(x) - kept[index]).square().sum(-1)
                    errors.append(float((difference / kept[index].square().sum(-1)).mean()))

            states = variant.states(tokens, on, step, look)
            found[name] = _compare(
                target, states, reference_head, variant.head(on), tokens.to(on), tuple(errors)
            )
        return found


def _sample(x: Tensor) -> Tensor:
    """A copy of `[positions, H]` of `[W, L, H]`: `SAMPLED` at most, evenly spaced."""
    return evenly(x.reshape(-1, x.shape[-1]), SAMPLED)


def _compare(
    target: Tensor,
    found: Tensor,
    target_head: Head,
    found_head: Head,
    tokens: Tensor,
    layers: tuple[float, ...],
) -> Divergence:
    length, vocabulary = tokens.shape[1], target_head.vocabulary
    rows = max(1, LOGIT_ELEMENTS // vocabulary)
    flat_target, flat_found = (
        target.reshape(-1, target.shape[-1]),
        found.reshape(-1, found.shape[-1]),
    )
    # The token each position predicts; the last of a window predicts nothing that was measured.
    following = tokens.roll(-1, 1).reshape(-1)
    predicts = (torch.arange(length, device=tokens.device) < length - 1).repeat(len(tokens))
    divergences, same, nll_target, nll_found = [], 0, 0.0, 0.0
    for start in range(0, len(flat_target), rows):
        part = slice(start, start + rows)
        a, b = target_head(flat_target[part]), found_head(flat_found[part])
        # Of a row of NaN, argmax gives the first: two such rows do not agree on anything.
        same += int(((a.argmax(-1) == b.argmax(-1)) & ~(a.sum(-1) + b.sum(-1)).isnan()).sum())
        counted, wanted = predicts[part], following[part, None]
        nll_target -= float(a.gather(1, wanted)[counted].double().sum())
        nll_found -= float(b.gather(1, wanted)[counted].double().sum())
        divergences.append((a.exp() * (a - b)).sum(-1))
    kl = torch.cat(divergences).double()
    predicted = int(predicts.sum())
    p99 = float(kl.kthvalue(max(1, math.ceil(0.99 * len(kl)))).values)
    width = -(-length // POSITION_BINS)
    by_position = kl.view(-1, length).mean(0).split(width)
    return Divergence(
        math.exp(min(nll_found / predicted, 700)),
        math.exp(min(nll_target / predicted, 700)),
        float(kl.mean()),
        p99,
        same / len(kl),
        len(kl),
        Profile(width, tuple(float(part.mean()) for part in by_position), layers),
    )
