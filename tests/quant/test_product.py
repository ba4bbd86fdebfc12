"""Products by 1×1 convolutions are products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from quantflow.quant import product
from quantflow.quant.product import FEWEST_ROWS, linear


@pytest.mark.parametrize("shape", [(FEWEST_ROWS,), (3, 90), (1, 1, 200), (1,), (2, 3)])
@pytest.mark.parametrize(("n", "k"), [(1, 64), (64, 1), (172, 64), (33, 7)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_against_float64(
    shape: tuple[int, ...], n: int, k: int, biased: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(n)
    x, weight, bias = (
        torch.randn(*s, generator=generator).to(dtype) for s in ((*shape, k), (n, k), (n,))
    )
    found = linear(x, weight, bias if biased else None)
    assert found.dtype == dtype and found.shape == (*shape, n)
    expected = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=k * tolerance)


def test_rows_and_weights_that_are_parts_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(100, 96)[:, 5:69], torch.randn(64, 40).T
    torch.testing.assert_close(linear(x, weight), x @ weight.T, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(product, "MOST_ELEMENTS", 10)
    whole = torch.randn(9, 64)
    assert linear(x, whole).equal(F.linear(x, whole))


AVX512 = (
    torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
)


@pytest.mark.skipif(not AVX512, reason="a processor where torch's own product is as fast")
def test_which_products_are_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        product.F, "conv2d", lambda *args: calls.append(args) or torch.conv2d(*args)
    )
    x, weight = torch.randn(FEWEST_ROWS, 8), torch.randn(4, 8)
    linear(x, weight)
    linear(x.view(2, -1, 8)[:, :, :], weight, torch.zeros(4))
    assert len(calls) == 2
    for other in (
        (x[1:], weight),
        (x.double(), weight.double()),
        (x.bfloat16(), weight.bfloat16()),
        (x, torch.randn(8, 4).T),
    ):
        linear(*other)
    assert len(calls) == 2


def test_what_has_no_elements_or_does_not_fit() -> None:
    assert linear(torch.zeros(300, 0), torch.zeros(4, 0)).equal(torch.zeros(300, 4))
    assert linear(torch.zeros(300, 8), torch.zeros(0, 8)).shape == (300, 0)
    with pytest.raises(RuntimeError, match="shapes"):
        linear(torch.zeros(300, 5), torch.zeros(4, 8))
