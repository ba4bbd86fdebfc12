"""Rotary position embedding (Su et al. 2021) and its extensions beyond the trained length."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from quantflow_kernels import cpu_causal
from torch import Tensor

from quantflow.models.config import DecoderConfig


def inverse_frequencies(config: DecoderConfig, length: int, kind: int = 0) -> tuple[Tensor, float]:
    """Inverse frequencies `[D / 2]` in float32, and the factor on cos and sin, for a sequence of
    `length` tokens. kind: which of the config's `ropes`. Of a head that turns in part, those of the
    channels in `Rope.order`: 0 for what stands still.

    linear: positions divided by the factor (Chen et al. 2023). dynamic: NTK-aware base that grows
    once `length` passes the trained one. qwen: the same in steps, at every doubling. llama3: long
    wavelengths divided, short kept, blended between. yarn: Peng et al. 2023, section 3.2, with its
    temperature on cos and sin.
    """
    rope = config.ropes[kind]
    dim, p = rope.turning(config.head_dim), rope.parameters
    theta, factor = rope.theta, rope.parameters.get("factor", 1.0)
    trained = p.get("original_max_position_embeddings", float(config.max_positions))
    # How far beyond max_positions; transformers' dynamic kind does not look at
    # original_max_position_embeddings.
    stretch = length / config.max_positions
    if rope.kind == "dynamic" and stretch > 1:
        theta *= (factor * stretch - (factor - 1)) ** (dim / (dim - 2))
    if rope.kind == "qwen" and stretch > 1:
        theta *= (2 ** math.ceil(math.log2(stretch) + 1) - 1) ** (dim / (dim - 2))
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if still := (config.head_dim - dim) // 2:
        frequencies = torch.cat((frequencies, torch.zeros(still)))
    if rope.kind == "linear":
        return frequencies / factor, 1.0
    if rope.kind == "llama3":
        low, high = p["low_freq_factor"], p["high_freq_factor"]
        wavelengths = 2 * math.pi / frequencies
        smooth = ((trained / wavelengths - low) / (high - low)).clamp(0, 1)
        return frequencies * (smooth + (1 - smooth) / factor), 1.0
    if rope.kind == "yarn":

        def rotations_at(rotations: float) -> float:
            return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low, high = rotations_at(p.get("beta_fast", 32.0)), rotations_at(p.get("beta_slow", 1.0))
        if p.get("truncate", 1.0):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(
            0, 1
        )
        temperature = p.get("attention_factor") or _yarn_temperature(factor, p)
        return frequencies * (1 - ramp) + frequencies / factor * ramp, temperature
    return frequencies, 1.0


def _yarn_temperature(factor: float, p: Mapping[str, float]) -> float:
    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return scale(p["mscale"]) / scale(p["mscale_all_dim"])
    return scale(1.0)


def rotary_table(
    config: DecoderConfig, length: int, device: torch.device | str = "cpu", kind: int = 0
) -> tuple[Tensor, Tensor]:
    """cos and sin `[length, D]` in float32, for positions `0..length-1`. kind: which of the
    config's `ropes`."""
    frequencies, factor = inverse_frequencies(config, length, kind)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, order: tuple[int, ...] | None = None) -> Tensor:
    """`x` `[B, heads, L, D]` rotated; halves are paired (`x[i]` with `x[i + D/2]`), as Hugging Face
    does, or those of the channels in `order` (`Rope.order`).

    In its own dtype throughout, or rounded once where compiled kernels take it."""
    if order is not None:
        at = torch.tensor(order, device=x.device)
        return rotate(x[..., at], cos, sin)[..., at.argsort()]
    if cpu_causal.supports(x):
        half = x.shape[-1] // 2
        return cpu_causal.rotate(x, cos[:, :half], sin[:, :half])
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)
