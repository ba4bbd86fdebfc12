"""Streaming statistics against float64 recomputation over everything at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.calibration.statistics import (
    HESSIAN_BLOCK,
    HESSIAN_ROWS,
    BlockHessian,
    ChannelStatistics,
    Hessian,
    KVStatistics,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_channel_statistics_by_hand() -> None:
    found = ChannelStatistics()
    assert found.result() == {}
    found.add(torch.tensor([[1.0, -2.0], [3.0, -4.0]]))
    found.add(torch.empty(0, 2))
    found.add(torch.tensor([[[-8.0, -6.0]], [[0.0, 0.0]]]))
    assert {name: value.tolist() for name, value in found.result().items()} == {
        "max": [3.0, 0.0],
        "min": [-8.0, -6.0],
        "mean": [-1.0, -3.0],
        "absmax": [8.0, 6.0],
        "absmean": [3.0, 3.0],
    }


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6),
    st.sampled_from(FLOATS),
    st.integers(0, 999),
    st.floats(-20, 20),
)
def test_channel_statistics_over_chunks(
    lengths: list[int], dtype: torch.dtype, seed: int, shift: float
) -> None:
    chunks = [(random(n, 5, seed=seed + i) + shift).to(dtype) for i, n in enumerate(lengths)]
    found = ChannelStatistics()
    for chunk in chunks:
        found.add(chunk)
    rows = torch.cat(chunks).double()
    if not len(rows):
        assert found.result() == {}
        return
    expected = {
        "max": rows.amax(0),
        "min": rows.amin(0),
        "mean": rows.mean(0),
        "absmax": rows.abs().amax(0),
        "absmean": rows.abs().mean(0),
    }
    result = found.result()
    assert list(result) == list(expected)
    for name, value in expected.items():
        assert result[name].dtype == torch.float32
        exact = name in ("max", "min", "absmax")
        torch.testing.assert_close(
            result[name].double(),
            value,
            rtol=0 if exact else 1e-5,
            atol=0 if exact else 1e-5,
            msg=name,
        )


def test_means_of_many_chunks_do_not_drift() -> None:
    # Each chunk's sum, 129129 / 128, is exact in float32; added up in float32, hundreds of them are
    # not.
    found = ChannelStatistics()
    chunk = torch.full((1001, 1), 1 + 2.0**-7, dtype=torch.bfloat16)
    for _ in range(1000):
        found.add(chunk)
    assert found.result()["mean"].tolist() == found.result()["absmean"].tolist() == [1 + 2.0**-7]


@pytest.mark.parametrize("dtype", FLOATS)
def test_kv_statistics(dtype: torch.dtype) -> None:
    kv = KVStatistics()
    assert kv.result() == {}
    pairs = [
        (
            (random(2, 3, length, 4, seed=length) - 1).to(dtype),
            (random(2, 3, length, 4, seed=9 + length) + 5).to(dtype),
        )
        for length in (5, 1, 7)
    ]
    for k, v in pairs:
        same_k, same_v = kv(k, v)
        assert same_k is k and same_v is v
    result = kv.result()
    assert set(result) == {
        f"{name}.{kind}" for name in ("key", "value") for kind in ("max", "min", "absmax")
    }
    for which, name in enumerate(("key", "value")):
        for head in range(3):
            for channel in range(4):
                values = [
                    float(x) for pair in pairs for x in pair[which][:, head, :, channel].flatten()
                ]
                at = (head, channel)
                assert float(result[f"{name}.max"][at]) == max(values) and float(
                    result[f"{name}.min"][at]
                ) == min(values)
                assert float(result[f"{name}.absmax"][at]) == max(abs(x) for x in values)
    assert all(value.shape == (3, 4) and value.dtype == torch.float32 for value in result.values())


def relative_to_diagonal(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of an entry, relative to `sqrt(h_ii h_jj)`."""
    size = exact.diagonal(dim1=-2, dim2=-1).clamp(min=1e-30).sqrt()
    return float(((found.double() - exact).abs() / (size[..., :, None] * size[..., None, :])).max())


TOLERANCES = {
    torch.float32: 1e-5,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float64: 1e-6,
}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_hessian_is_that_of_all_rows(dtype: torch.dtype) -> None:
    chunks = [
        (random(*shape, 12, seed=i) * random(12, seed=77).exp() + 0.3).to(dtype)
        for i, shape in enumerate(((2, 40), (1, 7), (3, 900)))
    ]
    found = Hessian(12)
    for chunk in [*chunks, torch.empty(0, 12, dtype=dtype)]:
        found.add(chunk)
    rows = torch.cat([c.reshape(-1, 12) for c in chunks]).double()
    assert len(rows) > HESSIAN_ROWS and found.rows == len(rows)
    assert found.matrix.dtype == torch.float32
    assert relative_to_diagonal(found.matrix, rows.T @ rows) < TOLERANCES[dtype]
    torch.testing.assert_close(found.matrix, found.matrix.T, rtol=TOLERANCES[dtype], atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hessian_of_more_channels_than_a_block(dtype: torch.dtype) -> None:
    channels = 2 * HESSIAN_BLOCK + 40
    found, x = Hessian(channels), random(3, 1500, channels).to(dtype)
    for part in x:
        found.add(part)
        _ = found.matrix  # reading it in between changes nothing
    rows = x.reshape(-1, channels).double()
    assert relative_to_diagonal(found.matrix, rows.T @ rows) < TOLERANCES[dtype]
    assert torch.equal(found.matrix, found.matrix.T)


def test_hessian_by_hand() -> None:
    found = Hessian(2)
    found.add(torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.bfloat16))
    found.add(torch.tensor([[[0.0, 2.0]]], dtype=torch.bfloat16))
    assert found.matrix.tolist() == [[10.0, -1.0], [-1.0, 9.0]] and found.rows == 3


def test_blocks_are_the_hessians() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = random(3, 500, 12).to(dtype)
        blocks, whole = BlockHessian(12, 4), Hessian(12)
        for part in x:
            blocks.add(part)
            whole.add(part)
        for g in range(3):
            part = slice(4 * g, 4 * g + 4)
            torch.testing.assert_close(
                blocks.matrix[g],
                whole.matrix[part, part],
                rtol=TOLERANCES[dtype],
                atol=20 * TOLERANCES[dtype],
            )


def test_large_float16_activations_do_not_overflow() -> None:
    # 1024 rows of 10 give 102400, which float16 does not have.
    x = torch.full((1024, 4), 10.0, dtype=torch.float16)
    whole, blocks = Hessian(4), BlockHessian(4, 2)
    whole.add(x)
    blocks.add(x)
    assert whole.matrix.eq(102400).all() and blocks.matrix.eq(102400).all()
