"""What training needs of a block: gradients through it, by torch's own operations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantflow.decoder.block import Block
from quantflow.decoder.decoder import open_decoder
from quantflow.formats.reader import Weights
from tests.helpers.zoo import ZOO, specimen, write

LENGTH = 12


def block_of(path: Path, dtype: torch.dtype) -> Block:
    weights = Weights(path)
    decoder = open_decoder(weights.checkpoint, LENGTH, torch.device("cpu"))
    return decoder.block(0, dict(weights.layer(0)), dtype)


@pytest.mark.parametrize("name", ZOO)
def test_slopes_are_those_of_differences(name: str, tmp_path: Path) -> None:
    """In float64, along a random direction of all linears and norms."""
    block = block_of(write(tmp_path, specimen(name)), torch.float64)
    names = [n for n, t in block.tensors.items() if t.is_floating_point() and "router" not in n]
    generator = torch.Generator().manual_seed(0)
    start = {n: block.tensors[n].double() for n in names}
    along = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in start.items()}
    hidden = next(iter(block.segments)).channels
    x = torch.randn(2, LENGTH, hidden, generator=generator, dtype=torch.float64)
    weigh = torch.randn(2, LENGTH, hidden, generator=generator, dtype=torch.float64)

    def loss(share: Tensor) -> Tensor:
        for n in names:
            block.tensors[n] = start[n] + share * along[n]
        return (block.forward(x) * weigh).sum()

    at = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(at), [at])
    with torch.no_grad():
        step = torch.tensor(1e-7, dtype=torch.float64)
        difference = (loss(step) - loss(-step)) / (2 * step)
    assert slope.item() == pytest.approx(difference.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["llama3", "qwen3", "mixtral", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_the_same_with_gradients(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    block = block_of(write(tmp_path, specimen(name, dtype)), dtype)
    hidden = next(iter(block.segments)).channels
    x = torch.randn(2, LENGTH, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        plain = block.forward(x)
    for segment in block.segments:
        for linear in segment.names:
            block.tensors[f"{linear}.weight"].requires_grad_()
    trained = block.forward(x)
    assert trained.requires_grad and trained.dtype == dtype
    error = (trained.detach().float() - plain.float()).norm() / plain.float().norm()
    assert error < (1e-6 if dtype == torch.float32 else 2e-2)
