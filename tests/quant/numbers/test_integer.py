"""Integers, against literals and loops over single elements."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.quant.numbers.integer import IntegerTensor
from quantflow.quant.scheme import Scheme


def test_dequantize_by_hand() -> None:
    codes = torch.tensor([[0, 15, 7, 8], [3, 3, 4, 5]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 2.0], [1.0, 0.25]], dtype=torch.float16)
    zeros = torch.tensor([[8, 7], [3, 0]], dtype=torch.uint8)
    tensor = IntegerTensor(Scheme(4, 2, False), codes, scales, zeros)
    assert tensor.shape == (2, 4)
    assert tensor.dequantize().tolist() == [[-4.0, 3.5, 0.0, 2.0], [0.0, 0.0, 1.0, 1.25]]
    # Channels 0 and 3 in group 1, channels 1 and 2 in group 0.
    shuffled = IntegerTensor(
        Scheme(4, 2, False), codes, scales, zeros, torch.tensor([1, 0, 0, 1], dtype=torch.int32)
    )
    assert shuffled.dequantize().tolist() == [[-14.0, 3.5, -0.5, 2.0], [0.75, 0.0, 1.0, 1.25]]
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert tensor.dequantize(dtype).dtype == dtype and shuffled.dequantize(dtype).dtype == dtype
    # nothing was changed in place
    assert torch.equal(tensor.codes, codes) and torch.equal(tensor.zeros, zeros)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from((1, 4, 8)),
    st.sampled_from((2, 3, 4, 8)),
    st.booleans(),
    st.integers(0, 99),
)
def test_dequantize_is_the_formula(
    n: int, groups: int, group: int, bits: int, index: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, levels = groups * group, 2**bits - 1
    codes = torch.randint(0, levels + 1, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n, groups, generator=generator).half()
    zeros = torch.randint(0, levels + 1, (n, groups), generator=generator, dtype=torch.uint8)
    of = torch.arange(k) // group
    if index:
        of = of[torch.randperm(k, generator=generator)]
    tensor = IntegerTensor(
        Scheme(bits, group, False), codes, scales, zeros, of.int() if index else None
    )
    expected = [
        # 16-bit scales: exact in float64
        [
            (int(codes[row, i]) - int(zeros[row, of[i]])) * float(scales[row, of[i]])
            for i in range(k)
        ]
        for row in range(n)
    ]
    assert tensor.dequantize(torch.float64).tolist() == expected
    torch.testing.assert_close(
        tensor.dequantize().double(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=2**-23,
        atol=0,
    )
