"""Ranks put together again give the whole, and compute what the whole computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.models.sharding import shard_plain, shard_shape
from quantflow.quant.numbers.integer import IntegerTensor
from quantflow.quant.scheme import PER_CHANNEL, Scheme
from tests.formats.helpers import random_tensor


def test_by_hand() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(4, 4)
    scales, zeros = torch.arange(8.0).view(4, 2), torch.arange(8, dtype=torch.uint8).view(4, 2)
    tensor = IntegerTensor(Scheme(4, 2, False), codes, scales, zeros)
    column = tensor.cut(0, 1, 2)  # outputs 2 and 3
    assert column.codes.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert column.scales.tolist() == [[4.0, 5.0], [6.0, 7.0]] and column.zeros.tolist() == [
        [4, 5],
        [6, 7],
    ]
    row = tensor.cut(1, 0, 2)  # inputs 0 and 1: group 0
    assert row.codes.tolist() == [[0, 1], [4, 5], [8, 9], [12, 13]]
    assert row.scales.tolist() == [[0.0], [2.0], [4.0], [6.0]] and row.zeros.tolist() == [
        [0],
        [2],
        [4],
        [6],
    ]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from((2, 3, 4, 8)),
    st.sampled_from((PER_CHANNEL, 2, 4)),
    st.booleans(),
    st.sampled_from((0, 1)),
    st.sampled_from((1, 2, 4)),
    st.booleans(),
    st.integers(0, 99),
)
def test_ranks_together_are_the_whole(
    bits: int, group: int, symmetric: bool, dimension: int, tp: int, index: bool, seed: int
) -> None:
    tensor = random_tensor(
        8, 16, Scheme(bits, group, symmetric), seed=seed, index=index and dimension == 0
    )
    ranks = [tensor.cut(dimension, rank, tp) for rank in range(tp)]
    for rank in ranks:
        assert (
            rank.scheme == tensor.scheme
            and rank.codes.is_contiguous()
            and rank.scales.is_contiguous()
            and rank.zeros.is_contiguous()
        )
        assert (rank.codes.dtype, rank.scales.dtype, rank.zeros.dtype) == (
            torch.uint8,
            tensor.scales.dtype,
            torch.uint8,
        )
        assert rank.shape == ((8 // tp, 16) if dimension == 0 else (8, 16 // tp))
    assert torch.equal(torch.cat([r.codes for r in ranks], dimension), tensor.codes)
    assert torch.equal(torch.cat([r.dequantize() for r in ranks], dimension), tensor.dequantize())
    # What the ranks compute, joined (outputs) or summed (inputs), is what the whole computes.
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole = x @ tensor.dequantize(torch.float64).T
    if dimension == 0:
        parts = torch.cat([x @ r.dequantize(torch.float64).T for r in ranks], 1)
    else:
        parts = sum(
            (
                part @ r.dequantize(torch.float64).T
                for part, r in zip(x.chunk(tp, 1), ranks, strict=True)
            ),
            torch.zeros_like(whole),
        )
    torch.testing.assert_close(parts, whole)


def test_a_rows_one_scale_is_whole_on_every_rank() -> None:
    tensor = random_tensor(4, 8, Scheme(8, PER_CHANNEL, False))
    for rank in range(2):
        part = tensor.cut(1, rank, 2)
        assert torch.equal(part.scales, tensor.scales) and torch.equal(part.zeros, tensor.zeros)


@pytest.mark.parametrize(
    ("name", "shape", "dimension", "expected"),
    [
        ("q_proj.weight", (8, 6), 0, (4, 6)),
        ("q_proj.bias", (8,), 0, (4,)),
        ("o_proj.weight", (8, 6), 1, (8, 3)),
        ("o_proj.bias", (8,), 1, (8,)),  # an engine adds it once
        ("input_layernorm.weight", (8,), None, (8,)),
        ("embed_tokens.weight", (8, 6), None, (8, 6)),
    ],
)
def test_plain_tensors(
    name: str, shape: tuple[int, ...], dimension: int | None, expected: tuple[int, ...]
) -> None:
    tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
    ranks = [shard_plain(name, tensor, dimension, rank, 2) for rank in range(2)]
    assert shard_shape(name, shape, dimension, 2) == expected
    assert all(tuple(r.shape) == expected and r.is_contiguous() for r in ranks)
    if expected == shape:
        assert all(torch.equal(r, tensor) for r in ranks)
    else:
        assert dimension is not None and torch.equal(torch.cat(ranks, dimension), tensor)
