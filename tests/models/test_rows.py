"""Rows of what goes from layer to layer, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantflow.models.rows import Part, Rows

L, B = 5, 3


def part(value: Tensor, texts: int, tokens: int) -> Part:
    shape = tuple(1 if axis == texts else n for axis, n in enumerate(value.shape))
    return Part(shape, texts, tokens, value.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_joined_is_split_again(dtype: torch.dtype) -> None:
    """Hidden states side by side, K with its heads, indices that bfloat16 has no numbers for, wider
    numbers, and one number a token."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, B, L, 6, generator=random).to(dtype)
    values = {
        "keys": torch.randn(B, 2, L, 3, generator=random).to(dtype),
        "indices": torch.randint(0, 2**31 - 1, (B, L, 7), generator=random),
        "wide": torch.randn(B, L, 2, generator=random),
        "one": torch.randint(0, 9, (B, L), generator=random),
    }
    axes = {"keys": (0, 2), "indices": (0, 1), "wide": (0, 1), "one": (0, 1)}
    rows = Rows(part(hidden, 1, 2), {n: part(v, *axes[n]) for n, v in values.items()})
    x = rows.join(hidden, values)
    wider = 4 // dtype.itemsize
    assert x.shape == (B, L, 4 * 6 + 2 * 3 + wider * (7 + 2 + 1)) == (B, L, rows.channels(dtype))
    assert torch.equal(x[1, 2, 6:12], hidden[1, 1, 2])  # the second of a token's hidden states
    again, others = rows.split(x.clone()[:2])  # some of the texts
    assert torch.equal(again, hidden[:, :2])
    for name, value in values.items():
        assert torch.equal(others[name], value[:2]) and others[name].dtype == value.dtype


def test_hidden_states_alone_are_rows_as_they_are() -> None:
    x = torch.randn(B, L, 8)
    rows = Rows(Part((1, L, 8), 0, 1, torch.float32), {})
    assert rows.plain and rows.split(x) == (x, {}) and rows.join(x, {}) is x
