"""Causal attention in blocks against the textbook formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from quantflow_kernels import cpu_causal

from quantflow.decoder.attention import QUERY_BLOCK, causal_attention


def textbook(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    scale: float = 0.25,
    cap: float | None = None,
) -> torch.Tensor:
    """softmax(scale q kᵀ) v with every score there, and those a query may not see at -inf."""
    shared, length = q.shape[1] // k.shape[1], q.shape[2]
    keys, values = (t.double().repeat_interleave(shared, 1) for t in (k, v))
    scores = q.double() @ keys.transpose(2, 3) * scale
    scores = scores if cap is None else cap * (scores / cap).tanh()
    seen = [[at - (window or length) < key <= at for key in range(length)] for at in range(length)]
    return scores.masked_fill(~torch.tensor(seen), -math.inf).softmax(-1) @ values


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(cpu_causal, "supports", lambda x: False)
    elif not cpu_causal.supports(torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16)):
        pytest.skip(f"no compiled attention: {cpu_causal.library()[1] or 'no AVX-512 BF16'}")
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("window", [None, 1, 5, QUERY_BLOCK, QUERY_BLOCK + 9, 10_000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 7, QUERY_BLOCK, 2 * QUERY_BLOCK + 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float32, 1e-5)])
def test_against_the_textbook(
    window: int | None, heads: int, kv_heads: int, length: int, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, length, n, 16, generator=generator).to(dtype).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    )
    found = causal_attention(q, k, v, window)
    assert found.dtype == dtype and found.shape == q.shape
    torch.testing.assert_close(found.double(), textbook(q, k, v, window), rtol=0, atol=tolerance)


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_causal, "supports", lambda x: False)
    q, k, v = (
        torch.randn(2, n, 300, 16, generator=torch.Generator().manual_seed(n)).bfloat16()
        for n in (6, 2, 2)
    )
    whole = causal_attention(q, k, v)
    monkeypatch.setattr("quantflow.decoder.attention.SCORES_AT_ONCE", 1)
    torch.testing.assert_close(causal_attention(q, k, v), whole, rtol=0, atol=0.01)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("cap", [None, 0.7, 40.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float32, 1e-5)])
def test_scaled_and_capped_scores(
    window: int | None, cap: float | None, dtype: torch.dtype, tolerance: float
) -> None:
    q, k, v = (
        torch.randn(2, 150, n, 16, generator=torch.Generator().manual_seed(n)).to(dtype)
        for n in (6, 2, 3)
    )
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v[:, :, :2].transpose(1, 2)
    result = causal_attention(q, k, v, window, scale=0.3, cap=cap)
    expected = textbook(q, k, v, window, 0.3, cap)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)
