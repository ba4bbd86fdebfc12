"""Random quantised tensors, and the formats read by loops over single nibbles, as their description
has it."""

from __future__ import annotations

import torch

from quantflow.quant.numbers.integer import IntegerTensor
from quantflow.quant.scheme import Scheme


def random_tensor(
    n: int,
    k: int,
    scheme: Scheme,
    *,
    seed: int = 0,
    index: bool = False,
    dtype: torch.dtype = torch.float16,
    smallest_zero: int = 0,
) -> IntegerTensor:
    """A tensor with codes and zeros over their whole range, and scales that `dtype` holds
    exactly."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(k)
    codes = torch.randint(0, scheme.levels + 1, (n, k), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(n, groups, generator=generator) + 0.01).to(dtype)
    if scheme.symmetric:
        zeros = torch.full((n, groups), scheme.midpoint, dtype=torch.uint8)
    else:
        zeros = torch.randint(
            smallest_zero, scheme.levels + 1, (n, groups), generator=generator, dtype=torch.uint8
        )
        zeros[0, 0] = scheme.midpoint - 1 or 1  # never all midpoints, never 0
    group_index = None
    if index:
        group_index = (torch.arange(k, dtype=torch.int32) // scheme.group_of(k))[
            torch.randperm(k, generator=generator)
        ]
    return IntegerTensor(scheme, codes, scales, zeros, group_index)


def assert_same(a: IntegerTensor, b: IntegerTensor) -> None:
    """Bit by bit, dtypes included."""
    assert a.scheme == b.scheme
    for x, y in ((a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros)):
        assert x.dtype == y.dtype and torch.equal(x, y)
    assert (a.group_index is None) == (b.group_index is None)
    if a.group_index is not None and b.group_index is not None:
        assert a.group_index.dtype == b.group_index.dtype and torch.equal(
            a.group_index, b.group_index
        )


def field(words: list[int], position: int, bits: int) -> int:
    """Code number `position` of a dense stream of bits in 32-bit words, one bit at a time."""
    value = 0
    for bit in range(bits):
        at = position * bits + bit
        value |= ((words[at // 32] >> (at % 32)) & 1) << bit
    return value
