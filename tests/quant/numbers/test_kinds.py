"""What every kind of numbers must keep, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantflow.quant.fit import fit
from quantflow.quant.grid import GridRules
from quantflow.quant.numbers import NUMBERS, QuantizedTensor
from quantflow.quant.requantize import requantize
from quantflow.quant.scheme import PER_CHANNEL, Scheme

RULES = GridRules((torch.float16,))
SCHEMES = (
    Scheme(4, 32, False),
    Scheme(3, PER_CHANNEL, True),
    Scheme(8, 32, True),
    Scheme(4, 32, False, "minimum"),
    Scheme(4, 64, True, "nf4"),
    Scheme(4, 64, True, "nf4", double=True),
)
PARTS = {
    "integer": {"codes", "scales", "zeros"},
    "minimum": {"codes", "scales", "minimums"},
    "nf4": {"codes", "scales"},
    "nf4 double": {"codes", "scales", "nested.codes", "nested.absmax", "nested.offset"},
}
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def made(scheme: Scheme) -> tuple[Tensor, QuantizedTensor]:
    """A weight [16, 128], and it in these numbers."""
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(3)).clamp(-3, 3)
    return weight, scheme.numbers.quantize(weight, scheme, RULES)


def test_every_kind_is_tried() -> None:
    assert (
        {scheme.kind for scheme in SCHEMES}
        == set(NUMBERS)
        == {kind.kind for kind in NUMBERS.values()}
    )


@each_scheme
def test_it_is_near_and_what_its_scheme_says(scheme: Scheme) -> None:
    weight, tensor = made(scheme)
    assert (
        isinstance(tensor, NUMBERS[scheme.kind])
        and tensor.scheme == scheme
        and tensor.shape == (16, 128)
    )
    assert tensor.problems("w") == []
    assert 0 < fit(weight, tensor).error < 0.1
    assert torch.equal(tensor.dequantize(torch.bfloat16), tensor.dequantize().bfloat16())
    # Rounding what was rounded changes little more than nothing: it has numbers that hold it.
    again = requantize(tensor.dequantize(), tensor, scheme, RULES)
    assert float((again.dequantize() - tensor.dequantize()).norm() / weight.norm()) < 2e-2


@each_scheme
def test_the_store_gives_back_what_it_got(scheme: Scheme) -> None:
    _, tensor = made(scheme)
    parts = tensor.parts()
    assert set(parts) == PARTS["nf4 double" if scheme.double else scheme.kind]
    back = scheme.numbers.from_parts(scheme, {**parts, "bias": torch.zeros(16)}, 128)
    assert type(back) is type(tensor) and set(back.parts()) == set(parts)
    assert all(torch.equal(back.parts()[name], part) for name, part in parts.items())
    assert torch.equal(back.dequantize(torch.float64), tensor.dequantize(torch.float64))


@each_scheme
def test_rows_and_ranks_are_parts_of_the_whole(scheme: Scheme) -> None:
    _, tensor = made(scheme)
    whole = tensor.dequantize()
    assert torch.equal(tensor.rows(slice(2, 9)).dequantize(), whole[2:9])
    if scheme.double:
        with pytest.raises(ValueError, match="NF4 g64 double cannot be cut"):
            tensor.cut(0, 0, 2)
        return
    for dimension in (0, 1):
        ranks = [tensor.cut(dimension, rank, 2) for rank in range(2)]
        assert all(rank.problems("w") == [] for rank in ranks)
        assert torch.equal(torch.cat([rank.dequantize() for rank in ranks], dimension), whole)


@each_scheme
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: replace(t, scales=t.scales[:, :0]), "w scales: shape [16, 0]"),
        (
            lambda t: replace(t, scales=torch.full_like(t.scales, torch.nan)),
            "w scales: NaN or infinity",
        ),
        (lambda t: replace(t, codes=t.codes.int()), "w codes: dtype torch.int32"),
        (lambda t: replace(t, scheme=replace(t.scheme, bits=2)), "w codes: a value of"),
    ],
)
def test_what_is_no_such_tensor_is_told(
    scheme: Scheme, spoil: Callable[[QuantizedTensor], QuantizedTensor], said: str
) -> None:
    assert any(str(problem).startswith(said) for problem in spoil(made(scheme)[1]).problems("w"))
