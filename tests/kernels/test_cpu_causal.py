"""Rotary embedding and causal attention over whole windows, in C, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from quantflow_kernels import cpu_causal
from torch import Tensor

from tests.helpers.devices import DEVICE

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's path"),
    pytest.mark.skipif(
        not cpu_causal.supports(torch.zeros(16, dtype=torch.bfloat16)),
        reason=f"no compiled attention: {cpu_causal.library()[1] or 'no bf16'}",
    ),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def expected(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    shared, length = q.shape[1] // k.shape[1], q.shape[2]
    keys, values = (t.double().repeat_interleave(shared, 1) for t in (k, v))
    behind = torch.arange(length)[:, None] - torch.arange(length)
    seen = (behind >= 0) & (behind < (window or length))
    scores = (q.double() @ keys.transpose(2, 3) / math.sqrt(q.shape[3])).masked_fill(
        ~seen, -math.inf
    )
    return scores.softmax(-1) @ values


@pytest.mark.parametrize("d", [16, 48, 64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (5, 1)])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 127, 128, 129, 300])
@pytest.mark.parametrize("window", [0, 1, 40, 128])
def test_attention(d: int, heads: int, kv_heads: int, length: int, window: int) -> None:
    """Rounding to bfloat16 alone, of the weights and of the result, makes 2 to 3 thousandths."""
    q, k, v = (
        random(2, length, h, d, seed=seed).transpose(1, 2)
        for seed, h in enumerate((heads, kv_heads, kv_heads))
    )
    found, wanted = (
        cpu_causal.causal_attention(q, k, v, window=window).double(),
        expected(q, k, v, window),
    )
    assert float((found - wanted).norm() / wanted.norm()) < 3e-3
    torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e3])
def test_scores_of_any_size(size: float) -> None:
    """Equal ones, and one that takes all: the running maximum carries over from tile to tile."""
    q, k, v = (
        random(1, 2, 290, 64, seed=1) * size,
        random(1, 1, 290, 64, seed=2),
        random(1, 1, 290, 64, seed=3),
    )
    found, wanted = cpu_causal.causal_attention(q, k, v).double(), expected(q, k, v, 0)
    assert found.isfinite().all() and float((found - wanted).norm() / wanted.norm()) < 5e-3


def test_later_keys_are_not_seen() -> None:
    q, k, v = (random(1, h, 200, 32, seed=h) for h in (4, 2, 2))
    found = cpu_causal.causal_attention(q, k, v)
    k[:, :, 130:], v[:, :, 130:] = 1e30, 7.0
    assert cpu_causal.causal_attention(q, k, v)[:, :, :130].equal(found[:, :, :130])


def test_any_layout_gives_the_same_bits() -> None:
    apart = [random(2, h, 70, 32, seed=h) for h in (4, 2, 2)]
    fused = torch.cat([t.transpose(1, 2) for t in apart], dim=2)  # as one product puts them out
    views = [t.transpose(1, 2) for t in fused.split([4, 2, 2], dim=2)]
    assert cpu_causal.causal_attention(*views).equal(cpu_causal.causal_attention(*apart))


@pytest.mark.parametrize("d", [16, 48, 64, 80])
def test_rotation(d: int) -> None:
    x = random(2, 9, 3, d).transpose(1, 2)
    angles = torch.rand(9, d // 2, generator=torch.Generator().manual_seed(1)) * 7
    found = cpu_causal.rotate(x, angles.cos(), angles.sin())
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = angles.cos().double(), angles.sin().double()
    wanted = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    assert found.shape == x.shape and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-6)


def test_what_is_not_taken() -> None:
    heads = torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16)
    assert cpu_causal.supports(heads)
    assert not any(
        map(
            cpu_causal.supports,
            (heads.float(), heads[..., :8], heads.expand(16, 16, 16, 16).transpose(2, 3)),
        )
    )
    with pytest.raises(ValueError, match="expected bfloat16"):
        cpu_causal.causal_attention(
            heads.expand(1, 3, 1, 16), heads.expand(1, 2, 1, 16), heads.expand(1, 2, 1, 16)
        )
    with pytest.raises(ValueError, match=r"expected float32 \[1, 8\]"):
        cpu_causal.rotate(heads, torch.zeros(1, 16), torch.zeros(1, 16))
    with pytest.raises(ValueError, match="expected bfloat16 heads"):
        cpu_causal.rotate(heads.float(), torch.zeros(1, 8), torch.zeros(1, 8))
    with pytest.raises(ValueError, match="a window of -5"):
        cpu_causal.causal_attention(heads, heads, heads, window=-5)


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_shows(which: str, number: float) -> None:
    """In the rows that see it, so that a layer that overflows does not pass for a good one."""
    tensors = {name: random(1, 1, 40, 16, seed=seed) for seed, name in enumerate("qkv")}
    clean = cpu_causal.causal_attention(**tensors)
    tensors[which][0, 0, 3] = number
    found = cpu_causal.causal_attention(**tensors)
    sees = slice(3, 4) if which == "q" else slice(3, None)
    assert not found[0, 0, sees].isfinite().any(dim=-1).any()
    # a weight of 0 does not make a number of such a value, in torch's attention neither
    if which != "v":
        assert found[0, 0, :3].equal(clean[0, 0, :3]) and (
            which == "k" or found[0, 0, 4:].equal(clean[0, 0, 4:])
        )


def test_scores_far_below_zero() -> None:
    """All alike: the mean of the values."""
    q, k, v = (
        torch.full((1, 1, 8, 16), 1e17).bfloat16(),
        torch.full((1, 1, 8, 16), -1e17).bfloat16(),
        random(1, 1, 8, 16),
    )
    mean = v.double().cumsum(2) / torch.arange(1, 9)[:, None]
    torch.testing.assert_close(
        cpu_causal.causal_attention(q, k, v).double(), mean, rtol=2**-7, atol=2**-7
    )
